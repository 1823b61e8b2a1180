"""Who is to blame: told from records alone, in a plain process."""

from __future__ import annotations

import json

from engine.liveness import FAILED, GONE, HERE, LEFT, STOPPED, Seen, blame, failure_of, report

PATIENCE = 30.0


def seen(rank: int, silent: float = 0.0, process: str | None = None, **record) -> Seen:
    """A rank that decodes, unless something else is said."""
    usual = {"phase": "generation", "iteration": 2, "moves": 9, "collectives": 7, "collective": "all_gather"}
    usual |= {"inside": False, "place": "rollout.py:1 in f", "still_seconds": 0.0, "state": HERE, "error": ""}
    return Seen(rank, f"host{rank}", usual | record, silent, process)


def blamed(*ranks: Seen, everyone: bool = True) -> dict[int, str]:
    return {one.rank: what for one, what in blame(ranks, PATIENCE, everyone)}


def waiting(rank: int, **record) -> Seen:
    return seen(rank, **{"collectives": 8, "inside": True, "still_seconds": 100.0, **record})


def test_nobody_while_all_move():
    assert blamed(seen(0), seen(1, still_seconds=PATIENCE - 1), seen(2, silent=PATIENCE - 1)) == {}


def test_the_one_outside_the_collective_and_not_those_who_wait_in_it():
    assert blamed(waiting(0), seen(1, still_seconds=31.0), waiting(2)) == {1: "has not moved for 31 s"}
    # It left a collective that a slow link still holds the others in: as many entered, one outside.
    assert blamed(waiting(0), seen(1, collectives=8, still_seconds=31.0)).keys() == {1}


def test_nobody_while_the_one_that_is_waited_for_moves():
    assert blamed(waiting(0), seen(1), waiting(2)) == {}


def test_the_one_that_is_behind_even_inside_another_collective():
    assert blamed(waiting(0), waiting(1, collectives=7)).keys() == {1}


def test_a_rank_that_looks_idle_but_waits_for_one_behind():
    """On an accelerator a collective returns before it is done: the host waits later, and somewhere else."""
    assert blamed(waiting(0, inside=False), seen(1)) == {}
    assert blamed(waiting(0, inside=False), seen(1, still_seconds=40.0)).keys() == {1}


def test_all_when_all_wait_in_the_same_collective():
    assert blamed(waiting(0), waiting(1)).keys() == {0, 1}


def test_nobody_when_the_last_one_has_just_entered():
    assert blamed(waiting(0), waiting(1, still_seconds=1.0)) == {}


def test_two_of_three_that_hang_at_the_same_place():
    hung = {"still_seconds": 50.0}
    assert blamed(seen(0, **hung), seen(1, **hung), seen(2)).keys() == {0, 1}


def test_who_waits_for_whom_is_not_guessed_without_all_records():
    assert blamed(seen(1, still_seconds=99.0), waiting(0), everyone=False) == {}


def test_a_rank_without_a_sign_of_life():
    assert blamed(waiting(0), seen(1, silent=31.0)) == {1: "gives no sign of life for 31 s"}
    stopped = blamed(waiting(0), seen(1, silent=31.0, process=STOPPED), everyone=False)
    assert stopped == {1: "gives no sign of life for 31 s (its process is stopped)"}


def test_a_link_that_is_cut_is_called_silence_on_both_sides():
    """Just before silence itself has lasted long enough, the stillness of a rank that hung before has."""
    assert blamed(waiting(0), seen(1, silent=29.9, still_seconds=0.2)) == {1: "gives no sign of life for 30 s"}


def test_a_process_that_is_gone_at_once_but_not_one_that_left():
    assert blamed(seen(0), seen(1, process=GONE)) == {1: "died: its process is gone"}
    assert blamed(seen(0), seen(1, silent=99.0, process=GONE, state=LEFT)) == {}


def test_those_that_have_left_are_not_waited_for():
    assert blamed(seen(0, still_seconds=5.0), seen(1, silent=99.0, collectives=3, state=LEFT)) == {}


def test_an_exception_in_one_rank_after_a_moment():
    """All may be about to raise the same: then none is left to blame anybody."""
    failed = {"state": FAILED, "error": "ValueError: no"}
    assert blamed(waiting(0), seen(1, silent=1.0, process=GONE, **failed)) == {}
    assert blamed(waiting(0), seen(1, silent=6.0, process=GONE, **failed)) == {1: "failed: ValueError: no"}


def test_a_broken_connection_shortens_patience():
    """Of two hosts: one rank's connection broke, the other host is silent."""
    lost = {"error": "RuntimeError: Connection closed by peer", "still_seconds": 12.0}
    assert blamed(seen(0, **lost), seen(1, silent=11.0)).keys() == {1}
    assert blamed(seen(0, **lost), seen(1, silent=5.0)) == {}
    # Nobody is silent: it is the rank itself that can't go on.
    alone = blamed(seen(0, **{**lost, "still_seconds": 16.0}), seen(1, collectives=8))
    assert alone == {0: "has not moved for 16 s, after RuntimeError: Connection closed by peer"}


def test_the_report_names_all_that_is_asked_for():
    ranks = [waiting(0), seen(1, still_seconds=31.0, collectives=812, phase="inference")]
    failure = json.loads(json.dumps(failure_of([(ranks[1], "has not moved for 31 s")], ranks)))
    text = report(failure)
    for part in ("rank 1 on host1", "inference", "iteration 2", "all_gather", "812", "rank 0 on host0", "inside"):
        assert part in text
    assert [row["rank"] for row in failure["culprits"]] == [1] and [row["rank"] for row in failure["others"]] == [0]
