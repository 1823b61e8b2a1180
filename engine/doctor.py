"""All self-checks on this machine with this recipe, as a run would start, without the run."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial

import torch

from engine import dist, environment_checks, preparation, self_checks, toyworld, zero
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
    looked_at = preparation.before_start(recipe)
    zero.start()
    if recipe.toyworld:
        toyworld.prepare(recipe.toyworld)
        preparation.together(partial(check_files, recipe))
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
