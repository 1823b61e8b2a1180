"""What a search for the fastest setting may change: axes of values that leave a run's result as it is.

Each axis acts on some phases of an iteration alone, so that one trial can say something of several axes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from engine.command_line import read_yaml, recipe_text
from engine.config import Recipe
from engine.ds_checks import QUANTIZED, check_ds_config, stage_of
from engine.ds_config import read_ds_config
from engine.errors import RecipeError
from engine.fitting import SMALLER

GENERATION, INFERENCE, TRAINING = PHASES = ("generation", "inference", "training")
PHASES_OF = {
    "zero.ds_config": PHASES,
    "zero.frozen_ds_config": (INFERENCE, TRAINING),
    "zero.keep_gathered_bytes": PHASES,
    "zero.activation_checkpointing": (TRAINING,),
    "zero.offload_activations": (TRAINING,),
    "reference.offload_param": (INFERENCE, TRAINING),
    "rewards.offload_param": (INFERENCE,),
    "generation.max_concurrent_sequences": (GENERATION,),
    "generation.continuous_batching": (GENERATION,),
    "generation.gather_budget_bytes": (GENERATION,),
    "generation.compile": (GENERATION,),
    "ppo.micro_batch_sequences": (INFERENCE, TRAINING),
    "ppo.tokens_per_micro_batch": (INFERENCE, TRAINING),
    "ppo.packing": (INFERENCE, TRAINING),
    "ppo.inference_factor": (INFERENCE,),
}
"""The recipe's settings that change speed and memory, never the result, and the phases whose time depends on each."""
DS_SECTION = "zero_optimization."
"""Keys of the DeepSpeed configuration begin so; they act on every phase."""
KNOBS = (
    *("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients", "reduce_scatter"),
    *("round_robin_gradients", "zero_hpz_partition_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters"),
    *("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
    *QUANTIZED,
)
"""Those that may be turned. Quantized traffic rounds what travels: it is tried where somebody names it."""
REWARDS = "rewards.offload_param"
"""Of every reward that has a model."""
SLOWER = {
    "zero.activation_checkpointing": [False, True],
    "zero.offload_activations": [False, True],
    "reference.offload_param": ["none", "cpu"],
    REWARDS: ["none", "cpu"],
    "zero.keep_gathered_bytes": ["auto", 0],
    "generation.gather_budget_bytes": ["auto", 0],
}
"""Each value spares memory and costs time against the one before it."""
SLOWER_ON_CUDA = {"zero.ds_config": SMALLER}
"""On a CPU DeepSpeed's offloaded optimizer is another one, not a farther one."""
MOST_COMBINATIONS = 20_000
SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Axis:
    """A key of the recipe or of its DeepSpeed configuration, and the values to try, the recipe's own among them."""

    key: str
    values: tuple

    @property
    def phases(self) -> tuple[str, ...]:
        return PHASES if self.key.startswith(DS_SECTION) else PHASES_OF[self.key]


Point = tuple[int, ...]
"""A combination: of each axis the index of a value."""


@dataclass(frozen=True)
class Space:
    """All combinations of some axes around a recipe."""

    recipe: Recipe
    axes: tuple[Axis, ...]

    def __post_init__(self):
        if self.size > MOST_COMBINATIONS and len([*islice(self.points(), MOST_COMBINATIONS + 1)]) > MOST_COMBINATIONS:
            raise RecipeError(
                f"a search takes at most {MOST_COMBINATIONS} combinations, got more; name fewer values with --axes"
            )

    @property
    def size(self) -> int:
        return math.prod(len(axis.values) for axis in self.axes)

    @cached_property  # files are read for it
    def own(self) -> Point:
        """The recipe as it is."""
        return tuple(axis.values.index(value_of(self.recipe, axis.key)) for axis in self.axes)

    def settings(self, point: Point) -> dict[str, object]:
        return {axis.key: axis.values[index] for axis, index in zip(self.axes, point, strict=True)}

    def points(self) -> Iterator[Point]:
        """Each combination once: knobs of ZeRO-3 have one value where the stage has no use for them."""
        for point in itertools.product(*(range(len(axis.values)) for axis in self.axes)):
            stage = self._stages[self.settings(point).get("zero.ds_config", self.recipe.zero.ds_config)]
            beside = zip(self.axes, point, self.own, strict=True)
            if all(index == own for axis, index, own in beside if _without_use(axis.key, stage)):
                yield point

    @cached_property
    def _stages(self) -> dict[str, int]:
        files = next((axis.values for axis in self.axes if axis.key == "zero.ds_config"), ())
        return {file: stage_of(read_ds_config(file)) for file in (*files, self.recipe.zero.ds_config)}


def value_of(recipe: Recipe, key: str):
    """What the recipe, or its DeepSpeed configuration, has at a key."""
    if key.startswith(DS_SECTION):
        section = read_ds_config(recipe.zero.ds_config).get("zero_optimization", {})
        return section.get(key.removeprefix(DS_SECTION), "auto")
    if key == REWARDS:
        places = {reward.offload_param for reward in recipe.rewards if reward.model}
        return places.pop() if len(places) == 1 else None
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _without_use(key: str, stage: int) -> bool:
    if key in ("zero.keep_gathered_bytes", "generation.gather_budget_bytes") or "stage3_" in key:
        return stage != 3
    return key.startswith(DS_SECTION) and stage == 0


def changed(recipe: Recipe, settings: dict[str, object]) -> tuple[Recipe, dict]:
    """The recipe with other settings, and its DeepSpeed configuration, as it would be read.

    Raises:
        ValueError: the recipe can't have them (pydantic's, or RecipeError).
    """
    values, inner = recipe.model_dump(), {}
    for key, value in settings.items():
        if key.startswith(DS_SECTION):
            inner[key.removeprefix(DS_SECTION)] = value
        elif key == REWARDS:
            for reward in values["rewards"]:
                reward["offload_param"] = value if reward["model"] else "none"
        else:
            section, name = key.split(".")
            values[section][name] = value
    other = Recipe.model_validate(values)
    raw = read_ds_config(other.zero.ds_config)
    section = raw.get("zero_optimization", {})
    used = {name: value for name, value in inner.items() if value != section.get(name, "auto")}
    if used:
        raw = raw | {"zero_optimization": section | used}
    if problems := check_ds_config(raw):
        raise RecipeError(*problems)
    return other, raw


def write_files(recipe: Recipe, raw: dict, folder: Path) -> None:
    """A setting as it is run: `ds_config.json`, and `recipe.yaml` that names it."""
    file = folder / "ds_config.json"
    file.write_text(json.dumps(raw, indent=2) + "\n")
    zero = recipe.zero.model_copy(update={"ds_config": str(file)})
    (folder / "recipe.yaml").write_text(recipe_text(recipe.model_copy(update={"zero": zero})))


def needless(space: Space, fitting: Iterable[Point], on_cuda: bool) -> dict[Point, set[Point]]:
    """For those that differ from others that fit in sparing memory, and in nothing else, these others."""
    fitting = set(fitting)
    orders = SLOWER | (SLOWER_ON_CUDA if on_cuda else {})
    found: dict[Point, set[Point]] = {}
    for position, axis in enumerate(space.axes):
        order = orders.get(axis.key, [])
        for point in fitting:
            value = axis.values[point[position]]
            faster = order[: order.index(value)] if value in order else []
            others = (axis.values.index(one) for one in faster if one in axis.values)
            if twins := {(*point[:position], index, *point[position + 1 :]) for index in others} & fitting:
                found.setdefault(point, set()).update(twins)
    return found


def default_axes(recipe: Recipe, ranks: int, on_cuda: bool) -> tuple[Axis, ...]:
    """What is worth trying for most recipes."""
    sequences = math.ceil(recipe.data.sequences_per_iteration / ranks)
    rows = math.ceil(recipe.ppo.minibatch_sequences / ranks)
    files = ["ds_configs/zero0.json", "ds_configs/zero1.json", "ds_configs/zero2.json", *SMALLER[: 3 if on_cuda else 1]]
    wanted: dict[str, list] = {
        "zero.ds_config": files,
        DS_SECTION + "reduce_bucket_size": ["auto", 2_000_000],
        DS_SECTION + "stage3_prefetch_bucket_size": ["auto", 0],
        DS_SECTION + "stage3_param_persistence_threshold": ["auto", 1_000_000],
        "generation.max_concurrent_sequences": [sequences, math.ceil(sequences / 2), math.ceil(sequences / 4)],
        "ppo.tokens_per_micro_batch": [recipe.longest_sequence * rows // part for part in (1, 2, 4) if rows >= part],
        "ppo.packing": [False, True],
        "zero.activation_checkpointing": [False, True],
    }
    if recipe.reference_home == "model":
        wanted["reference.offload_param"] = ["none", "cpu"]
    if value_of(recipe, REWARDS) is not None:
        wanted[REWARDS] = ["none", "cpu"]
    if not on_cuda:  # what only spares a device's memory
        wanted = {key: values for key, values in wanted.items() if not key.endswith("offload_param")}
    return axes_of(recipe, wanted)


def axes_of(recipe: Recipe, wanted: dict[str, list]) -> tuple[Axis, ...]:
    """Axes with the recipe's own value first, each value once; what leaves no choice is left out."""
    found = []
    for key, values in wanted.items():
        different = [value_of(recipe, key)]
        for value in values:
            different += [value] * (value not in different)
        if len(different) > 1:
            found.append(Axis(key, tuple(different)))
    return tuple(found)


def read_axes(recipe: Recipe, path: Path) -> tuple[Axis, ...]:
    """Axes of a YAML file: key of the recipe, or of the ds_config's zero_optimization -> list of values.

    Raises:
        RecipeError: all that is wrong with it.
    """
    wanted = read_yaml(path)
    problems = [f"{path}: {said}" for key, values in wanted.items() for said in _problems_of_axis(recipe, key, values)]
    if not wanted:
        problems.append(f"{path}: takes keys and lists of values, got nothing; see docs/tuning.md")
    if problems:
        raise RecipeError(*problems)
    axes = axes_of(recipe, wanted)
    if not axes:
        raise RecipeError(f"{path}: leaves no choice, every value is the recipe's own; name others")
    return axes


def _problems_of_axis(recipe: Recipe, key: str, values) -> Iterator[str]:
    knobs = [DS_SECTION + knob for knob in KNOBS]
    if key not in PHASES_OF and key not in knobs:
        yield (
            f"{key} is not among the settings that leave the result as it is; name some of {', '.join(PHASES_OF)}, or "
            f"{DS_SECTION}KEY with one of {', '.join(KNOBS)}"
        )
    elif not isinstance(values, list) or not values or not all(isinstance(one, SCALARS) for one in values):
        yield f"{key} takes a list of values to try, got {values!r}; write [one, another]"
    elif key.endswith("ds_config") and not all(isinstance(one, str) for one in values):
        yield f"{key} takes names of files, got {values!r}; write some as those of ds_configs/"
    elif key == REWARDS and value_of(recipe, key) is None:
        yield f"{key} is for rewards that have models, all in one place, got others; leave it out"
