"""PPO's update in plain PyTorch, told apart from the engine on purpose: two separate models, one sequence at a time
without any padding, no DeepSpeed, no role switching, formulas written out again."""

from __future__ import annotations

import torch
from peft import get_peft_model

from engine.adapters import lora_config
from engine.batch import Experience
from engine.config import Recipe
from engine.minibatches import minibatch_rows
from engine.roles import ACTOR, CRITIC
from tests import tiny


class Reference:
    """Actor and critic as two models of their own, with the engine's starting weights."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        start = tiny.roles(recipe)
        if recipe.actor.train == "full":
            self.actor = tiny.llama().requires_grad_(True)
        else:
            self.actor = get_peft_model(tiny.llama(), lora_config(recipe.actor.lora), adapter_name=ACTOR)
            _copy(start.role_parameters(ACTOR), self.actor)
        self.critic, self.head = None, torch.nn.Linear(32, 1, bias=False)
        if recipe.critic.home == "model":
            own = tiny.value_model(recipe)
            self.critic, self.head = own.scorer.model, own.scorer.score
            trained = {f"critic {n}": p for n, p in own.role_parameters(CRITIC).items()}
        else:
            self.head.load_state_dict(start.value_head.state_dict())
            trained = {"critic value_head.weight": self.head.weight}
        if recipe.critic.home == "adapter":
            adapted = get_peft_model(tiny.llama(), lora_config(recipe.critic.lora), adapter_name=CRITIC)
            own = {n: p for n, p in start.role_parameters(CRITIC).items() if n != "value_head.weight"}
            _copy(own, adapted)
            self.critic = adapted.get_base_model().model
            trained |= {f"critic {n}": p for n, p in adapted.named_parameters() if p.requires_grad}
        self.trained = {f"actor {n}": p for n, p in self.actor.named_parameters() if p.requires_grad} | trained
        self.parameters = {
            role: [p for name, p in self.trained.items() if name.startswith(role)] for role in (ACTOR, CRITIC)
        }
        self.optimizers = {
            role: torch.optim.AdamW(
                self.parameters[role],
                lr=settings.learning_rate,
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
            )
            for role, settings in ((ACTOR, recipe.actor.optimizer), (CRITIC, recipe.critic.optimizer))
        }

    def sequence(self, experience: Experience, row: int):
        """Log-probs, entropy, values of one sequence, `[R]` each, from its real tokens alone."""
        sampled = experience.rollout
        p, r = int(sampled.prompt_lengths[row]), int(sampled.response_lengths[row])
        ids = torch.cat([sampled.prompt_ids[row, -p:], sampled.response_ids[row, :r]])[None]
        output = self.actor(input_ids=ids, output_hidden_states=True)
        logprobs = (output.logits[0, p - 1 : p + r - 1] / self.recipe.generation.temperature).log_softmax(-1)
        chosen = logprobs[torch.arange(r), ids[0, p:]]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        if self.critic is None:
            hidden = output.hidden_states[-1][0]
            hidden = hidden.detach() if self.recipe.critic.trunk_detach else hidden
        else:
            hidden = self.critic(input_ids=ids).last_hidden_state[0]
        return chosen, entropy, self.head(hidden)[p - 1 : p + r - 1, 0]

    def loss(self, experience: Experience, rows) -> torch.Tensor:
        """The joint loss of a minibatch: the mean over its tokens."""
        settings, total, tokens = self.recipe.ppo, 0.0, 0
        for row in rows.tolist():
            logprobs, entropy, values = self.sequence(experience, row)
            r = len(logprobs)
            old = experience.evaluation.old_logprobs[row, :r]
            advantage = experience.advantages[row, :r]
            ratio = (logprobs - old).exp()
            surrogate = torch.min(
                ratio * advantage, ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio) * advantage
            )
            target, before = experience.returns[row, :r], experience.evaluation.old_values[row, :r]
            error = (values - target) ** 2
            if settings.value_clip:
                near = before + (values - before).clamp(-settings.value_clip, settings.value_clip)
                error = torch.max(error, (near - target) ** 2)
            total = total - surrogate.sum() + settings.value_coef * 0.5 * error.sum()
            total = total - settings.entropy_coef * entropy.sum()
            tokens += r
        return total / tokens

    def update(self, experience: Experience, iteration: int = 0) -> list[dict[str, float]]:
        """All minibatches; returns the gradient norms of each, by role."""
        norms = []
        for epoch in range(self.recipe.ppo.epochs):
            for rows in minibatch_rows(
                self.recipe.seed, iteration, epoch, len(experience.rollout), self.recipe.ppo.minibatch_sequences
            ):
                self.loss(experience, rows).backward()
                norms.append({})
                for role, limit in (
                    (ACTOR, self.recipe.actor.optimizer.gradient_clipping),
                    (CRITIC, self.recipe.critic.optimizer.gradient_clipping),
                ):
                    norms[-1][role] = torch.nn.utils.clip_grad_norm_(self.parameters[role], limit).item()
                    self.optimizers[role].step()
                    self.optimizers[role].zero_grad()
        return norms

    def weights(self) -> dict[str, torch.Tensor]:
        """Trained weights, by role and the engine's names."""
        return {name: p.data for name, p in self.trained.items()}


def _copy(wanted: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    assert not model.load_state_dict({n: p.data for n, p in wanted.items()}, strict=False).unexpected_keys
