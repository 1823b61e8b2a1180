"""The folder of a run: made once, never overwritten, written by rank 0."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TextIO

from engine import dist
from engine.command_line import recipe_text
from engine.config import Recipe
from engine.heldout import Look
from engine.metrics import append_jsonl, read_jsonl
from engine.preparation import writes_for_its_node
from engine.resume import Resumed, rewind

SAMPLES_PER_LOOK = 8


def _write_what_runs(path: Path, recipe: Recipe, ds_config: dict, resumed: Resumed | None) -> None:
    """`recipe.yaml` and `ds_config.json`; where a run goes on with others, those with its iteration in their names."""
    texts = {"recipe.yaml": recipe_text(recipe), "ds_config.json": json.dumps(ds_config, indent=2) + "\n"}
    for name, text in texts.items():
        file = path / name
        if resumed is not None and file.exists():
            if file.read_text(encoding="utf-8") == text:
                continue
            file = file.with_stem(f"{file.stem}-from-{max(0, resumed.iteration):06d}")
            file.unlink(missing_ok=True)  # of an attempt from the same checkpoint
        # "x": of two runs that start together one wins.
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)


@dataclass(frozen=True)
class RunFolder:
    """`runs/NAME/` with the recipe and DeepSpeed configuration as they ran."""

    path: Path

    writes: bool = True
    """This rank sees to the folder's checkpoints: rank 0, and a rank of each node with a disk of its own."""
    lock: TextIO | None = None
    """Held open by rank 0 as long as it lives."""

    @classmethod
    def claim(cls, recipe: Recipe, ds_config: dict, resumed: Resumed | None = None) -> RunFolder:
        """Make the folder, or take up that of a run that goes on, and write what runs (rank 0); agree on its name.

        Raises:
            RunError: it can't be written, or another process runs in it.
        """
        path = recipe.output or f"runs/{recipe.name or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
        path = Path(dist.broadcast_object(str(resumed.run if resumed else path)))
        problem = lock = None
        if dist.rank() == 0:
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = (path / ".lock").open("w")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
                _write_what_runs(path, recipe, ds_config, resumed)
                if resumed is not None and resumed.iteration < recipe.iterations:
                    rewind(resumed)
            except BlockingIOError:
                problem = f"output: another process runs in {path}; wait for its end, or give another folder"
            except FileExistsError:
                problem = f"output: {path} already holds a run; give another folder with --output"
            except OSError as error:
                problem = f"output: can't write {path} ({error.strerror}); give another folder with --output"
        dist.agree(problem)
        return cls(path, writes_for_its_node(path), lock)

    def write_json(self, name: str, value: dict) -> None:
        """Write one indented JSON file."""
        (self.path / name).write_text(json.dumps(value, indent=2) + "\n")

    def first_look(self) -> Look | None:
        """What a look at the held-out prompts before training left in the files; None: nothing, or not rank 0."""
        return self._look(0)

    def last_look(self) -> Look | None:
        """The same of the newest."""
        return self._look(-1)

    def _look(self, index: int) -> Look | None:
        file = self.path / "evaluation.jsonl"
        if dist.rank() != 0 or not file.exists() or not (looks := read_jsonl(file)):
            return None
        metrics = dict(looks[index])
        iteration = metrics.pop("iteration")
        rows = read_jsonl(self.path / "samples.jsonl")
        rows = [row for row in rows if row["kind"] == "heldout" and row["iteration"] == iteration]
        return Look(metrics, *([row[key] for row in rows] for key in ("prompt", "response", "score")))

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
