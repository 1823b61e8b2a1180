"""When training diverges: what is seen before anything is learned from it, and the way back to a good checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from engine import checkpoint_store, dist
from engine.batch import Evaluation, Rollout
from engine.checkpoint import Checkpoints, has_moved, restore
from engine.config import Recipe
from engine.errors import Diverged, RunError
from engine.hybrid_engine import HybridEngine
from engine.metrics import append_jsonl
from engine.resume import Resumed, rewind
from engine.run_folder import RunFolder
from engine.run_state import RunState

logger = dist.get_logger(__name__)

DIVERGENCE = (FloatingPointError, Diverged)
"""What every rank raises together, without a gradient left, when training can't go on from where it is."""
EVENTS = "events.jsonl"


def sound_rollout(rollout: Rollout, iteration: int) -> Rollout:
    """The rollout, if its sampler knew what it did; the same answer on every rank, which all hold the rows of all.

    Args:
        iteration: counts from 0.

    Raises:
        FloatingPointError: log-probs are not finite.
    """
    if not rollout.sampler_logprobs.isfinite().all():
        raise FloatingPointError(
            f"iteration {iteration + 1}: log-probs of sampled tokens are not finite, the last update has ruined the "
            "weights; a lower learning rate or float32 usually helps"
        )
    return rollout


def sound_evaluation(evaluation: Evaluation, iteration: int, kl_abort: float | None) -> Evaluation:
    """The evaluation, if the weights are fit to go on from.

    Args:
        iteration: counts from 0.
        kl_abort: bound on the KL to the reference, in nats per response; None: none.

    Raises:
        FloatingPointError: log-probs or values are not finite.
        Diverged: the KL is beyond its bound.
    """
    said = {
        "log-probs": evaluation.old_logprobs,
        "values": evaluation.old_values,
        "the reference's log-probs": evaluation.ref_logprobs,
    }
    wrong = [name for name, numbers in said.items() if not numbers.isfinite().all()]
    if wrong:
        raise FloatingPointError(
            f"iteration {iteration + 1}: {' and '.join(wrong)} of the responses are not finite, and nothing was "
            "learned from them; a lower learning rate or float32 usually helps"
        )
    kl = (evaluation.old_logprobs - evaluation.ref_logprobs).sum(1).mean().item()
    if kl_abort is not None and kl > kl_abort:
        raise Diverged(
            f"iteration {iteration + 1}: the KL to the reference may not pass failures.kl_abort {kl_abort:g} nats per "
            f"response, got {kl:.4g}, and nothing was learned from it; lower the learning rates, or raise kl.kl_coef "
            "or failures.kl_abort"
        )
    return evaluation


def go_back(
    error: Exception,
    recipe: Recipe,
    state: RunState,
    engine: HybridEngine,
    checkpoints: Checkpoints,
    folder: RunFolder,
) -> RunState:
    """Take the engine and the run's files back to the last good checkpoint, and say where to go on; a collective.

    Good are the weights from which an iteration has sampled and found nothing wrong: those of the failed iteration only
    if it came as far as its update. What goes on is on the disk when this returns, under a name of its own.

    Args:
        error: one of DIVERGENCE.
        state: of the iteration that failed.

    Raises:
        RunError: it has gone back too often, or there is nothing to go back to.
        Exception: `error`, where the recipe says stop.
    """
    settings, failed = recipe.failures, state.begun.iteration
    if settings.on_divergence == "stop":
        raise error
    if state.roll_backs == settings.max_roll_backs:
        raise RunError(
            f"{error}. The run has gone back failures.max_roll_backs {settings.max_roll_backs} times, see "
            f"{folder.path / EVENTS}; change what drives it there, and go on with --resume"
        ) from error
    checkpoints.moving()  # nothing of the course that is left may be written any more
    newest, source = _last_good(checkpoints, failed if state.begun.evaluation is not None else failed - 1)
    if newest is None:
        raise RunError(f"{error}. There is no good checkpoint to go back to in {checkpoints.folder}") from error
    good = restore(engine, newest, source, same_course=False)
    now = replace(
        good,
        best=_best_that_is_left(checkpoints, good, source),
        roll_backs=state.roll_backs + 1,
        prompt_shift=failed + state.prompt_shift + 1 - good.iteration,
        learning_rate_factor=state.learning_rate_factor * settings.learning_rate_factor,
    )
    _set_aside(folder, Resumed(folder.path, newest, source, good.iteration), now)
    _report(error, recipe, good, now, failed, newest.name, folder)
    checkpoints.rolled_back(now)
    return now


def _last_good(checkpoints: Checkpoints, most: int) -> tuple[Path | None, int]:
    """The newest whole checkpoint of at most `most` complete iterations, and the rank that sees it, on every rank."""
    found = ""
    for path in checkpoint_store.finished(checkpoints.folder) if checkpoints.writes else []:
        if has_moved(path.name):
            continue
        if problem := checkpoint_store.problem_of(path):
            logger.warning("passed over a torn checkpoint: %s", problem)
        elif checkpoint_store.read_state(path)["iteration"] <= most:
            found = path.name
            break
    names = dist.all_gather_objects(found)
    source = max(range(len(names)), key=lambda rank: (names[rank], -rank))
    return (checkpoints.folder / names[source] if names[source] else None), source


def _best_that_is_left(checkpoints: Checkpoints, good: RunState, source: int) -> dict | None:
    """The best checkpoint up to then, unless one of the course that is left has taken its place on the disk."""
    there = good.best is not None and (checkpoints.folder / good.best["checkpoint"]).is_dir()
    return good.best if dist.broadcast_object(there, source) else None


def _set_aside(folder: RunFolder, back: Resumed, now: RunState) -> None:
    """Cut the files back on every disk; what came behind the checkpoint moves to `superseded/`."""
    problem = None
    if folder.writes:
        try:
            rewind(back, f"-rolled-back-{now.roll_backs:02d}")
        except OSError as error:
            problem = f"the run could not go back in {folder.path}: {error.strerror or error}; go on with --resume"
    dist.agree(problem)


def _report(
    error: Exception, recipe: Recipe, good: RunState, now: RunState, failed: int, name: str, folder: RunFolder
) -> None:
    """One line in events.jsonl, and one for people."""
    each, first = recipe.data.prompts_per_iteration, good.iteration + good.prompt_shift
    draws = range(first * each, (now.iteration + now.prompt_shift) * each)
    event = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "kind": "roll_back",
        "iteration": failed + 1,
        "reason": str(error),
        "checkpoint": name,
        "roll_backs": now.roll_backs,
        "prompts_skipped": len(draws),
        "first_draw": draws[0],
        "last_draw": draws[-1],
        "learning_rate_factor": now.learning_rate_factor,
    }
    if dist.rank() == 0:
        _log(folder.path / EVENTS, event)
    logger.warning(
        "%s. Back to checkpoint %s (%d of %d times): %d prompts are skipped, learning rates times %g",
        error,
        name,
        now.roll_backs,
        recipe.failures.max_roll_backs,
        len(draws),
        now.learning_rate_factor,
    )


def _log(file: Path, event: dict) -> None:
    """Once: a run that is killed before the state it goes on from is on the disk goes back here again."""
    text = file.read_text() if file.exists() else ""
    if text and not text.endswith("\n"):  # the power went
        with file.open("a") as opened:
            opened.write("\n")
    said = json.dumps({name: value for name, value in event.items() if name != "time"})[1:]
    if not any(line.endswith(said) for line in text.splitlines()):
        append_jsonl(file, [event])
