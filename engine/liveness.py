"""Who is gone, who stands still, and who only waits for them: what one rank concludes from what it sees of the others.

A rank inside a collective waits for those that have not entered it. Collectives come in one order on all ranks, so
whoever has entered the fewest is the one that the others wait for, and it is to blame if it doesn't move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HERE, LEFT, FAILED = "here", "left", "failed"
"""States of a rank. Left: it has done all it had to. Failed: an exception ended it."""
GONE, STOPPED = "gone", "stopped"
"""States of a process that does nothing more, or nothing for now."""
GRACE_SECONDS = 5.0
"""How long the others may take to come to the same end as a rank that has failed."""
QUIET_SECONDS = 3.0
"""Longer than a rank that lives is silent."""
SUSPICIOUS_SECONDS = 10.0
"""How long a rank may give no sign of life once the connection to one is known to have broken."""


@dataclass(frozen=True)
class Seen:
    """A rank as another one sees it."""

    rank: int
    host: str
    record: dict
    """Of `progress.record`, with `state`, `place`, and `still_seconds` for how long it has been the same.

    `error`: what ended it or, while it is here, that it has lost the connection to another one.
    """
    silent_seconds: float = 0.0
    """Since its record was last renewed."""
    process: str | None = None
    """GONE or STOPPED, where this rank can see it."""

    @property
    def here(self) -> bool:
        return self.record["state"] == HERE

    @property
    def still_seconds(self) -> float:
        return self.record["still_seconds"] + self.silent_seconds


def blame(ranks: Sequence[Seen], patience_seconds: float, everyone: bool) -> list[tuple[Seen, str]]:
    """The ranks that keep the others from going on, each with what is wrong; nobody: all is well.

    Args:
        everyone: `ranks` are all there are, or nobody can tell who waits for whom.
    """
    gone = [(seen, "died: its process is gone") for seen in ranks if seen.here and seen.process == GONE]
    failed = [(seen, f"failed: {seen.record['error']}") for seen in ranks if _has_failed(seen, patience_seconds)]
    if gone or failed or any(seen.record["state"] == FAILED for seen in ranks):
        return gone + failed
    ranks = [seen for seen in ranks if seen.here]
    if any(seen.record["error"] for seen in ranks):
        patience_seconds = min(patience_seconds, SUSPICIOUS_SECONDS)
    guilty = [seen for seen in ranks if seen.silent_seconds >= patience_seconds]
    if not guilty and everyone:
        guilty = _behind(ranks, patience_seconds)
    return [(seen, _what(seen)) for seen in guilty]


def _has_failed(seen: Seen, patience_seconds: float) -> bool:
    return seen.record["state"] == FAILED and seen.silent_seconds >= min(GRACE_SECONDS, patience_seconds)


def _what(seen: Seen) -> str:
    if seen.silent_seconds > QUIET_SECONDS:
        return f"gives no sign of life for {seen.silent_seconds:.0f} s" + (
            f" (its process is {seen.process})" if seen.process else ""
        )
    after = f", after {seen.record['error']}" if seen.record["error"] else ""
    return f"has not moved for {seen.still_seconds:.0f} s{after}"


def _behind(ranks: Sequence[Seen], patience_seconds: float) -> list[Seen]:
    fewest = min((seen.record["collectives"] for seen in ranks), default=0)
    last = [seen for seen in ranks if seen.record["collectives"] == fewest]
    # Who has lost the connection to another one waits for that one to be found out.
    still = [s for s in last if s.still_seconds >= patience_seconds + (GRACE_SECONDS if s.record["error"] else 0)]
    outside = [seen for seen in still if not seen.record["inside"]]
    if outside:
        return outside
    return still if len(still) == len(last) else []  # one of them still comes: then those inside only wait for it


def failure_of(culprits: Sequence[tuple[Seen, str]], ranks: Sequence[Seen]) -> dict:
    """What is told to all ranks and kept, as JSON knows it."""
    blamed = {seen.rank for seen, _ in culprits}
    return {
        "culprits": [{**_facts(seen), "what": what} for seen, what in culprits],
        "others": [_facts(seen) for seen in ranks if seen.rank not in blamed],
    }


def _facts(seen: Seen) -> dict:
    names = ("phase", "iteration", "collective", "collectives", "inside", "place", "state")
    return {"rank": seen.rank, "host": seen.host, **{name: seen.record[name] for name in names}}


def report(failure: dict) -> str:
    """The same for people."""
    lines = [f"rank {row['rank']} on {row['host']} {row['what']}; it was {_doing(row)}" for row in failure["culprits"]]
    lines += [f"  rank {row['rank']} on {row['host']}: {_doing(row)}" for row in failure["others"]]
    return "\n".join(lines)


def _doing(row: dict) -> str:
    inside = "inside" if row["inside"] else "left"
    return (
        f"in {row['phase']}, iteration {row['iteration']}, last collective: {row['collective']} "
        f"(number {row['collectives']}, {inside}), last seen at {row['place']}"
    )
