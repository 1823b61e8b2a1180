"""The nearest change of a recipe that makes its plan fit: what costs least speed is tried first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, chain, takewhile

from pydantic import ValidationError

from engine import combinations, planner
from engine.config import Recipe
from engine.ds_checks import stage_of
from engine.ds_config import read_ds_config
from engine.errors import RecipeError
from engine.plan_report import most
from engine.planner import Bytes

Settings = dict[str, object]
"""Keys of the recipe with dots, and what to set them to."""
MOST_DEVICES, FEWEST_SEQUENCES = 65536, 8
SMALLER = ["ds_configs/zero3.json", "ds_configs/zero3_cpu_optimizer.json", "ds_configs/zero3_cpu_offload.json"]
"""DeepSpeed configurations, each of which keeps less on the device than the one before."""


@dataclass(frozen=True)
class Job:
    """A recipe and what it is planned for: bytes that a rank may have on its device, in host memory and on a disk.

    None: nobody said.
    """

    recipe: Recipe
    ranks: int
    on_cuda: bool
    device_memory: int | None
    host_memory: int | None = None
    disk: int | None = None

    def phases(self) -> dict[str, dict[str, Bytes]]:
        """What `planner.phases` says of it.

        Raises:
            RecipeError: the recipe contradicts itself, or what it names can't be read.
        """
        raw = read_ds_config(self.recipe.zero.ds_config)
        problems = combinations.problems_at_stage(self.recipe, stage_of(raw))
        if problems:
            raise RecipeError(*problems)
        return planner.phases(self.recipe, raw, self.ranks, self.on_cuda, self.device_memory)

    def over(self, found: dict[str, dict[str, Bytes]]) -> dict[str, tuple[int, int]]:
        """Of device, host and disk those of which a plan needs more than there is: bytes needed, bytes there."""
        room = {"device": self.device_memory, "host": self.host_memory, "disk": self.disk}
        needed = {place: (most(found, place), size) for place, size in room.items() if size is not None}
        return {place: both for place, both in needed.items() if both[0] > both[1]}

    def fits(self) -> bool:
        try:
            return not self.over(self.phases())
        except RecipeError:  # the change contradicts something else in the recipe
            return False

    def changed(self, settings: Settings) -> Job | None:
        """With other settings; None: they contradict the rest."""
        values = self.recipe.model_dump()
        for key, value in settings.items():
            *sections, name = key.split(".")
            inner = values
            for section in sections:
                inner = inner[section]
            inner[name] = value
        try:
            return replace(self, recipe=Recipe.model_validate(values))
        except ValidationError:
            return None


def nearest(job: Job) -> Settings:
    """What to set to what, as little as can be; nothing, where nothing that is known is enough.

    A single change that is enough is preferred. Else each kind's farthest is added until the job fits, and what is not
    needed is taken back.
    """
    kinds = [list(kind) for kind in _kinds(job.recipe)]
    used = job.recipe.zero.ds_config
    larger = SMALLER[: SMALLER.index(used)] if used in SMALLER else []  # where it is the host that has too little
    for settings in (*chain.from_iterable(kinds), *({"zero.ds_config": file} for file in reversed(larger))):
        if _fits(job, settings):
            return settings
    farthest = [kind[-1] for kind in kinds if kind]
    for together in accumulate(farthest, lambda one, other: one | other):
        if _fits(job, together):
            for key in list(together):
                fewer = {name: value for name, value in together.items() if name != key}
                together = fewer if _fits(job, fewer) else together
            return together
    return {}


def devices(job: Job) -> int | None:
    """The least number of devices, doubled from the job's, on which it fits as it is."""
    for ranks in takewhile(lambda ranks: ranks <= MOST_DEVICES, (job.ranks * 2**power for power in range(1, 17))):
        if replace(job, ranks=ranks).fits():
            return ranks
    return None


def _fits(job: Job, settings: Settings) -> bool:
    other = job.changed(settings)
    return other is not None and other.fits()


def _kinds(recipe: Recipe) -> Iterator[Iterator[Settings]]:
    """Kinds of changes, what costs least speed first, and of each kind ever more of it."""
    ppo, generation = recipe.ppo, recipe.generation
    yield iter([{"zero.activation_checkpointing": True}] * (not recipe.zero.activation_checkpointing))
    if ppo.tokens_per_micro_batch is None:
        yield ({"ppo.micro_batch_sequences": size} for size in _halves(ppo.micro_batch_sequences, 1))
    else:
        sizes = _halves(ppo.tokens_per_micro_batch, recipe.longest_sequence)
        yield ({"ppo.tokens_per_micro_batch": size} for size in sizes)
    yield (
        {"generation.max_concurrent_sequences": size}
        for size in _halves(generation.max_concurrent_sequences, FEWEST_SEQUENCES)
    )
    yield iter([{"reference.offload_param": "cpu"}] * (recipe.reference_home == "model"))
    if any(reward.model for reward in recipe.rewards):
        rewards = [reward.model_dump() for reward in recipe.rewards]
        yield iter([{"rewards": [r | {"offload_param": "cpu"} if r["model"] else r for r in rewards]}])
    used = recipe.zero.ds_config
    yield ({"zero.ds_config": file} for file in SMALLER[SMALLER.index(used) + 1 if used in SMALLER else 0 :])
    yield iter([{"model.quantization": "nf4"}] * (recipe.model.quantization == "none" and recipe.actor.train == "lora"))


def _halves(size: int, least: int) -> Iterator[int]:
    while size // 2 >= least:
        size //= 2
        yield size
