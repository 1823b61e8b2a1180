"""When a run's checkpoints are written, what is in them, and how an engine takes one up again.

Whole iterations are named 000008 (8 are complete); inside the ninth there may be 000008.1-generation,
000008.2-inference and 000008.3-training-0002 (2 of its minibatches are learned): names sort by time. Before these,
000008.0-rolled-back-01 is where a run goes on that diverged and went back to 000008.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from engine import checkpoint_store, dist, progress, randomness, traffic
from engine.checkpoint_store import Checkpoint
from engine.config import Recipe
from engine.errors import RunError
from engine.hybrid_engine import HybridEngine
from engine.identity import identity_of
from engine.run_state import Begun, RunState

logger = dist.get_logger(__name__)

VERSION = 1
FOLDER = "checkpoints"
_PHASES = {"generation": "1-generation", "inference": "2-inference", "training": "3-training"}
_ROLLED_BACK = "0-rolled-back"


class Checkpoints:
    """Writes a run's checkpoints when they are due. All ranks call every method together.

    Args:
        writes: this rank writes: rank 0, and one rank of each node that doesn't see rank 0's folder.
    """

    def __init__(self, recipe: Recipe, run: Path, engine: HybridEngine, writes: bool):
        self.settings, self.folder, self.engine, self.writes = recipe.checkpoint, run / FOLDER, engine, writes
        self.last = time.monotonic()
        self.newest: str | None = None
        """The name of the last one that was written."""
        # A copy of all that is trained, with its moments: next to nothing for adapters.
        self.holds = recipe.actor.train == "lora" and (recipe.critic.home != "model" or recipe.critic.train == "lora")
        self._engine_state: tuple | None = None
        self._ready: tuple[str, Checkpoint] | None = None
        self._moving = False
        self._lock = threading.Lock()  # another thread may write the one that is ready
        self.about = {
            "version": VERSION,
            "world_size": dist.world_size(),
            "identity": identity_of(recipe) if writes else {},
            "recipe": recipe.model_dump(mode="json"),
        }

    def after_iteration(self, state: RunState, metrics: dict[str, float], last: bool) -> None:
        """Write one if it is time; `metrics` are those of the iteration, held-out ones included."""
        settings = self.settings
        due = settings.every_iterations and (last or state.iteration % settings.every_iterations == 0)
        if settings.every_minutes:
            due = dist.broadcast_object(bool(due or time.monotonic() - self.last >= 60 * settings.every_minutes))
        if due:
            name = f"{state.iteration:06d}"
            self._note_best(state, metrics, name)
            self.write(state, name)

    def at_rest(self, state: RunState) -> None:
        """Hold a checkpoint of this state ready, to be written at any moment until weights move."""
        ready = None
        if self.holds:
            with traffic.uncounted():
                ready = name_of(state), self._checkpoint(state, hold=True)
        with self._lock:
            self._ready, self._moving = ready, not self.holds

    def moving(self) -> None:
        """From now on weights change."""
        with self._lock:
            self._ready, self._moving, self._engine_state = None, True, None

    def write_ready(self) -> tuple[bool, str | None]:
        """Write the checkpoint that is ready, in any thread and without the other ranks.

        Returns:
            Whether there is nothing left to keep, and the name of the newest one on the disk. While weights move, what
            was learned can't be kept yet.
        """
        with self._lock:
            if self._moving:
                return False, None
            if self._ready is not None and self._ready[0] != self.newest:
                name, checkpoint = self._ready
                checkpoint_store.write(self.folder, name, checkpoint)
                self.newest = name
            return True, self.newest

    def in_iteration(self, state: RunState, asked: bool = False) -> None:
        """Write one of the iteration that has begun, if the recipe wants those or somebody asked for it."""
        if self.settings.mid_phase or asked:
            self.write(state, name_of(state))

    def rolled_back(self, state: RunState) -> None:
        """Write the state from which a run goes on that went back: beside the checkpoint that it went back to."""
        self.write(state, f"{state.iteration:06d}.{_ROLLED_BACK}-{state.roll_backs:02d}")
        with self._lock:
            self._ready, self._moving = None, False  # nothing newer is there to be kept

    def write(self, state: RunState, name: str) -> None:
        """Write a checkpoint and delete those that are no longer wanted.

        Raises:
            RunError: on every rank, when the disk takes no more and the recipe says to stop then.
        """
        start, problem = time.monotonic(), None
        with traffic.uncounted(), progress.phase("checkpoint"):
            checkpoint = self._checkpoint(state, hold=self.holds and not self._moving)
            if self.writes:
                try:
                    with self._lock:
                        if name != self.newest:
                            checkpoint_store.write(self.folder, name, checkpoint)
                            self.newest = name
                        checkpoint_store.thin_out(self.folder, self._kept(state))
                except OSError as error:
                    problem = f"checkpoint {name} could not be written to {self.folder}: {error.strerror or error}"
            problems = [p for p in dist.all_gather_objects(problem) if p is not None]
        self.last = time.monotonic()
        if not problems:
            level = logging.INFO if state.begun is None else logging.DEBUG
            logger.log(level, "checkpoint %s (%.1f s)", name, self.last - start)
        elif self.settings.on_full_disk == "stop":
            raise RunError(f"{problems[0]}; the one before is whole. Make room and go on with --resume")
        else:
            logger.warning("%s; the one before is whole, and training goes on", problems[0])

    def _checkpoint(self, state: RunState, hold: bool) -> Checkpoint:
        tensors, numbers = self._engine_state or self._capture()
        self._engine_state = (tensors, numbers) if hold else None
        random = dist.all_gather_objects(randomness.global_state())
        values = {**self.about, "engine": numbers, "random": random, **_values(state)}
        if state.begun is not None:
            tensors = tensors | (state.begun.tensors if self.writes else {})
            values["begun"] = state.begun.to_json() | {"spent": dist.all_gather_objects(state.begun.spent)}
        return Checkpoint(tensors, values)

    def _capture(self) -> tuple[dict, dict]:
        tensors, numbers = self.engine.capture()
        return (tensors if self.writes else {}), numbers

    def _kept(self, state: RunState) -> set[str]:
        """The last whole ones, the best one, and of those inside an iteration two, if nothing whole is newer.

        They are the newest, and the newest from which the iteration could start again, when that is another. What sorts
        behind the one just written belongs to a course that was left.
        """
        names = [path.name for path in checkpoint_store.finished(self.folder) if path.name <= self.newest]
        whole = [name for name in names if "." not in name]
        inside = [name for name in names if "." in name and name > max(whole, default="")]
        kept = {*whole[: self.settings.keep_last], *inside[:1], *[n for n in inside if not has_moved(n)][:1]}
        return kept | ({state.best["checkpoint"]} if state.best else set())

    def _note_best(self, state: RunState, metrics: dict[str, float], name: str) -> None:
        wanted = self.settings.keep_best
        if wanted is None:
            return
        sign = -1 if wanted.startswith("-") else 1
        value = metrics.get(wanted.removeprefix("-"))
        if value is not None and (state.best is None or sign * value > sign * state.best["value"]):
            state.best = {"metric": wanted, "value": value, "checkpoint": name}


def name_of(state: RunState) -> str:
    """The name of a checkpoint of this state."""
    name = f"{state.iteration:06d}"
    if state.begun is None:
        return name
    phase, steps = state.begun.phase, state.begun.stats.steps
    return f"{name}.{_PHASES[phase]}" + (f"-{steps:04d}" if phase == "training" else "")


def has_moved(name: str) -> bool:
    """Whether the weights of a checkpoint are past the beginning of its iteration."""
    return _PHASES["training"] in name


def restore(engine: HybridEngine, path: Path | None, source: int, same_course: bool) -> RunState:
    """Put a checkpoint's weights and moments into the engine; returns the rest (a collective).

    Args:
        path: the folder on rank `source`, which reads it for all.
        same_course: nothing has changed: an iteration that has begun goes on, and otherwise starts again.

    Raises:
        RunError: on every rank, when the checkpoint holds other tensors than the engine trains.
    """
    read = checkpoint_store.read(path) if dist.rank() == source else None
    problem = _misfit(engine, read) if read is not None else None
    dist.agree(problem)
    values = dist.broadcast_object(read.state if read is not None else None, source)
    tensors = dist.broadcast_tensors(read.tensors if read is not None else None, source)
    engine.restore({role: tensors[role] for role in engine.role_steps}, values["engine"])
    state = RunState(**{name: values[name] for name in _values(RunState()) if name in values})  # older ones hold less
    if same_course:
        randomness.restore_global_state(values["random"][dist.rank()])
        if "begun" in values:
            state.begun = Begun.of(tensors, values["begun"], values["begun"]["spent"][dist.rank()])
    return state


def _misfit(engine: HybridEngine, read: Checkpoint) -> str | None:
    for role in engine.role_steps:
        wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.role_parameters(role).items()}
        found = read.tensors.get(role, {})
        held = {name.rpartition("/")[0]: tuple(tensor.shape) for name, tensor in found.items()}
        for name in wanted.keys() | held.keys():
            if wanted.get(name) != held.get(name):
                return (
                    f"the checkpoint's {role} doesn't fit: {name} is {held.get(name, 'missing')} there and "
                    f"{wanted.get(name, 'missing')} in this run; go on with the recipe that it began with"
                )
    return None


def _values(state: RunState) -> dict:
    """The fields that JSON knows."""
    return {name: value for name, value in vars(state).items() if name != "begun"}
