"""Fixtures of the whole suite."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def pool():
    """Two ranks under real DeepSpeed, shared by the whole session."""
    from tests.distributed import Pool

    workers = Pool(world_size=2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def single():
    """One rank under real DeepSpeed, in a process of its own so that the others stay free of a process group."""
    from tests.distributed import Pool

    workers = Pool(world_size=1)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def nvme():
    """DeepSpeed's operator for NVMe, compiled before ranks would wait minutes for it."""
    from engine import zero

    if not zero.reaches_nvme():
        pytest.skip("libaio is missing: install what tests/system_packages.txt names")
    zero.AsyncIOBuilder().load()


@pytest.fixture(scope="session")
def full_world(pool, tmp_path_factory):
    """The toy world in its full size, built once by two ranks; its folder lies as the quickstart's recipe expects."""
    from engine.toyworld import prepare

    folder = tmp_path_factory.mktemp("newcomer") / "runs" / "toyworld"
    pool.run(prepare, str(folder))
    return folder


@pytest.fixture(scope="session")
def alone():
    """A process group of one in this process, for what trains under DeepSpeed here."""
    from engine import zero

    zero.start()
