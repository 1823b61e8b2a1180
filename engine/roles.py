"""Actor, critic, reference and reward as roles on one base: a LoRA adapter each where they need one, heads beside it.

Roles that live in a model of their own are here too; which role lives where is the recipe's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import adapters, causal
from engine.batch import Rollout, length_mask
from engine.config import Recipe
from engine.role_config import CriticConfig
from engine.scoring import last_positions
from engine.vocabulary_head import Asked, Logits, VocabularyHead

ACTOR, CRITIC, REFERENCE = "actor", "critic", "reference"


def reward_role(index: int) -> str:
    """The name of the role that scores as the recipe's reward of that index."""
    return f"reward_{index}"


@dataclass(frozen=True)
class Layout:
    """Sequences as one forward sees them: each a run of real tokens, padded on either side, that ends in its response.

    What a backbone says of them, `[B, L, H]`, is then cut down to the N real response tokens: padding costs nothing
    from there on.
    """

    sequences: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool
    response_lengths: Tensor  # [B] int64, at least 1; below the tokens of the row
    packed: bool = False  # they go through backbones end to end, without their padding

    @classmethod
    def of(cls, rollout: Rollout, device: torch.device | str = "cpu", packed: bool = False) -> Layout:
        """All rows of a rollout, to be computed on a device."""
        parts = (rollout.sequences, rollout.sequence_mask, rollout.response_lengths)
        return cls(*(part.to(device) for part in parts), packed)

    def hidden_states(self, model: PreTrainedModel) -> Tensor:
        """`[B, L, H]` what a model's backbone hands to its head."""
        return causal.hidden_states(model, self.sequences, self.mask, self.packed)

    @cached_property
    def responses(self) -> Tensor:
        """`[B, L]` bool, where the response tokens are."""
        last, at = last_positions(self.mask)[:, None], torch.arange(self.mask.shape[1], device=self.mask.device)
        return (at <= last) & (at > last - self.response_lengths[:, None])

    @property
    def tokens(self) -> Tensor:
        """`[N]` ids."""
        return self.sequences[self.responses]

    def before(self, hidden: Tensor) -> Tensor:
        """`[N, H]` from one position before each token: what predicts it, and what V is read from.

        After it V would have seen the action.
        """
        return hidden[:, :-1][self.responses[:, 1:]]

    def spread(self, values: Tensor) -> Tensor:
        """`[B, R]` from `[N]`, R tokens the longest response, padding 0."""
        mask = length_mask(self.response_lengths, int(self.response_lengths.max()))
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


@dataclass(frozen=True)
class RolesOutput:
    """`[B, R]` float32 each, padding 0; None where it wasn't asked for."""

    logprobs: Tensor | None = None  # of the temperature-scaled full softmax
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    full_kl: Tensor | None = None  # KL(policy || reference) over the vocabulary
    values: Tensor | None = None  # V read before response token t


class RolesModel(nn.Module):
    """The base with its adapters and heads: the one module that DeepSpeed owns on behalf of all roles on it.

    Args:
        base: a causal language model, every parameter frozen.
        recipe: says who lives on the base. An actor that trains in full is the base itself.
        sources: the recipe's `named_adapters`, if they were read before.

    Raises:
        RecipeError: an adapter doesn't fit the base.
    """

    def __init__(self, base: PreTrainedModel, recipe: Recipe, sources: dict | None = None):
        super().__init__()
        self.critic = recipe.critic
        self.temperature = recipe.generation.temperature or 1.0  # 0 is argmax, with the log-probs of temperature 1
        dtype = compute_dtype(base)
        sources = named_adapters(recipe) if sources is None else sources
        rewards = {role: saved for role, saved in sources.items() if role not in (ACTOR, CRITIC, REFERENCE)}
        self.policy = adapters.attach(base, sources)
        # After the policy, so that parameters go by the names that they have there.
        self.head = VocabularyHead(self.causal, self.temperature)
        self.switch = adapters.Switch(self.policy, self.head.copy)
        hidden_size = base.get_output_embeddings().in_features
        self.value_head = None
        if recipe.critic.home != "model":
            self.value_head = nn.Linear(hidden_size, 1, bias=False, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)  # V starts at 0: no opinion before the first return was seen
        self.reward_heads = nn.ModuleDict({role: _reward_head(saved, dtype) for role, saved in rewards.items()})
        self._role = ACTOR
        self.switch.to(ACTOR)
        self._prepare_parameters(dtype, full=recipe.actor.train == "full")

    def _prepare_parameters(self, dtype: torch.dtype, full: bool) -> None:
        adapters.cast(self.policy, dtype)
        # peft trains only the adapter that it calls active; all trained roles are in one optimizer.
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(full or adapters.owner(name) in (ACTOR, CRITIC))
        self.reward_heads.requires_grad_(False)

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside, adapters injected."""
        return self.policy.get_base_model() if isinstance(self.policy, adapters.PeftModel) else self.policy

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What a role trains in this module, by name."""
        trained = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        own = {n: p for n, p in trained.items() if adapters.owner(n) == role}
        if role == ACTOR and not own:
            own = trained  # an actor that trains in full has the base to itself
        if role == CRITIC and self.value_head is not None:
            own["value_head.weight"] = self.value_head.weight
        return own

    def frozen_parameters(self) -> dict[str, nn.Parameter]:
        """The base and the adapters and heads that only stand by, by name."""
        return {n: p for n, p in self.named_parameters() if not p.requires_grad}

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Inside, forwards run with the role's adapter; a role without one sees the base."""
        previous, self._role = self._role, role
        self.switch.to(role)
        try:
            yield
        finally:
            self._role = previous
            self.switch.to(previous)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward, each layer with the role of its own forward.

        A joint backward runs when the role of the moment is another: without this the actor's layers would be
        recomputed with the critic's adapter, silently.
        """
        self.causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self.acting_as(self._role)

    def forward(self, compute, *arguments, **keywords):
        """`compute(...)`, one of the methods below: DeepSpeed sees to the weights of what runs inside a forward."""
        return compute(*arguments, **keywords)

    def outputs(
        self,
        layout: Layout,
        *,
        logprobs: bool = True,
        entropy: bool = False,
        entropy_grad: bool = False,
        values: bool = False,
        ref_logprobs: bool = False,
        full_kl: bool = False,
        reference: tuple[Tensor, Logits] | None = None,
    ) -> RolesOutput:
        """All roles in one forward, so that one joint backward reaches every trainable parameter.

        Args:
            entropy_grad: a gradient flows through the entropy.
            values: from a critic that lives on the base; one of its own has its own forward.
            reference: hidden states `[N, H]` and head of one that lives elsewhere; None: it lives on the base.
        """
        speaks, on_trunk = logprobs or entropy or full_kl, values and self.critic.home == "trunk"
        referred = ref_logprobs or full_kl
        if referred and reference is None:
            with torch.no_grad():
                reference = self._before(REFERENCE, layout), partial(self._logits, REFERENCE)
        hidden = self._before(ACTOR, layout) if speaks or on_trunk else None
        found = {}
        if speaks:
            asked = Asked(layout.tokens, partial(self._logits, ACTOR), entropy, entropy_grad, full_kl)
            if referred:
                asked = replace(asked, ref_hidden=reference[0], ref_logits=reference[1])
            found = self.head.measure(hidden, asked)
        elif referred:
            with torch.no_grad():
                asked = Asked(layout.tokens, reference[1])
                found["ref_logprobs"] = self.head.measure(reference[0], asked)["logprobs"]
        if values:
            found["values"] = self._values(layout, hidden if on_trunk else None)
        return RolesOutput(**{name: layout.spread(value) for name, value in found.items()})

    def _before(self, role: str, layout: Layout) -> Tensor:
        """`[N, H]` a role's hidden states, one position before each response token."""
        with self.acting_as(role):
            return layout.before(layout.hidden_states(self.causal))

    def _logits(self, role: str, hidden: Tensor) -> Tensor:
        """`[n, V]` by a role's head: it may have an adapter too."""
        with self.acting_as(role):
            return self.head.logits(hidden)

    def _values(self, layout: Layout, trunk: Tensor | None) -> Tensor:
        """`[N]`."""
        if trunk is None:
            trunk = self._before(CRITIC, layout)
        elif self.critic.trunk_detach:
            trunk = trunk.detach()
        return read_values(self.value_head, trunk)

    def scores(self, role: str, ids: Tensor, mask: Tensor, packed: bool = False) -> Tensor:
        """`[B]` float32 scores of a reward adapter, read at the last real position; as `last_token_scores`."""
        with self.acting_as(role):
            hidden = causal.hidden_states(self.causal, ids, mask, packed)
        rows = torch.arange(len(ids), device=ids.device)
        return self.reward_heads[role](hidden[rows, last_positions(mask)]).squeeze(-1).float()


class ValueModel(nn.Module):
    """A critic of its own: a sequence classifier whose score head, read at every position, is the value head.

    Args:
        scorer: a transformers sequence classifier with one output, every parameter frozen.
    """

    def __init__(self, scorer: PreTrainedModel, settings: CriticConfig):
        super().__init__()
        self.policy = scorer
        dtype = scorer.score.weight.dtype
        if settings.train == "full":
            scorer.requires_grad_(True)
        else:
            config = adapters.lora_config(settings.lora)
            # peft's own form for classifiers: the head is one of the modules that are saved whole.
            config.task_type, config.modules_to_save = "SEQ_CLS", [*settings.lora.modules_to_save, "score"]
            self.policy = adapters.attach(scorer, {CRITIC: config})
            adapters.cast(self.policy, dtype)
            for name, parameter in self.policy.named_parameters():
                parameter.requires_grad_(adapters.owner(name) == CRITIC)

    @property
    def scorer(self) -> PreTrainedModel:
        """The transformers model inside, adapter injected."""
        return self.policy.get_base_model() if isinstance(self.policy, adapters.PeftModel) else self.policy

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What the critic trains, by name."""
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad} if role == CRITIC else {}

    def frozen_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if not p.requires_grad}

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward."""
        self.scorer.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, layout: Layout) -> Tensor:
        """`[B, R]` float32 values, padding 0."""
        hidden = layout.hidden_states(self.scorer)
        return layout.spread(read_values(self.scorer.score, layout.before(hidden)))


class ReferenceModel(nn.Module):
    """A reference of its own, frozen."""

    def __init__(self, model: PreTrainedModel, temperature: float):
        super().__init__()
        self.model = model
        self.head = VocabularyHead(model, temperature or 1.0)

    def forward(self, layout: Layout, as_hidden: bool = False) -> Tensor:
        """`[B, R]` float32 log-probs; with `as_hidden` what they come from, `[N, H]`, for somebody who has the head."""
        hidden = layout.before(layout.hidden_states(self.model))
        if as_hidden:
            return hidden
        return layout.spread(self.head.measure(hidden, Asked(layout.tokens, self.head.logits))["logprobs"])


def named_adapters(recipe: Recipe) -> dict[str, LoraConfig | adapters.SavedAdapter]:
    """Where the adapters on the base come from, by role; those in folders are read here.

    Raises:
        RecipeError: a folder holds none that can be used.
    """
    wanted = {}
    if recipe.actor.train == "lora":
        start = recipe.actor.init_adapter
        wanted[ACTOR] = adapters.read(start) if start else adapters.lora_config(recipe.actor.lora)
    if recipe.critic.home == "adapter":
        wanted[CRITIC] = adapters.lora_config(recipe.critic.lora)
    if recipe.reference_home == "adapter":
        wanted[REFERENCE] = adapters.read(recipe.reference_path)
    rewards = {reward_role(i): r.adapter for i, r in enumerate(recipe.rewards) if r.adapter}
    return wanted | {role: adapters.read(path, reward=True) for role, path in rewards.items()}


def _reward_head(saved: adapters.SavedAdapter, dtype: torch.dtype) -> nn.Linear:
    head = nn.Linear(saved.head.shape[1], 1, bias=False, dtype=dtype)
    head.weight.data.copy_(saved.head)
    return head


def compute_dtype(base: PreTrainedModel) -> torch.dtype:
    """The type that a base computes in, whatever its linear layers are packed as."""
    return base.get_output_embeddings().weight.dtype


def read_values(head: nn.Module, before: Tensor) -> Tensor:
    """`[N]` float32 values from hidden states `[N, H]`."""
    return head(before).squeeze(-1).float()
