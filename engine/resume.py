"""Where `--resume` goes on from: which run, which of its checkpoints, and whether this recipe may go on with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from engine import checkpoint_store, dist
from engine.checkpoint import FOLDER, VERSION, has_moved
from engine.config import Recipe
from engine.errors import RecipeError
from engine.identity import IN_NO_IDENTITY, changed_identity, changed_settings, identity_of

logger = dist.get_logger(__name__)

AUTO = "auto"
UNSAID = ("resume", "output", "name", "time_limit", "watchdog_seconds")
"""Settings of how a run is started, which nobody is told about."""
CUT_FILES = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")
"""Files of lines with an `iteration`; those beyond the checkpoint's are written again."""


@dataclass(frozen=True)
class Resumed:
    """A run that goes on."""

    run: Path
    checkpoint: Path | None
    """As rank `source` sees it; None: it was stopped before its first one, and begins again in its folder."""
    source: int = 0
    iteration: int = -1
    """Complete ones; -1 before the first look."""
    same_course: bool = False
    """Nothing has changed that an iteration could feel: one that has begun goes on where it was."""


def find(recipe: Recipe) -> Resumed | None:
    """What the recipe goes on from; None: it is a new run. Every rank calls it and gets the same.

    With disks of their own, the nodes may hold different checkpoints: the newest whole one of any rank counts.

    Raises:
        RecipeError: on every rank: there is nothing to go on from, or it is another run's.
    """
    if recipe.resume is None:
        return None
    mine = _look(recipe) if dist.local_rank() == 0 else _NOTHING  # one of a node reads for all of it
    everywhere = dist.all_gather_objects(mine)
    source = max(range(len(everywhere)), key=lambda rank: (everywhere[rank].get("rank_by", ""), -rank))
    found = everywhere[source]
    if problems := found.get("problems"):
        raise RecipeError(*problems)
    for line in found["notes"]:
        logger.warning("%s", line)
    if found["run"] is None:
        logger.info("resume auto: no run to go on with, a new one begins")
        return None
    checkpoint = Path(found["checkpoint"]) if found["checkpoint"] else None
    logger.info("going on with %s from %s", found["run"], checkpoint.name if checkpoint else "its beginning")
    return Resumed(Path(found["run"]), checkpoint, source, found["iteration"], found["same_course"])


_NOTHING = {"run": None, "checkpoint": None, "notes": [], "iteration": -1, "same_course": False}


def _look(recipe: Recipe) -> dict:
    """What this rank sees, as JSON knows it."""
    place = _newest_run(recipe) if recipe.resume == AUTO else Path(recipe.resume)
    if place is None or (recipe.resume == AUTO and not place.is_dir()):
        return _NOTHING
    named = (place / checkpoint_store.STATE).is_file() or (place / checkpoint_store.MANIFEST).is_file()
    run = place.absolute().parent.parent if named else place
    if not (named or (run / FOLDER).is_dir() or (run / "recipe.yaml").is_file()):
        return {"problems": [f"resume: {place} is no run's folder and no checkpoint; name one of these, or auto"]}
    if recipe.output and Path(recipe.output).resolve() != run.resolve():
        said = f"resume: a run goes on in its own folder, {run}, got output {recipe.output}; leave output out"
        return {"problems": [said]}
    if named and (problem := checkpoint_store.problem_of(place)):
        return {"problems": [f"resume: {problem}; name another one, or the run's folder for its newest whole one"]}
    candidates = [place] if named else checkpoint_store.finished(run / FOLDER)
    chosen, state, notes = _choose(recipe, candidates)
    found = {**_NOTHING, "run": str(run), "notes": notes}
    if chosen is None:
        return found
    if state["version"] != VERSION:
        return {"problems": [f"resume: {chosen} is of format {state['version']}, this version reads {VERSION}"]}
    if problems := changed_identity(state["identity"], json.loads(json.dumps(identity_of(recipe)))):
        return {"problems": [f"resume: {problem}" for problem in problems], "rank_by": chosen.name}
    changes = _changes(recipe, state)
    notes += [f"resume: {key} was {old}, is {new}" for key, (old, new) in changes.items()]
    return {
        **found,
        "checkpoint": str(chosen),
        "rank_by": chosen.name,
        "iteration": state["iteration"],
        "same_course": _same_course(changes),
    }


def _choose(recipe: Recipe, candidates: list[Path]) -> tuple[Path | None, dict, list[str]]:
    """The first that is whole and that can be gone on from, what it says of itself, and why others were passed over."""
    notes = []
    for path in candidates:
        if problem := checkpoint_store.problem_of(path):
            notes.append(f"resume: passed over a torn checkpoint: {problem}")
            continue
        state = checkpoint_store.read_state(path)
        if has_moved(path.name) and not _same_course(_changes(recipe, state)):
            notes.append(f"resume: settings or ranks changed inside an iteration, which starts again: {path.name}")
            continue
        return path, state, notes
    return None, {}, notes


def _changes(recipe: Recipe, state: dict) -> dict[str, tuple]:
    changes = changed_settings(state["recipe"], recipe.model_dump(mode="json"))
    changes = {key: change for key, change in changes.items() if key not in UNSAID}
    if state["world_size"] != dist.world_size():
        changes["the number of ranks"] = state["world_size"], dist.world_size()
    return changes


def _same_course(changes: dict[str, tuple]) -> bool:
    return all(key.partition(".")[0] in IN_NO_IDENTITY for key in changes)


def _newest_run(recipe: Recipe) -> Path | None:
    if recipe.output:
        return Path(recipe.output)
    runs = [path for path in Path("runs").glob(f"{recipe.name or 'run'}-*-*") if (path / "recipe.yaml").is_file()]
    return max(runs, key=lambda path: path.name, default=None)


def rewind(resumed: Resumed, mark: str = "") -> None:
    """Cut the run's files back to the checkpoint, so that they go on without a gap or a line twice (rank 0).

    A line that a kill cut off goes too. What a person leaves behind by naming an older checkpoint is not thrown away:
    newer checkpoints, final weights and whole copies of the files move to `superseded/`.

    Args:
        mark: ends the name of what a roll-back leaves behind there, be there newer checkpoints or not.
    """
    run, name = resumed.run, resumed.checkpoint.name if resumed.checkpoint else ""
    newer = [path for path in checkpoint_store.finished(run / FOLDER) if path.name > name]
    kept = [path for path in [*newer, run / "final"] if path.exists() and "." not in path.name]
    aside = run / "superseded" / f"{datetime.now():%Y%m%d-%H%M%S}{mark}"
    if kept or mark:
        aside.mkdir(parents=True)
    for path in {*newer, *kept}:
        if path in kept:
            path.rename(aside / path.name)
        else:
            shutil.rmtree(path)
    for file in (run / name for name in CUT_FILES):
        if not file.exists():
            continue
        if kept or mark:
            shutil.copy2(file, aside / file.name)
        lines = [line for line in file.read_text().splitlines(keepends=True) if _belongs(line, resumed.iteration)]
        cut = file.with_name(f".{file.name}")
        cut.write_text("".join(lines))
        cut.replace(file)


def _belongs(line: str, iteration: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["iteration"] <= iteration
    except ValueError:
        return False
