"""One trial of a search, seen from its ranks: iterations of the real trainer on the real recipe, nothing kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from engine import benchmark, dist, machine, preparation, toyworld, zero
from engine.checks import check_files
from engine.config import Recipe
from engine.trainer import Trainer


def run(recipe: Recipe, record: Path) -> None:
    """Measure a recipe's iterations; rank 0 writes `record`.

    Raises:
        RecipeError: the recipe can't be run.
    """
    preparation.before_start(recipe, examine=False)
    zero.start()
    if recipe.toyworld:
        toyworld.prepare(recipe.toyworld)
        preparation.together(partial(check_files, recipe))
    torch.manual_seed(recipe.seed)
    trainer = Trainer(recipe)
    try:
        found = {
            "machine": machine.describe(trainer.engine.device),
            "ranks": dist.world_size(),
            "iterations": [benchmark.measure(trainer, iteration) for iteration in range(recipe.iterations)],
        }
    finally:
        trainer.close()
    if dist.rank() == 0:
        record.write_text(json.dumps(found, indent=2) + "\n")
