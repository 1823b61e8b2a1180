"""The recipe: every setting of a run, typed, documented and checked before any model loads.

Imports neither torch nor deepspeed, so that `--help` and a bad recipe answer at once. How a file and a command line
become a recipe: `command_line.py`. What can only be checked by opening files: `checks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from engine import combinations
from engine.checkpoint_config import CheckpointConfig, TimeLimit
from engine.failure_config import FailureConfig
from engine.role_config import ActorConfig, CriticConfig, ModelConfig, ReferenceConfig
from engine.section import Section

REPOSITORY = Path(__file__).resolve().parent.parent


def locate(path: str | Path) -> Path:
    """`path` from the working directory or, for what comes with Alternator, from the repository; else as given."""
    here = Path(path).expanduser()
    return REPOSITORY / here if not here.exists() and (REPOSITORY / here).exists() else here


class RewardConfig(Section):
    """One source of scores: a model, an adapter on the shared base, or a Python function."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Name in the metrics (score/NAME/mean); null: taken from the path or function."""
    model: str | None = None
    """Folder or hub name of a sequence-classification model with one output."""
    adapter: str | None = None
    """Folder of a sequence-classification LoRA adapter with one output, trained on the base of model.path."""
    function: str | None = None
    """path/to/file.py:name of f(prompts, responses, **columns) -> list of floats."""
    weight: float = 1.0
    """Factor of this source in the sum."""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu: the frozen weights live in host memory and visit the device for a forward (frees nothing on CPU)."""

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = {"model": self.model, "adapter": self.adapter, "function": self.function}
        given = {kind: value for kind, value in kinds.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "a reward is either a model, an adapter or a function, got "
                f"{' and '.join(f'{kind}={value!r}' for kind, value in given.items()) or 'none'}; give exactly one"
            )
        if self.offload_param != "none" and self.model is None:
            raise ValueError(f"offload_param {self.offload_param} needs a model of its own, got {given}; leave it out")
        return self

    @property
    def label(self) -> str:
        """The source's name in metrics and messages."""
        if self.name is not None:
            return self.name
        return self.function.rpartition(":")[2] if self.function else Path(self.model or self.adapter).name


class ScoreConfig(Section):
    """What happens to a response's score between its sources and the token rewards."""

    normalize: bool = False
    """Divide each source by its running standard deviation after subtracting its running mean."""
    clip: PositiveFloat | None = None
    """Clip the weighted sum to [-clip, clip]; null: off."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Subtracted from the score of a response that ended at the token limit; 0: off."""
    scale: float = 1.0
    """Factor on the final score: 0 and -1 are the controls of an experiment."""


class KLConfig(Section):
    """The pull towards the reference policy."""

    placement: Literal["reward", "loss"] = "reward"
    """reward: subtracted from each token's reward. loss: a term of the policy loss."""
    estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    """Estimator (Schulman 2020); k1 in the reward, k2 or full in the loss have the right expected gradient."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL; the starting value of the adaptive controller."""
    target: PositiveFloat | None = None
    """Sequence KL, in nats, that the adaptive controller steers to (Ziegler et al. 2019); null: fixed kl_coef."""
    horizon: PositiveFloat = 10000.0
    """Sequences over which the controller reacts."""

    @model_validator(mode="after")
    def _has_an_effect(self):
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 has gradient 0 in the loss, got placement loss with estimator k1; "
                "set kl.estimator to k2 or full, or kl.placement to reward"
            )
        if self.target is not None and self.kl_coef == 0:
            raise ValueError(
                f"the adaptive controller multiplies kl_coef and never leaves 0, got target {self.target:g} with "
                "kl_coef 0; set kl.kl_coef above 0 or kl.target to null"
            )
        return self


class PPOConfig(Section):
    """The update (Schulman et al. 2017)."""

    epochs: PositiveInt = 2
    """Passes over an iteration's experience."""
    minibatch_sequences: PositiveInt = 32
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_sequences: PositiveInt = 16
    """Most sequences in one forward of one rank; changes speed and memory, never the result."""
    tokens_per_micro_batch: PositiveInt | None = None
    """Most tokens, padding included, in one forward of one rank, similar lengths together; null: so many sequences."""
    packing: bool = False
    """Sequences of a forward lie end to end, without padding; needs tokens_per_micro_batch."""
    inference_factor: PositiveInt = 4
    """A forward without gradients takes so many times the sequences or tokens: it keeps nothing for a backward."""
    old_logprobs: Literal["recompute", "rollout", "on_policy"] = "recompute"
    """recompute: a pass before the update. rollout: the sampler's. on_policy: the update's own (one step, ratio 1)."""
    importance_cap: PositiveFloat | None = None
    """Truncated importance weight min(exp(old_logprobs - sampler_logprobs), cap) on the policy loss; null: off."""
    clip_ratio: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip_ratio, 1 + clip_ratio]."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the loss of negative advantages, in units of |A| (Ye et al. 2020); null: off."""
    value_clip: PositiveFloat | None = 0.2
    """Largest distance of a new value from the old one in the value loss; null: off."""
    value_coef: NonNegativeFloat = 1.0
    """Weight of the value loss; under Adam it matters with critic.home trunk alone."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus; 0: off."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """GAE's trade of bias against variance (Schulman et al. 2015)."""
    whiten_advantages: bool = True
    """Shift and scale the iteration's advantages to mean 0, variance 1 over all ranks."""
    target_kl: PositiveFloat | None = None
    """Skip the rest of an iteration's update once a minibatch's approx_kl passes this; null: off."""

    @model_validator(mode="after")
    def _packs_by_tokens(self):
        if self.packing and self.tokens_per_micro_batch is None:
            raise ValueError(
                "packing fills each forward up to a number of tokens, got packing true with tokens_per_micro_batch "
                "null; set ppo.tokens_per_micro_batch, or ppo.packing to false"
            )
        return self

    @property
    def for_inference(self) -> PPOConfig:
        """The same with the sizes of forwards without gradients."""
        sizes = {"micro_batch_sequences": self.micro_batch_sequences * self.inference_factor}
        if self.tokens_per_micro_batch is not None:
            sizes["tokens_per_micro_batch"] = self.tokens_per_micro_batch * self.inference_factor
        return self.model_copy(update=sizes)


class DataConfig(Section):
    """The prompts."""

    dataset: str = "runs/toyworld/prompts.jsonl"
    """A json, jsonl, csv or parquet file, or the name of a hub dataset."""
    subset: str | None = None
    """Configuration name of a hub dataset; null: its default."""
    split: str = "train"
    """Split of a hub dataset."""
    text_column: str = "prompt"
    """Column that holds the prompt's text."""
    messages_column: str | None = None
    """Column that holds chat messages, rendered by the tokenizer's chat template; null: use text_column."""
    max_prompt_tokens: PositiveInt = 64
    """Longest prompt."""
    overlong: Literal["error", "drop", "truncate_left"] = "error"
    """What to do with a longer prompt; dropped and truncated ones are counted."""
    prompts_per_iteration: PositiveInt = 64
    """Prompts drawn for one iteration, over all ranks."""
    max_new_tokens_column: str | None = None
    """Column with each prompt's own limit on the response, at most generation.max_new_tokens; null: that for all."""
    samples_per_prompt: PositiveInt = 1
    """Responses sampled for each prompt."""

    @property
    def sequences_per_iteration(self) -> int:
        """Over all ranks."""
        return self.prompts_per_iteration * self.samples_per_prompt


class GenerationConfig(Section):
    """How the actor samples."""

    max_new_tokens: PositiveInt = 48
    """Longest response; one that reaches it without an end token or a stop string is truncated."""
    min_new_tokens: NonNegativeInt = 0
    """End tokens are not drawn before this many tokens."""
    temperature: NonNegativeFloat = 1.0
    """Divides the logits, in sampling and in training; 0: argmax (log-probs are then those of temperature 1)."""
    top_k: NonNegativeInt = 0
    """Draw among the k likeliest tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that hold this much probability; 1: all."""
    end_tokens: list[str] = []
    """Tokens that end a response besides those of the tokenizer and the model's generation config."""
    stop_strings: list[str] = []
    """Texts that end a response where they appear in it; what is scored ends before them."""
    max_concurrent_sequences: PositiveInt = 64
    """Most sequences of a rank that decode at once."""
    continuous_batching: bool = True
    """Sort prompts by length and give a finished sequence's slot to the next prompt; false: whole batches, in order."""
    gather_budget_bytes: NonNegativeInt | Literal["auto"] = "auto"
    """ZeRO-3: bytes that stay gathered while decoding, the rest is fetched by layer; auto: what the device holds."""
    compile: bool = False
    """Decode by torch.compile, on a GPU as a CUDA graph; each step then computes all slots over all of the cache."""

    @model_validator(mode="after")
    def _minimum_below_maximum(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens may not exceed max_new_tokens, got {self.min_new_tokens} > {self.max_new_tokens}; "
                "lower generation.min_new_tokens or raise generation.max_new_tokens"
            )
        return self


class ZeroConfig(Section):
    """How DeepSpeed shards the shared model."""

    ds_config: str = "ds_configs/zero3.json"
    """DeepSpeed JSON of the trained engine; "auto" values are filled from the recipe."""
    frozen_ds_config: str = "ds_configs/inference.json"
    """DeepSpeed JSON of each frozen model in an engine of its own (rewards, reference.home model)."""
    nvme_path: str = "runs/nvme"
    """Folder on a local disk for what the ds_config keeps on NVMe; a run's files there go with the run."""
    keep_gathered_bytes: NonNegativeInt | Literal["auto"] = "auto"
    """ZeRO-3: weights of a model that take no more stay gathered, frozen ones first; auto: a tenth of free memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, one more forward."""
    offload_activations: bool = False
    """Keep what activation checkpointing saves (each layer's input) in host memory; on a CPU it saves nothing."""


class EvaluationConfig(Section):
    """Responses to held-out prompts, sampled before, during and after training."""

    dataset: str | None = None
    """Held-out prompts, read like data.dataset; null: no evaluation."""
    every_iterations: NonNegativeInt = 0
    """Evaluate after every so many iterations; 0: before the first and after the last only."""
    prompts: PositiveInt = 256
    """How many prompts, from the start of the file."""
    judge: str | None = None
    """path/to/file.py:name of f(prompts, responses) -> {metric: number}, logged as eval/METRIC; null: none."""


class Recipe(Section):
    """One PPO run."""

    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """The run's name; null: that of the recipe's file."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of every random choice of the run."""
    iterations: PositiveInt = 40
    """Iterations of generation, evaluation and update."""
    output: str | None = None
    """The run's folder, which must not hold a run yet; null: runs/NAME-DATE-TIME."""
    resume: str | None = None
    """Go on with a run: its folder or one of its checkpoints; auto: this recipe's newest, or begin one; null: begin."""
    time_limit: TimeLimit | None = None
    """Stop after so long (90s, 30m, 4h, 1d) with a checkpoint to go on from; null: no limit."""
    watchdog_seconds: PositiveFloat | None = 1800.0
    """A rank that is gone, or stands still: all are gone within so many seconds, with a report; null: no watchdog."""
    self_check: bool = True
    """Prove at every start, in seconds, that machine and engine do what the run relies on (docs/doctor.md)."""
    toyworld: str | None = None
    """Folder of the embedded toy world, built there when missing; null: not used."""
    model: ModelConfig = ModelConfig()
    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    rewards: list[RewardConfig] = Field([RewardConfig(model="runs/toyworld/reward")], min_length=1)
    """Sources of scores; their weighted sum is the score."""
    scores: ScoreConfig = ScoreConfig()
    kl: KLConfig = KLConfig()
    ppo: PPOConfig = PPOConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failures: FailureConfig = FailureConfig()

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and a response that are as long as they may get."""
        return self.data.max_prompt_tokens + self.generation.max_new_tokens

    @model_validator(mode="after")
    def _sections_agree(self):
        problems = combinations.problems_of(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def datasets(self) -> list[str]:
        """Everything that prompts are read from."""
        return [self.data.dataset] + ([self.evaluation.dataset] if self.evaluation.dataset else [])

    @property
    def reference_home(self) -> str:
        """base, adapter or model, the default decided."""
        return self.reference.home or ("adapter" if self.actor.init_adapter else "base")

    @property
    def reference_path(self) -> str:
        """Where the reference's adapter or model lies."""
        return self.reference.path or {"adapter": self.actor.init_adapter}.get(self.reference_home, self.model.path)

    @property
    def critic_path(self) -> str:
        """Where a critic of its own lies."""
        return self.critic.path or self.model.path


def steps_per_iteration(recipe: Recipe) -> int:
    """Optimizer steps of one iteration: epochs times minibatches."""
    return recipe.ppo.epochs * -(-recipe.data.sequences_per_iteration // recipe.ppo.minibatch_sequences)
