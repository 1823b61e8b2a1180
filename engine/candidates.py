"""Which combinations of a search are worth a trial: those that can run, fit by plan, and aren't needlessly frugal."""

from __future__ import annotations

from functools import cache

from engine import combinations, planner
from engine.checks import check_files
from engine.config import Recipe
from engine.ds_checks import machine_problems
from engine.errors import RecipeError, problems_of
from engine.plan_report import most
from engine.tuning_space import Point, Space, changed, needless


def candidates(
    space: Space, ranks: int, on_cuda: bool, device_memory: int, needless_too: bool = False
) -> dict[Point, int]:
    """The bytes that a rank should need at most, by combination.

    Args:
        device_memory: bytes of one device; what plans more is left out.
        needless_too: keep what spares memory that there is.

    Raises:
        RecipeError: the recipe itself can't run, a value goes with none of the others, or nothing fits.
    """
    runs = cache(lambda recipe_text: not problems_of(check_files, Recipe.model_validate_json(recipe_text)))
    possible: dict[Point, int] = {}
    for point in space.points():
        try:
            recipe, raw = changed(space.recipe, space.settings(point))
        except ValueError:  # they contradict each other
            continue
        stage = raw.get("zero_optimization", {}).get("stage", 0)
        if combinations.problems_at_stage(recipe, stage) or machine_problems(raw, on_cuda):
            continue
        if not runs(_of_models(recipe).model_dump_json()):
            continue
        possible[point] = most(planner.phases(recipe, raw, ranks, on_cuda, device_memory), "device")
    _refuse_useless_values(space, possible)
    fitting = {point: size for point, size in possible.items() if size <= device_memory}
    if not fitting:
        least = f"; the least that is planned is {min(possible.values()) / 1e9:.1f} GB" if possible else ""
        raise RecipeError(
            f"no combination of these values fits {device_memory / 1e9:.1f} GB for each rank{least}; see what "
            "launch/plan.py says, or take more devices"
        )
    left_out = set() if needless_too else needless(space, fitting, on_cuda)
    return {point: size for point, size in fitting.items() if point not in left_out}


def _of_models(recipe: Recipe) -> Recipe:
    """The recipe with what decides whether its models can run so, and nothing that speaks of sizes."""
    generation = recipe.generation.model_copy(update={"max_concurrent_sequences": 1})
    tokens = recipe.longest_sequence if recipe.ppo.packing else None
    ppo = recipe.ppo.model_copy(update={"tokens_per_micro_batch": tokens, "micro_batch_sequences": 1})
    return recipe.model_copy(update={"generation": generation, "ppo": ppo, "output": None, "resume": None})


def _refuse_useless_values(space: Space, possible: dict[Point, int]) -> None:
    useless = [
        f"{axis.key} {value!r} goes with no other value of the search; leave it out"
        for position, axis in enumerate(space.axes)
        for index, value in enumerate(axis.values)
        if possible and not any(point[position] == index for point in possible)
    ]
    if useless:
        raise RecipeError(*useless)
