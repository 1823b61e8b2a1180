"""What one rank finds wrong before the start is told on all, with its host; who is late is named; who fetches."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from engine import dist, preparation
from engine.config import Recipe
from engine.errors import RecipeError, RunError
from tests.launching import free_port


def test_what_all_found_is_said_once_and_the_rest_with_its_host():
    everywhere = [("a", ["one", "all"]), ("a", ["one", "all"]), ("b", ["all"]), ("b", ["other", "all"])]
    assert preparation.tell(everywhere) == ["on a (rank 0, 1): one", "all", "on b (rank 3): other"]
    assert preparation.tell([("a", []), ("b", [])]) == []
    assert preparation.tell([("a", ["one"])]) == ["one"]
    assert preparation.tell([("a", ["one"]), ("b", []), ("c", ["one"])]) == ["on a, c (rank 0, 2): one"]


def models(**sections) -> dict:
    return preparation.from_the_hub(Recipe.model_validate(sections))


def test_hub_names_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    reward = [{"model": "org/reward"}]
    found = models(model={"path": "org/policy", "revision": "v2"}, rewards=reward, critic={"home": "model"})
    assert found == {"org/policy": "v2", "org/reward": None}
    assert models(model={"path": "mine"}, rewards=reward, critic={"home": "model", "path": "mine/critic"}) == {
        "org/reward": None
    }
    assert models(model={"path": "world/policy"}, rewards=[{"model": "world/reward"}], toyworld="world") == {}


# --- ranks that are no group yet, each a process with the variables that a launcher sets


def in_processes(folder: Path, job, ranks: int = 2, absent: tuple[int, ...] = ()) -> list:
    """What `job(rank, folder)` returns or raises in each."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        context.Process(target=_one, args=(job, rank, folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(ranks)
        if rank not in absent
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(ranks) if rank not in absent]


def _one(job, rank: int, folder: Path, environment: dict) -> None:
    os.environ.update(environment)
    try:
        result = job(rank, folder)
    except (RecipeError, RunError) as error:
        result = [type(error).__name__, str(error)]
    (folder / f"result-{rank}").write_text(json.dumps(result))


def look(rank: int, folder: Path) -> None:
    def fetch() -> None:
        time.sleep(1)
        (folder / f"fetched-by-{rank}").touch()

    def check() -> None:
        fetched = sorted(path.name for path in folder.glob("fetched-by-*"))
        if rank == 1:
            raise RecipeError(f"{fetched} and no more")

    dist.on_first_of_each_node(fetch)
    preparation.together(lambda: None)
    preparation.together(check)


def come(rank: int, folder: Path) -> list:
    dist._patience = lambda: timedelta(seconds=4)
    return dist.exchange_with_hosts(rank)


def test_one_rank_of_a_node_fetches_and_all_end_with_the_error_of_one(tmp_path):
    said = f"on {os.uname().nodename} (rank 1): ['fetched-by-0'] and no more"
    assert in_processes(tmp_path, look) == [["RecipeError", said]] * 2


def test_who_does_not_come_is_named(tmp_path):
    (kind, message), *_ = in_processes(tmp_path, come, ranks=3, absent=(2,))
    assert kind == "RunError" and "1 of 3 ranks, the first of them 2, did not come within 0:00:04" in message


@pytest.mark.dist
def test_the_ranks_of_a_group_end_together_too(pool):
    for found in pool.run(_in_a_group):
        assert found == f"on {os.uname().nodename} (rank 1): no such file"


def _in_a_group() -> str:
    def check() -> None:
        if dist.rank() == 1:
            raise RecipeError("no such file")

    with pytest.raises(RecipeError) as told:
        preparation.together(check)
    return str(told.value)
