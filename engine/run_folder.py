"""The folder of a run: made once, never overwritten, written by rank 0."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from engine import dist
from engine.command_line import recipe_text
from engine.config import Recipe
from engine.metrics import append_jsonl

SAMPLES_PER_LOOK = 8


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/` with the recipe and DeepSpeed configuration as they ran."""

    path: Path

    @classmethod
    def claim(cls, recipe: Recipe, ds_config: dict) -> RunFolder:
        """Make the folder and write what runs (rank 0), agree on its name (all ranks).

        Raises:
            RunError: it can't be written, or another run took it since the recipe was checked.
        """
        path = recipe.output or f"runs/{recipe.name or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = cls(Path(dist.broadcast_object(path)))
        problem = None
        if dist.rank() == 0:
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                # "x": of two runs that start together one wins.
                with (folder.path / "recipe.yaml").open("x", encoding="utf-8") as file:
                    file.write(recipe_text(recipe))
                folder.write_json("ds_config.json", ds_config)
            except FileExistsError:
                problem = f"output: {folder.path} already holds a run; give another folder with --output"
            except OSError as error:
                problem = f"output: can't write {folder.path} ({error.strerror}); give another folder with --output"
        dist.agree(problem)
        return folder

    def write_json(self, name: str, value: dict) -> None:
        """Write one indented JSON file."""
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n")

    def add_samples(self, iteration: int, kind: str, rows: Iterable[tuple[str, str, float]]) -> None:
        """Append the first few (prompt, response, score) of a phase to samples.jsonl."""
        names = ("prompt", "response", "score")
        append_jsonl(
            self.path / "samples.jsonl",
            [
                {"iteration": iteration, "kind": kind, **dict(zip(names, row, strict=True))}
                for row in islice(rows, SAMPLES_PER_LOOK)
            ],
        )
