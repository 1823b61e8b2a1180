"""What each file of ds_configs/ costs a rank: the table of ds_configs/README.md.

`python -m tests.regime_bytes` measures with two ranks in bfloat16, LoRA of rank 8 and a full actor: unique storages by
part in the backwards of an update, what lies on the disk, and bytes received. A CPU's memory is device and
host at once: which of the two holds a part on a GPU is what `engine/planner.py` says, and its sums must be those that
were measured.
"""

from __future__ import annotations

import tempfile

from engine import planner, shapes, traffic, zero
from engine.ds_config import read_ds_config
from engine.hybrid_engine import HybridEngine
from engine.roles import RolesModel
from engine.update import update
from tests import live_storages, tiny
from tests.role_bytes import base

REGIMES = ("zero0", "zero1", "zero2", "zero3", "zero3_cpu_optimizer", "zero3_cpu_offload", "zero3_nvme")
HOMES = {
    "LoRA": {},
    "full": {"actor": {"train": "full"}, "critic": {"home": "trunk"}, "reference": {"home": "model"}},
}


def recipe(regime: str, home: str, path: str, folder: str = ""):
    sections = {
        "model": {"dtype": "bfloat16", "path": path},
        "zero": {"ds_config": f"ds_configs/{regime}.json", "nvme_path": folder or path, "keep_gathered_bytes": 0},
        "actor": {"lora": {"rank": 8}},
        "critic": {"lora": {"rank": 8}},
        "ppo": {"minibatch_sequences": 7, "micro_batch_sequences": 2},  # several backwards to a step
    }
    for name, section in HOMES[home].items():
        sections[name] = {**sections.get(name, {}), **section}
    return tiny.recipe(**sections)


def measured(regime: str, home: str, path: str, folder: str) -> dict:
    """On a rank: the most bytes of each part in memory and on the disk, and bytes received; of one update."""
    settings = recipe(regime, home, path, folder)
    reference = None
    if settings.reference_home == "model":
        reference = tiny.ReferenceModel(base(1), 1.0)
    engine = HybridEngine(RolesModel(base(), settings), settings, None, reference)
    update(engine, tiny.experience(), settings, 0, 0.0, frozenset())  # DeepSpeed learns the order of weights
    before = sum(traffic.received.values())
    with live_storages.in_backwards([engine.engine]) as found:
        update(engine, tiny.experience(), settings, 1, 0.0, frozenset())
    moved = sum(traffic.received.values()) - before
    frozen = 0
    if engine.reference is not None:
        frozen = live_storages.fresh_bytes(map(zero.local_shard, engine.reference.module.parameters()), set())
    engine.close()
    memory, disk = live_storages.most(found[engine.engine])
    return {"memory": memory, "disk": disk, "moved": moved, "frozen": frozen}


def predicted(settings, ranks: int) -> planner.Bytes:
    home, *_ = shapes.homes(settings)
    return planner.state(home, settings, read_ds_config(settings.zero.ds_config), ranks, on_cuda=False)


def row(pool, regime: str, home: str, path: str) -> dict:
    """A regime's figures, of the larger rank.

    Raises:
        AssertionError: the plan says something else than was measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = pool.run(measured, regime, home, path, folder)
    expected = predicted(recipe(regime, home, path), pool.world_size)
    for place, sizes in ("memory", expected.device + expected.host), ("disk", expected.disk):
        most = {part: max(one[place][part] for one in found) for part in found[0][place]}
        assert most == {part: sizes[part] for part in most}, (regime, home, place, most, sizes)
    totals = {place: sum(held.values()) for place, held in vars(expected).items()}
    largest = {key: max(one[key] for one in found) for key in ("moved", "frozen")}
    return {"regime": regime, "home": home, **totals, **largest}


def table(rows: list[dict]) -> str:
    lines = [
        "| file | trains | device, MB | host, MB | disk, MB | received in an update, MB |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        sizes = " | ".join(f"{one[key] / 1e6:.1f}" for key in ("device", "host", "disk", "moved"))
        lines.append(f"| `{one['regime']}.json` | {one['home']} | {sizes} |")
    frozen = [one["frozen"] for one in rows if one["frozen"]]
    lines += [f"| `inference.json` | nothing | {size / 1e6:.1f} | | | |" for size in dict.fromkeys(frozen)]
    return "\n".join(lines)


def measure(pool, path: str, regimes=REGIMES, homes=tuple(HOMES)) -> list[dict]:
    base().save_pretrained(path)
    return [row(pool, regime, home, path) for home in homes for regime in regimes]


if __name__ == "__main__":
    from tests.distributed import Pool

    zero.AsyncIOBuilder().load()
    workers = Pool(world_size=2)
    with tempfile.TemporaryDirectory() as temporary:
        print(table(measure(workers, temporary)))
    workers.close()
