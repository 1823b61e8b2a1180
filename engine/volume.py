"""What an iteration moves between ranks and how long it takes, predicted from configs and from rates that are given.

Bytes are counted as `engine/traffic.py` counts what really moves: those that reach a rank, (n - 1) / n of a gathered or
reduced whole on n ranks. Weights and gradients are in it; the rows and counts that ranks exchange beside them are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import AutoConfig

from engine import flops, planner, shapes
from engine.config import Recipe, steps_per_iteration
from engine.ds_checks import stage_of
from engine.shapes import Home


@dataclass(frozen=True)
class Moved:
    """Bytes that reach a rank in a phase."""

    gathered: float = 0.0
    reduced: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Of one device: what it reaches in practice, not what is printed on it."""

    flops_per_second: float
    network_bytes_per_second: float
    memory_bytes_per_second: float


def of_iteration(
    recipe: Recipe, raw: dict, ranks: int, on_cuda: bool, device_memory: int | None = None
) -> dict[str, Moved]:
    """By phase, with sequences as long as they may get, once DeepSpeed knows what each kind of forward needs next.

    Args:
        raw, ranks, on_cuda, device_memory: as for `planner.phases`.
    """
    homes, share, stage = shapes.homes(recipe), (ranks - 1) / ranks, stage_of(raw)
    room = planner.room_between_phases(homes, recipe, raw, ranks, on_cuda, device_memory)
    without_gradients, of_step = forwards(recipe, ranks)
    inference = training = reduced = 0.0
    for home in homes:
        kept, rest = planner.kept_and_rest(home, recipe, raw, ranks, on_cuda, room)
        passes = _passes(home, recipe)
        inference += planner.whole_bytes(kept) + without_gradients * _fetched(rest, raw, passes)
        if home.frozen_engine:
            continue
        trained = planner.whole_bytes(w for w in home.weights if w.trains)
        if stage:
            # Behind a step weights are put together again: those that train or, at stage 3, all that are always whole.
            of_all = planner.whole_bytes(home.weights) - planner.whole_bytes([*kept, *rest])
            once = planner.whole_bytes(kept) + (of_all if stage == 3 else trained)
            training += once + of_step * _fetched(rest, raw, _passes(home, recipe, backward=True))
        # An all-reduce passes twice; stages 0 and 1 make one for all that a step has added up, 2 one in each backward.
        reduced += trained * {2: 2 * of_step, 3: of_step}.get(stage, 2)
    steps = steps_per_iteration(recipe)
    return {
        "generation": Moved(share * _generation(homes[0], recipe, raw, ranks, on_cuda, room)),
        "inference": Moved(share * inference),
        "training": Moved(share * steps * training, share * steps * reduced),
    }


def seconds(recipe: Recipe, moved: dict[str, Moved], ranks: int, rates: Rates) -> dict[str, tuple[float, float]]:
    """By phase, what computing takes and what the network takes; the first has to wait for much of the second.

    Useful FLOPs alone (`engine/flops.py`), one forward more where activations are checkpointed. A decoding step reads
    all of the actor's weights: the memory's speed bounds it where few sequences decode at once.

    Raises:
        AttributeError: a model's config lacks what a Llama-like decoder has.
    """
    lengths = [(recipe.data.max_prompt_tokens, recipe.generation.max_new_tokens)] * recipe.data.sequences_per_iteration
    policy = flops.Decoder.of(AutoConfig.from_pretrained(recipe.model.path))
    rewards = [flops.Decoder.of(AutoConfig.from_pretrained(r.model)) if r.model else None for r in recipe.rewards]
    parts = flops.phases(recipe, policy, rewards, lengths)
    computing = {phase: sum(of.values()) / ranks / rates.flops_per_second for phase, of in parts.items()}
    if recipe.zero.activation_checkpointing:
        again = sum(count for name, count in parts["training"].items() if name.endswith("forward"))
        computing["training"] += again / ranks / rates.flops_per_second
    actor = planner.whole_bytes(w for w in shapes.homes(recipe)[0].weights if w.role in (shapes.BASE, shapes.ACTOR))
    reading = decoding_steps(recipe, ranks) * actor / rates.memory_bytes_per_second
    computing["generation"] = max(computing["generation"], reading)
    return {
        phase: (computing[phase], (of.gathered + of.reduced) / rates.network_bytes_per_second)
        for phase, of in moved.items()
    }


def forwards(recipe: Recipe, ranks: int) -> tuple[int, int]:
    """Of a rank: those of an iteration without gradients, and those of one optimizer step."""
    sequences, counts = recipe.data.sequences_per_iteration, []
    for rows, ppo in ((sequences, recipe.ppo.for_inference), (recipe.ppo.minibatch_sequences, recipe.ppo)):
        budget = ppo.tokens_per_micro_batch
        most = ppo.micro_batch_sequences if budget is None else max(1, budget // recipe.longest_sequence)
        counts.append(math.ceil(math.ceil(rows / ranks) / most))
    return counts[0], counts[1]


def decoding_steps(recipe: Recipe, ranks: int) -> int:
    """Forwards of a rank in generation, each slot used again as often as there are sequences for it."""
    own = math.ceil(recipe.data.sequences_per_iteration / ranks)
    return math.ceil(own / recipe.generation.max_concurrent_sequences) * recipe.generation.max_new_tokens


def _generation(home: Home, recipe: Recipe, raw: dict, ranks: int, on_cuda: bool, room: int | None) -> float:
    """Bytes of the weights that are gathered for decoding, some of them in every step."""
    config = planner.resolve(home, recipe, raw, ranks, on_cuda)
    if config["zero_optimization"]["stage"] != 3:
        return 0.0
    copy, _ = planner.copy_bytes(home, recipe, config)
    stays = planner.resident_bytes(home, recipe, config, room) / max(1, copy)
    kept, rest = planner.kept_and_rest(home, recipe, raw, ranks, on_cuda, room)
    whole = planner.whole_bytes(w for w in (*kept, *rest) if w.role in (shapes.BASE, shapes.ACTOR))
    return whole * (stays + (1 - stays) * decoding_steps(recipe, ranks))


def _passes(home: Home, recipe: Recipe, backward: bool = False) -> int:
    """How often a micro-batch goes through a home's layers."""
    if home.name != shapes.SHARED:
        return 2 if backward else 1
    apart, full_kl = recipe.reference_home == "model", recipe.kl.estimator == "full"
    critic, trunk = recipe.critic.home == "adapter", recipe.critic.home == "trunk"
    if backward:
        return 2 * (1 + critic) + (not apart and full_kl and recipe.kl.placement == "loss")
    return (not apart) + (recipe.ppo.old_logprobs == "recompute" or trunk) + critic


def _fetched(rest: list[shapes.Weight], raw: dict, passes: int) -> int:
    """Bytes that a micro-batch gathers of weights that aren't kept: once, where they come again soon enough."""
    zero = raw.get("zero_optimization", {})
    distance = planner.stage_3_value(zero, "max_reuse_distance", planner.DEFAULT_LIMIT)
    once = 2 * sum(w.elements for w in rest) <= distance
    return planner.whole_bytes(rest) * min(passes, 1 if once else passes)
