"""Tiny real parts that many tests share: a Llama with random weights, rollouts without a sampler, recipes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.utils import groups
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from engine import dist, ppo, reward_sources
from engine.batch import Evaluation, Experience, Prompts, Rollout, map_rows
from engine.config import Recipe
from engine.evaluation import evaluate, score
from engine.hybrid_engine import HybridEngine
from engine.reward_sources import Texts
from engine.roles import ACTOR, CRITIC, ReferenceModel, RolesModel, ValueModel

VOCABULARY = 50


def config(**changes) -> LlamaConfig:
    """Two layers, grouped-query attention, weights large enough for the logits to differ clearly."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**{**sizes, **changes})


SWAPPED = {role: {"lora": {"rank": 520, "alpha": 1040.0}} for role in ("actor", "critic")}
"""Sections of a recipe whose roles train enough for DeepSpeed to put them on NVMe: a MiB of masters for each rank."""


def ds_config(name: str) -> str:
    """The shipped file of a ZeRO stage; for zero3 one that shards everything, or nothing so tiny would be sharded."""
    return "tests/zero3_all_sharded.json" if name == "zero3" else f"ds_configs/{name}.json"


SECOND_SHARDS = "tests/zero3_second_shards.json"


@contextmanager
def second_shards() -> Iterator[None]:
    """Inside, engines can have ZeRO++'s second shards: DeepSpeed would give them to every later engine, too."""
    try:
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).to(dtype).requires_grad_(False)


def scorer(seed: int = 6, dtype: torch.dtype = torch.float32) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=1)).to(dtype).requires_grad_(False)


def recipe(**sections) -> Recipe:
    """A recipe with some sections given as dicts; few sequences, and an Adam that is smooth around gradient 0.

    With a large epsilon an update is nearly linear in the gradient, so weights after a step compare gradients; with
    the usual one the sign of a rounding error would move a weight by a whole learning rate.
    """
    optimizer = {"learning_rate": 1e-2, "epsilon": 1e-2, "weight_decay": 0.01}
    defaults = {
        "actor": {"lora": {"rank": 4, "alpha": 8.0}, "optimizer": {**optimizer, "gradient_clipping": 0.05}},
        "critic": {"lora": {"rank": 4, "alpha": 8.0}, "optimizer": {**optimizer, "gradient_clipping": 0.5}},
        "ppo": {"minibatch_sequences": 4, "micro_batch_sequences": 2, "inference_factor": 1, "epochs": 2},
        "data": {"prompts_per_iteration": 7},
        "generation": {"max_new_tokens": 9},
        "rewards": [{"function": "tests/tiny.py:length_reward"}],
        # 0: or nothing so tiny would be cut within a phase
        "zero": {"keep_gathered_bytes": 0, "nvme_path": f"{tempfile.gettempdir()}/alternator-nvme"},
    }
    for name, section in sections.items():
        nested = isinstance(section, dict) and isinstance(defaults.get(name), dict)
        defaults[name] = _merge(defaults[name], section) if nested else section
    return Recipe.model_validate(defaults)


def _merge(old: dict, new: dict) -> dict:
    both = {k: _merge(old[k], new[k]) for k in old.keys() & new.keys() if isinstance(old[k], dict)}
    return {**old, **new, **both}


def texts(rows: int) -> Texts:
    """Texts for rewards that don't read them."""
    return Texts(("p",) * rows, ["r"] * rows, ({},) * rows)


def evaluated(engine: HybridEngine, settings: Recipe, mine: Rollout, sources=None) -> tuple[Rollout, Evaluation]:
    """Scores of this rank's rows, the gathering, inference: the rows of all ranks (a collective)."""
    sources = reward_sources.build(settings, engine, None) if sources is None else sources
    with engine.inference():
        scores = score(sources, mine, texts(len(mine)))
        rollout = map_rows(mine, dist.all_gather_rows)
        return rollout, evaluate(engine, rollout, scores, settings)


def length_reward(prompts, responses, **columns) -> list[float]:
    return [float(len(response)) for response in responses]


def roles(settings: Recipe, dtype: torch.dtype = torch.float32) -> RolesModel:
    """The tiny base with adapters and value head away from their start, so that every gradient is non-zero."""
    model = RolesModel(llama(dtype=dtype), settings)
    trained = [p for role in (ACTOR, CRITIC) for p in model.role_parameters(role).values()]
    return moved(model, [] if settings.actor.train == "full" else trained)


def value_model(settings: Recipe, dtype: torch.dtype = torch.float32) -> ValueModel:
    """A critic of its own, away from its start too."""
    model = ValueModel(scorer(dtype=dtype), settings.critic)
    return moved(model, [] if settings.critic.train == "full" else model.role_parameters(CRITIC).values())


def moved(model, parameters):
    """The model with these weights away from their start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def engine(settings: Recipe, dtype: torch.dtype = torch.float32) -> HybridEngine:
    """Every role in its home; a reference of its own is another model than the base."""
    own = value_model(settings, dtype) if settings.critic.home == "model" else None
    other = None
    if settings.reference_home == "model":
        other = ReferenceModel(llama(seed=8, dtype=dtype), settings.generation.temperature)
    return HybridEngine(roles(settings, dtype), settings, own, other)


def prompts(rows: int = 7, seed: int = 3, width: int = 8, max_new_tokens: int = 1000) -> Prompts:
    """Random prompts of 1 to `width` tokens, padded on the left with garbage."""
    generator = torch.Generator().manual_seed(seed)
    return Prompts(
        prompt_ids=torch.randint(0, VOCABULARY, (rows, width), generator=generator),
        prompt_lengths=torch.randint(1, width + 1, (rows,), generator=generator),
        draws=torch.arange(rows),
        samples=torch.zeros(rows, dtype=torch.int64),
        max_new_tokens=torch.full((rows,), max_new_tokens),
        texts=tuple(f"prompt {row}" for row in range(rows)),
        columns=({},) * rows,
    )


def rollout(rows: int = 7, seed: int = 4, width: int = 9) -> Rollout:
    """Random responses to random prompts, garbage in the padding."""
    generator = torch.Generator().manual_seed(seed)
    asked = prompts(rows, seed + 100)
    return Rollout(
        prompt_ids=asked.prompt_ids,
        prompt_lengths=asked.prompt_lengths,
        response_ids=torch.randint(0, VOCABULARY, (rows, width), generator=generator),
        response_lengths=torch.randint(1, width + 1, (rows,), generator=generator),
        ended=torch.rand(rows, generator=generator) < 0.7,
        sampler_logprobs=torch.zeros(rows, width),
        draws=asked.draws,
        samples=asked.samples,
    )


def experience(rows: int = 7, seed: int = 5) -> Experience:
    """Plausible numbers on every token: old log-probs near those of a random policy, whitened advantages."""
    sampled = rollout(rows)
    generator = torch.Generator().manual_seed(seed)
    shape, mask = sampled.response_ids.shape, sampled.response_mask

    def noise(mean: float, scale: float):
        return torch.where(mask, mean + scale * torch.randn(shape, generator=generator), 0.0)

    old_logprobs, values = noise(-4.0, 0.5), noise(0.0, 0.3)
    returns = noise(0.5, 1.0)
    evaluation = Evaluation(
        old_logprobs=old_logprobs,
        ref_logprobs=noise(-4.0, 0.5),
        kl=noise(0.0, 0.1),
        old_values=values,
        source_scores=torch.randn(rows, 1, generator=generator),
        padded_lengths=sampled.sequence_lengths,
    )
    advantages = ppo.masked_whiten(returns - values, mask)
    return Experience(sampled, evaluation, evaluation.source_scores[:, 0], returns, advantages, returns)
