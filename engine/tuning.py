"""The search for the fastest setting: few short trials, what each value costs by them, and longer trials of the best.

An iteration's time is that of its phases, and a knob acts on some phases alone. So the time of a phase is taken as a
product of one factor for each knob that acts on it: a trial for each factor is enough to rank all combinations, where
trying each would take their number. What such a product can't know (knobs that help each other) the longer trials of
the best show, by successive halving (Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from engine.errors import RunError
from engine.tuning_space import PHASES, Axis, Point

FIRST, SURVIVE = 9, 3
"""So many of the combinations that should be fastest are measured, and each round keeps one of so many."""
RAN, NO_MEMORY, FAILED = "ran", "out of memory", "failed"
GIVE_UP = 3
"""After so many trials that failed, and none that ran, it isn't the settings."""
SHORTEST_SECONDS = 1e-3
"""Of a phase, for its logarithm."""


@dataclass(frozen=True)
class Trial:
    """One setting, tried."""

    settings: dict[str, object]
    iterations: int
    """Measured ones; one before them is warm-up."""
    status: str
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, the median of the measured iterations."""
    peak_bytes: int | None = None
    """Of a rank: its device's peak on CUDA, else the largest resident memory."""
    said: str = ""
    """Why it didn't run."""
    wall_seconds: float = 0.0
    """Of the trial, start and end included."""

    @property
    def iteration_seconds(self) -> float:
        return sum(self.seconds.values()) if self.status == RAN else np.inf

    def as_json(self) -> dict:
        return asdict(self)


Measure = Callable[[Point, int], Trial]


@dataclass
class Search:
    """One search.

    Args:
        planned: combinations that fit, each with the bytes that a rank should need.
        own: where the search begins, the recipe itself, if it fits.
        measure: tries a combination for so many iterations.
        iterations: measured ones of a short trial; the last round's are SURVIVE times as long.
    """

    axes: Sequence[Axis]
    planned: dict[Point, int]
    own: Point
    measure: Measure
    iterations: int = 2
    instead: dict[Point, set[Point]] = field(default_factory=dict)
    """For what spares memory, the same without that: as long as one of them can run, it isn't tried."""
    trials: dict[Point, Trial] = field(default_factory=dict)
    """The longest of each combination."""

    def fastest(self) -> Trial | None:
        """Run the search; None: nothing ran.

        Raises:
            RunError: the first trials failed, and not for lack of memory.
        """
        while (point := self._most_telling()) is not None:
            self._try(point, self.iterations)
        for size, iterations in ((FIRST, self.iterations), (SURVIVE, SURVIVE * self.iterations)):
            for _ in range(size):
                if (point := self._next(size, iterations)) is not None:
                    self._try(point, iterations)
        return self._winner()

    def exhaustive(self) -> Trial | None:
        """Try every candidate, as long as the last round's trials are; None: nothing ran."""
        iterations = SURVIVE * self.iterations
        while (point := self._next(len(self.planned), iterations)) is not None:
            self._try(point, iterations)
        return self._winner()

    def expected_trials(self) -> int:
        """How many `fastest` takes if all of them run."""
        known: list[Point] = []
        while (point := self._most_telling(known)) is not None:
            known.append(point)
        candidates = len(self.candidates())
        return len(known) + min(FIRST, candidates - len(known)) + min(SURVIVE, candidates)

    def _try(self, point: Point, iterations: int) -> None:
        trial = self.trials[point] = self.measure(point, iterations)
        if [one.status for one in self.trials.values()] == [FAILED] * GIVE_UP:
            raise RunError(
                f"the first {GIVE_UP} trials failed, the last one so: {trial.said}; mend that and start again"
            )
        if trial.status == NO_MEMORY:  # a device holds less than the plan counts on
            least = self.planned[point]
            self.planned = {p: size for p, size in self.planned.items() if size < least or p in self.trials}

    def candidates(self) -> list[Point]:
        """Those that may still win: of those that were tried, those that ran."""
        hopeless = self._hopeless()
        alive = {p for p in self.planned if p not in self.trials or self.trials[p].status == RAN}
        alive = {p for p in alive if p in self.trials or not hopeless & set(enumerate(p))}
        needless = {p for p in alive if p != self.own and self.instead.get(p, set()) & alive}
        return [p for p in self.planned if p in alive - needless]

    def _hopeless(self) -> set[tuple[int, int]]:
        """Values, by axis and index, that never ran and failed more than once: in company with which is no matter."""
        counts = Counter(value for p, t in self.trials.items() if t.status != RAN for value in enumerate(p))
        ran = {value for point in self._ran() for value in enumerate(point)}
        return {value for value, count in counts.items() if count > 1 and value not in ran}

    def _most_telling(self, known: list[Point] | None = None) -> Point | None:
        """The combination that says something new of most phases, as near to the recipe as can be; None: nothing new.

        Args:
            known: those that were measured; None: those that ran.
        """
        known = list(self._ran()) if known is None else known
        candidates = self.candidates()
        if not candidates:
            return None
        news = np.zeros(len(candidates))
        for phase in PHASES:
            rows, basis = _design(self.axes, candidates, phase), _design(self.axes, known, phase)
            beyond = rows - rows @ np.linalg.pinv(basis) @ basis  # what no sum of measured rows says
            news += np.linalg.norm(beyond, axis=1) > 1e-6
        if not news.any():
            return None
        distance = [sum(a != b for a, b in zip(p, self.own, strict=True)) for p in candidates]
        return candidates[min(range(len(candidates)), key=lambda i: (-news[i], distance[i], i))]

    def _next(self, size: int, iterations: int) -> Point | None:
        """Of so many candidates with the least time, measured or else predicted, one that wasn't tried so long yet."""
        candidates, ran = self.candidates(), self._ran()
        times = dict(zip(candidates, predict(self.axes, ran, candidates), strict=True)) if ran else {}
        times |= {point: trial.iteration_seconds for point, trial in ran.items()}
        best = sorted(candidates, key=lambda point: times.get(point, 0.0))[:size]
        return next((p for p in best if p not in ran or ran[p].iterations < iterations), None)

    def _ran(self) -> dict[Point, Trial]:
        return {point: trial for point, trial in self.trials.items() if trial.status == RAN}

    def _winner(self) -> Trial | None:
        """The fastest of the longest trials."""
        ran = self._ran().values()
        longest = max((trial.iterations for trial in ran), default=0)
        return min(
            (trial for trial in ran if trial.iterations == longest),
            key=lambda trial: trial.iteration_seconds,
            default=None,
        )


def _design(axes: Sequence[Axis], points: Sequence[Point], phase: str) -> np.ndarray:
    """A row for each point: 1, and for each knob that acts on the phase which of its values it has, `[N, K]`."""
    acting = [(position, axis) for position, axis in enumerate(axes) if phase in axis.phases]
    rows = np.ones((len(points), 1 + sum(len(axis.values) - 1 for _, axis in acting)))
    column = 1
    for position, axis in acting:
        for index in range(1, len(axis.values)):
            rows[:, column] = [point[position] == index for point in points]
            column += 1
    return rows


def predict(axes: Sequence[Axis], trials: dict[Point, Trial], points: Sequence[Point]) -> np.ndarray:
    """Seconds of an iteration at each point, `[N]`: by phase a least-squares fit of the logarithm of what was measured.

    Args:
        trials: that ran.
    """
    total = np.zeros(len(points))
    for phase in PHASES:
        seconds = [max(trial.seconds[phase], SHORTEST_SECONDS) for trial in trials.values()]
        effects, *_ = np.linalg.lstsq(_design(axes, list(trials), phase), np.log(seconds), rcond=None)
        total += np.exp(_design(axes, points, phase) @ effects)
    return total
