"""What a self-check found: its name, a figure beside its bound, what is wrong and what to do; then of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from engine import dist
from engine.errors import RecipeError

Result = tuple[str, str | None]
"""What a check returns: what it measured, and the problem (rule, value got, remedy); None: there is none."""


@dataclass(frozen=True)
class Finding:
    """One check, done."""

    name: str
    measured: str
    problem: str | None
    seconds: float


def find(name: str, check: Callable[..., Result], *arguments) -> Finding:
    """Do one check."""
    start = time.monotonic()
    measured, problem = check(*arguments)
    return Finding(name, measured, problem, time.monotonic() - start)


def together(findings: list[Finding]) -> list[Finding]:
    """The same checks of all ranks: one fails where it fails on any, with what that rank found (a collective)."""
    ranks = dist.all_gather_objects([asdict(finding) for finding in findings])
    return [_of_all([Finding(**one) for one in same]) for same in zip(*ranks, strict=True)]


def _of_all(same: list[Finding]) -> Finding:
    failed = {rank: one for rank, one in enumerate(same) if one.problem is not None}
    found = replace(same[0], seconds=max(one.seconds for one in same))
    if not failed:
        return found
    problems = [one.problem for one in failed.values()]
    first = next(iter(failed.values()))
    if len(failed) == len(same) and len(set(problems)) == 1:
        return replace(found, measured=first.measured, problem=first.problem)
    said = "; ".join(f"rank {rank}: {failed[rank].problem}" for rank in list(failed)[:3])
    more = f" (and {len(failed) - 3} other ranks)" if len(failed) > 3 else ""
    return replace(found, measured=first.measured, problem=said + more)


def refuse(findings: list[Finding]) -> None:
    """Raise what failed, all at once.

    Raises:
        RecipeError: some check failed.
    """
    problems = [f"self-check, {one.name}: {one.problem}" for one in findings if one.problem is not None]
    if problems:
        raise RecipeError(*problems)


def within(deviation: float, bound: float, otherwise: str) -> Result:
    """Whether a deviation keeps its bound; one that is no number does not.

    Args:
        otherwise: the rule and the remedy; `{measured}` in it becomes the figure.
    """
    measured = f"{deviation:.1e} of {bound:.0e}"
    return measured, None if deviation <= bound else otherwise.format(measured=f"{deviation:.1e}, bound {bound:.0e}")
