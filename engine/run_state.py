"""What changes while a run goes on, besides weights: its counts and controllers, and an iteration that has begun."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from engine.batch import Evaluation, Rollout, UpdateStats


@dataclass
class Begun:
    """An iteration that has begun: what its phases have made so far. A phase that isn't done leaves nothing here."""

    iteration: int
    """Counts from 0."""
    rollout: Rollout | None = None
    """The rows of all ranks."""
    evaluation: Evaluation | None = None
    stats: UpdateStats = field(default_factory=UpdateStats)
    """`stats.steps` minibatches have been learned from."""
    spent: dict[str, dict[str, float]] = field(default_factory=dict)
    """This rank's seconds and bytes so far: `metrics.PhaseClock`."""

    @property
    def phase(self) -> str:
        """The last one that has made something."""
        if self.stats.steps:
            return "training"
        return "generation" if self.evaluation is None else "inference"

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The records' tensors, each with memory of its own."""
        records = {"rollout": self.rollout, "evaluation": self.evaluation}
        return {
            name: {key: value.contiguous().clone() for key, value in vars(record).items()}
            for name, record in records.items()
            if record is not None
        }

    def to_json(self) -> dict:
        """What is no tensor and no rank's own."""
        return {"iteration": self.iteration, "stats": vars(self.stats)}

    @classmethod
    def of(cls, tensors: dict[str, dict[str, Tensor]], values: dict, spent: dict) -> Begun:
        """The way back from `tensors` and `to_json`."""
        stats = UpdateStats(**{**values["stats"], "sums": Counter(values["stats"]["sums"])})
        records = {"rollout": Rollout, "evaluation": Evaluation}
        made = {name: record(**tensors[name]) for name, record in records.items() if name in tensors}
        return cls(values["iteration"], **made, stats=stats, spent=spent)


@dataclass
class RunState:
    """A run between two iterations, and the iteration that has begun since, if it was stopped in one."""

    iteration: int = 0
    """Complete ones."""
    kl_coef: float | None = None
    """None: the recipe's."""
    moments: list[dict] | None = None
    """Of the running normalisation of each reward source. None: nothing was seen."""
    best: dict | None = None
    """Value and name of the checkpoint that `checkpoint.keep_best` keeps."""
    roll_backs: int = 0
    """How often training diverged and went back."""
    prompt_shift: int = 0
    """Iterations whose prompts were skipped by that: an iteration learns from those of `iteration + prompt_shift`."""
    learning_rate_factor: float = 1.0
    """What that has made of both roles' learning rates."""
    begun: Begun | None = None
