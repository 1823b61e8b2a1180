"""Which combinations of a search can run, and fit by plan."""

from __future__ import annotations

from functools import cache

from pydantic import ValidationError

from engine import combinations, planner
from engine.checks import check_files
from engine.config import Recipe
from engine.ds_checks import machine_problems, stage_of
from engine.errors import RecipeError, problems_of
from engine.plan_report import most
from engine.tuning_space import Point, Space, changed


def candidates(space: Space, ranks: int, on_cuda: bool, device_memory: int) -> dict[Point, int]:
    """The bytes that a rank should need at most, by combination that fits.

    Args:
        device_memory: bytes of one device; what plans more is left out.

    Raises:
        RecipeError: a value goes with none of the others, and why; or nothing fits.
    """
    files = cache(lambda recipe_text: tuple(problems_of(check_files, Recipe.model_validate_json(recipe_text))))
    possible: dict[Point, int] = {}
    why: dict[tuple[int, int], str] = {}
    for point in space.points():
        try:
            recipe, raw = changed(space.recipe, space.settings(point))
            problems = combinations.problems_at_stage(recipe, stage_of(raw))
            problems += machine_problems(raw, on_cuda) + list(files(_of_models(recipe).model_dump_json()))
            if problems:
                raise RecipeError(*problems)
            possible[point] = most(planner.phases(recipe, raw, ranks, on_cuda, device_memory), "device")
        except ValueError as error:  # they contradict each other, or what is there
            for value in enumerate(point):
                why.setdefault(value, _said(error))
    useless = [
        f"{axis.key} {value!r} goes with no other value of the search: {why.get((position, index), 'it has no use')}"
        for position, axis in enumerate(space.axes)
        for index, value in enumerate(axis.values)
        if not any(point[position] == index for point in possible)
    ]
    if useless:
        raise RecipeError(*(useless if possible else [next(iter(why.values()))]))
    fitting = {point: size for point, size in possible.items() if size <= device_memory}
    if not fitting:
        raise RecipeError(
            f"no combination of these values fits {device_memory / 1e9:.1f} GB for each rank, the least that is "
            f"planned is {min(possible.values()) / 1e9:.1f} GB; see what launch/plan.py says, or take more devices"
        )
    return fitting


def _said(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in error.errors())
    return str(error)


def _of_models(recipe: Recipe) -> Recipe:
    """The recipe with what decides whether its models can run so, and nothing that speaks of sizes."""
    generation = recipe.generation.model_copy(update={"max_concurrent_sequences": 1})
    tokens = recipe.longest_sequence if recipe.ppo.packing else None
    ppo = recipe.ppo.model_copy(update={"tokens_per_micro_batch": tokens, "micro_batch_sequences": 1})
    return recipe.model_copy(update={"generation": generation, "ppo": ppo, "output": None, "resume": None})
