"""The recipe's sections on models and what is trained: the base, the roles on it or beside it, and their optimizers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from engine.section import Section


class ModelConfig(Section):
    """The base model that roles share, frozen unless the actor trains in full."""

    path: str = "runs/toyworld/policy"
    """Folder or hub name of a causal language model and its tokenizer."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null: the default one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights while computing; DeepSpeed keeps float32 masters of what it trains."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Frozen linear layers by bitsandbytes: nf4 with double quantization, or int8 (ZeRO stages 0 to 2)."""
    attn_implementation: str | None = None
    """Attention kernel of policy, critic and reference (sdpa, eager, flash_attention_2); null: the default."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoints of the recipe, rewards included. Off unless you have read it."""


class LoraSettings(Section):
    """One LoRA adapter (Hu et al. 2021)."""

    rank: PositiveInt = 16
    """Rank r of the update B A."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Module names that get an adapter, or all-linear for every linear layer but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dora: bool = False
    """Train a magnitude per output beside the update (Liu et al. 2024)."""
    modules_to_save: list[str] = []
    """Modules trained whole, as a copy of the role's own, such as embed_tokens and lm_head after new tokens."""

    @field_validator("targets")
    @classmethod
    def _keyword(cls, targets):
        # The command line reads any value of this option as a list.
        return "all-linear" if targets == ["all-linear"] else targets


class OptimizerSettings(Section):
    """AdamW for one role."""

    learning_rate: NonNegativeFloat = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up; linear and cosine fall towards 0, which the step after the run's last would reach."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the rate climbs from 0; 0: none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Adam's decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Adam's term that keeps the division finite."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; 0: off."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of this role's gradient over all ranks; 0: never clipped."""


class CriticOptimizerSettings(OptimizerSettings):
    """AdamW for the critic, whose head starts from nothing."""

    # A subclass and not another default instance: a recipe that sets one key of a section gets the rest from the class.
    learning_rate: NonNegativeFloat = 3e-4
    """Peak learning rate."""


class ActorConfig(Section):
    """The policy that PPO trains."""

    train: Literal["lora", "full"] = "lora"
    """lora: an adapter on the shared base. full: every parameter of the base, which then is no base for others."""
    lora: LoraSettings = LoraSettings()
    """The actor's adapter (train lora)."""
    init_adapter: str | None = None
    """Folder of a LoRA adapter to start from, as SFT leaves it; its settings replace actor.lora. null: none."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The actor's AdamW."""


class CriticConfig(Section):
    """The value function that PPO trains."""

    home: Literal["adapter", "trunk", "model"] = "adapter"
    """adapter: on the shared base. trunk: a value head on the actor's hidden states. model: a model of its own."""
    path: str | None = None
    """With home model: a causal or a reward model, whose score head then starts the value head; null: model.path."""
    train: Literal["lora", "full"] = "lora"
    """With home model: an adapter or every parameter."""
    trunk_detach: bool = False
    """With home trunk: the value loss trains the head alone and leaves the actor's layers be."""
    lora: LoraSettings = LoraSettings()
    """The critic's adapter (home adapter, or home model with train lora)."""
    optimizer: CriticOptimizerSettings = CriticOptimizerSettings()
    """The critic's AdamW."""
    warmup_iterations: NonNegativeInt = 0
    """First iterations in which only the critic learns; 0: none."""


class ReferenceConfig(Section):
    """The frozen policy that the KL is measured against."""

    home: Literal["base", "adapter", "model"] | None = None
    """base: adapters off. adapter: a frozen one. model: its own. null: a copy of actor.init_adapter, or the base."""
    path: str | None = None
    """The adapter's or the model's folder; null: actor.init_adapter or model.path."""
    offload_param: Literal["none", "cpu"] = "none"
    """As for a reward; with home model alone."""
