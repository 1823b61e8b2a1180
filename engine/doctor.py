"""All self-checks on this machine with this recipe, as a run would start, without the run."""

from __future__ import annotations

import shutil
import tempfile

import torch

from engine import dist, environment_checks, self_checks, toyworld, zero
from engine.checks import check_files
from engine.config import Recipe
from engine.findings import Finding
from engine.trainer import Trainer


def examine(recipe: Recipe) -> list[Finding]:
    """The findings of all ranks, those that failed among them; on more rows than at a start (a collective).

    Where ranks don't run the same thing, the engine is not looked at: they would wait for each other.

    Raises:
        RecipeError: the recipe can't be run, or the ranks can't meet.
    """
    check_files(recipe, built=not recipe.toyworld)
    looked_at = environment_checks.before_start()
    zero.start()
    if recipe.toyworld:
        toyworld.prepare(recipe.toyworld)
        check_files(recipe)
    found = environment_checks.examine(recipe, looked_at)
    if any(one.problem for one in found if one.name.startswith("same ")):
        return found
    torch.manual_seed(recipe.seed)
    scratch = dist.broadcast_object(tempfile.mkdtemp(prefix="doctor-") if dist.rank() == 0 else None)
    try:
        # In a folder of its own, but looking at the disk that the run will write to.
        changes = {"self_check": False, "output": scratch, "resume": None}
        trainer = Trainer(recipe.model_copy(update=changes))
        try:
            return found + trainer.self_check(self_checks.WHOLE, environment_checks.folder_of(recipe))
        finally:
            trainer.close()
    finally:
        dist.barrier()
        if dist.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
