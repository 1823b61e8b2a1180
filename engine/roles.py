"""Actor, critic and reference as roles on one frozen base: a LoRA adapter each, and a value head for the critic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import ppo
from engine.config import ActorConfig, CriticConfig, LoraSettings
from engine.errors import RecipeError

ACTOR, CRITIC, REFERENCE = "actor", "critic", "reference"


@dataclass(frozen=True)
class Layout:
    """Sequences as one forward sees them: prompts padded on the left, responses on the right.

    Response positions are then one contiguous run for every row, so a model's own `logits_to_keep` yields exactly
    the logits needed, with whatever capping, scaling or bias the family applies to them.
    """

    sequences: Tensor  # [B, P + R] int64
    mask: Tensor  # [B, P + R] bool
    response_width: int  # R

    @property
    def position_ids(self) -> Tensor:
        """`[B, P + R]`, counted over real tokens, so that padding moves nothing."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)

    @property
    def response_ids(self) -> Tensor:
        return self.sequences[:, -self.response_width :]


@dataclass(frozen=True)
class PolicyOutput:
    """Per response token; padding holds whatever the model made of it."""

    logprobs: Tensor  # [B, R] float32, of the temperature-scaled full softmax
    entropy: Tensor  # [B, R] float32
    ref_logprobs: Tensor | None  # [B, R] float32, when asked for
    full_kl: Tensor | None  # [B, R] float32, KL(policy || reference) over the vocabulary, when asked for
    values: Tensor | None  # [B, R] float32, V read before response token t, when asked for


class RolesModel(nn.Module):
    """The base with its adapters and the value head: the one module that DeepSpeed owns.

    Args:
        base: a frozen causal language model.
        temperature: divides the logits; 0 stands for argmax, whose log-probs are those of temperature 1.
    """

    def __init__(self, base: PreTrainedModel, actor: ActorConfig, critic: CriticConfig, temperature: float):
        super().__init__()
        self.critic = critic
        self.temperature = temperature or 1.0
        self.policy = _adapted(base, actor, critic)
        dtype = next(base.parameters()).dtype
        self.value_head = nn.Linear(base.config.get_text_config().hidden_size, 1, bias=False, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)  # V starts at 0: no opinion before the first return was seen
        self._layers = [m for m in self.policy.modules() if isinstance(m, BaseTunerLayer)]
        self._role = ACTOR
        self._prepare_parameters(dtype)

    def _prepare_parameters(self, dtype: torch.dtype) -> None:
        # peft trains only the adapter that it calls active; both roles are in the optimizer. ZeRO-3 wants one dtype.
        for name, parameter in self.policy.named_parameters():
            adapter = ".lora_" in name
            parameter.requires_grad_(adapter)
            if adapter:
                parameter.data = parameter.data.to(dtype)

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside, adapters injected."""
        return self.policy.get_base_model()

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What a role trains, by name."""
        own = {n: p for n, p in self.policy.named_parameters() if f".{role}." in n and ".lora_" in n}
        if role == CRITIC:
            own["value_head.weight"] = self.value_head.weight
        return own

    def frozen_parameters(self) -> dict[str, nn.Parameter]:
        """The base, by name."""
        return {n: p for n, p in self.policy.named_parameters() if ".lora_" not in n}

    @contextmanager
    def acting_as(self, role: str) -> Iterator[None]:
        """Inside, forwards run with the role's adapter; the reference has none.

        The active adapter is set directly: peft's `set_adapter` would also flip `requires_grad` and so take the
        other role out of the optimizer. peft passes over an adapter name that a layer doesn't have.
        """
        previous, self._role = self._role, role
        self._switch(role)
        try:
            yield
        finally:
            self._role = previous
            self._switch(previous)

    def _switch(self, role: str) -> None:
        for layer in self._layers:
            layer._active_adapter = [role]

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward, each layer with the role of its own forward.

        A joint backward runs when the role of the moment is another: without this the actor's layers would be
        recomputed with the critic's adapter, silently.
        """
        self.causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self.acting_as(self._role)

    def forward(
        self,
        layout: Layout,
        *,
        values: bool = False,
        ref_logprobs: bool = False,
        full_kl: bool = False,
        entropy_grad: bool = False,
    ) -> PolicyOutput:
        """All roles in one forward, so that one joint backward reaches every trainable parameter."""
        logits, hidden = self._policy_logits(layout, hidden=values and self.critic.home == "trunk")
        chosen = layout.response_ids
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            entropy = ppo.entropy(logits)  # its graph holds two more [B, R, V]
        ref = kl = None
        if ref_logprobs or full_kl:
            with torch.no_grad(), self.acting_as(REFERENCE):
                ref_logits, _ = self._policy_logits(layout)
            ref = token_logprobs(ref_logits, chosen)
            kl = ppo.full_kl(logits, ref_logits) if full_kl else None
        return PolicyOutput(
            logprobs=token_logprobs(logits, chosen),
            entropy=entropy,
            ref_logprobs=ref,
            full_kl=kl,
            values=self._values(layout, hidden) if values else None,
        )

    def _policy_logits(self, layout: Layout, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """Temperature-scaled float32 logits `[B, R, V]` of the response tokens; last hidden states if asked."""
        output = self.causal(
            input_ids=layout.sequences,
            attention_mask=layout.mask.long(),
            position_ids=layout.position_ids,
            use_cache=False,
            logits_to_keep=layout.response_width + 1,
            output_hidden_states=hidden,
        )
        logits = output.logits[:, :-1].float() / self.temperature
        return logits, output.hidden_states[-1] if hidden else None

    def _values(self, layout: Layout, trunk: Tensor | None) -> Tensor:
        """`[B, R]` values, read one position before each response token: after it V would have seen the action."""
        if trunk is None:
            with self.acting_as(CRITIC):
                trunk = self.causal.base_model(
                    input_ids=layout.sequences,
                    attention_mask=layout.mask.long(),
                    position_ids=layout.position_ids,
                    use_cache=False,
                ).last_hidden_state
        elif self.critic.trunk_detach:
            trunk = trunk.detach()
        before = trunk[:, -layout.response_width - 1 : -1]
        return self.value_head(before).squeeze(-1).float()


def _adapted(base: PreTrainedModel, actor: ActorConfig, critic: CriticConfig) -> PeftModel:
    """The base with the adapters injected, nothing else changed."""
    wanted = {ACTOR: actor.lora} | ({CRITIC: critic.lora} if critic.home == "adapter" else {})
    policy = None
    for role, settings in wanted.items():
        try:
            if policy is None:
                policy = get_peft_model(base, lora_config(settings), adapter_name=role, autocast_adapter_dtype=False)
            else:
                policy.add_adapter(role, lora_config(settings))
        except ValueError as error:  # peft: no module has such a name, or it is of no kind that takes an adapter
            raise RecipeError(f"{role}.lora.targets: {error}") from error
    if any("lora_embedding" in name for name, _ in policy.named_parameters()):
        raise RecipeError("lora.targets names an embedding, and only linear layers take an adapter here; leave it out")
    return policy


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """`[B, R]` log-probabilities of `ids` `[B, R]` under `logits` `[B, R, V]`."""
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def lora_config(settings: LoraSettings) -> LoraConfig:
    """peft's configuration of an adapter; no dropout, or the first ratio would not be 1."""
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        lora_dropout=0.0,
    )
