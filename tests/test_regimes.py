"""Every file of ds_configs/ makes a whole iteration of the trainer on two ranks, if a CPU can run it at all."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

from engine import dist, zero
from engine.checks import check_files
from engine.command_line import load_recipe
from engine.config import REPOSITORY
from engine.ds_checks import machine_problems
from engine.ds_config import read_ds_config
from engine.errors import RecipeError
from engine.run_state import Begun
from engine.trainer import Trainer
from tests import checkpoints, regime_bytes, tiny

FILES = sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json") if path.stem != "inference")
NEEDS_CUDA = {"zero3_plus_plus"}

dist_test = pytest.mark.dist


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """A reward model and a reference of their own beside the trained roles: two frozen engines."""
    folder = tmp_path_factory.mktemp("regimes")
    return str(checkpoints.save_recipe(folder, reference={"home": "model"}, **tiny.SWAPPED))


def iterated(recipe: str, sections: dict) -> dict:
    """On a rank: one iteration; its metrics, what lay on the disk meanwhile, and what the engines were."""
    parent = Path(sections["zero"]["nvme_path"])
    output = dist.broadcast_object(tempfile.mkdtemp(dir=parent.parent))
    torch.manual_seed(0)
    trainer = Trainer(load_recipe(recipe, {"output": output, **sections}))
    try:
        base = trainer.engine.frozen_hash()
        metrics = trainer.iterate(Begun(0))
        moved = trainer.engine.frozen_hash() != base
        written = {file.name for file in parent.rglob("*.swp")}
        source = trainer.sources[0].engine.engine.zero_offload_param()
        device = str(trainer.sources[0].engine.module.parameters().__next__().ds_tensor.device) if source else None
        kept = json.loads((Path(output) / "ds_config.json").read_text())
    finally:
        trainer.close()
    dist.barrier()
    left = list(parent.iterdir()) if parent.exists() else []
    return {"metrics": metrics, "moved": moved, "written": written, "left": left, "kept": kept, "reward": device}


def run(pool, recipe: str, folder: Path, file: str) -> list[dict]:
    zero_section = {"ds_config": f"ds_configs/{file}.json", "nvme_path": str(folder / "disk")}
    return pool.run(iterated, recipe, {"zero": zero_section})


@dist_test
@pytest.mark.parametrize("file", [name for name in FILES if name not in NEEDS_CUDA])
def test_a_file_runs_an_iteration(request, pool, recipe, tmp_path, file):
    on_nvme = file == "zero3_nvme"
    if on_nvme:
        request.getfixturevalue("nvme")
    for found in run(pool, recipe, tmp_path, file):
        metrics = found["metrics"]
        assert metrics["policy/first_ratio_deviation"] < 1e-5 and metrics["update/steps"] == 4
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["grad_norm/actor"] > 0 and metrics["grad_norm/critic"] > 0 and not found["moved"]
        assert found["kept"]["gradient_clipping"] == 0.0
        assert any(name.startswith("exp_avg-") for name in found["written"]) == on_nvme
        assert found["left"] == []
        if on_nvme:  # what ran is kept without the name of a folder that is gone
            kept = found["kept"]["zero_optimization"]["offload_optimizer"]
            assert kept["nvme_path"] == str(tmp_path / "disk")


def test_what_no_cpu_can_run_is_refused_before_a_model_loads(recipe, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused = {name for name in FILES if machine_problems(read_ds_config(f"ds_configs/{name}.json"))}
    assert refused == NEEDS_CUDA
    for name in NEEDS_CUDA:
        settings = load_recipe(recipe, {"zero": {"ds_config": f"ds_configs/{name}.json"}})
        with pytest.raises(RecipeError) as caught:
            check_files(settings)
        assert len(caught.value.problems) == 2  # weights and gradients
        for problem in caught.value.problems:
            assert f"{name}.json: zero_optimization.zero_quantized_" in problem and "CUDA" in problem


def test_nvme_without_libaio_is_refused_before_a_model_loads(monkeypatch):
    monkeypatch.setattr(zero, "reaches_nvme", lambda: False)
    for name in FILES:
        raw = read_ds_config(f"ds_configs/{name}.json")
        if name != "zero3_nvme":
            zero.check_offload(raw)
            continue
        with pytest.raises(RecipeError, match="device nvme needs libaio.*apt-get install libaio-dev.*or write cpu"):
            zero.check_offload(raw)


@dist_test
def test_the_table_of_the_readme_is_what_is_measured(pool, nvme, tmp_path):
    rows = regime_bytes.measure(pool, str(tmp_path), homes=("full",))
    bytes_of = {one["regime"]: one for one in rows}
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text()
    for line in regime_bytes.table(rows).splitlines()[2:]:
        assert line in readme, line
    least = ("zero3_cpu_offload", "zero3_cpu_optimizer", "zero3", "zero2", "zero0")
    assert sorted(least, key=lambda name: bytes_of[name]["device"]) == list(least)
    assert bytes_of["zero3_nvme"]["disk"] > 0 == bytes_of["zero3_cpu_offload"]["disk"]


def test_second_shards_take_one_trained_model(recipe):
    for home in ("adapter", "model"):
        settings = load_recipe(recipe, {"zero": {"ds_config": tiny.SECOND_SHARDS}, "critic": {"home": home}})
        if home == "adapter":
            check_files(settings)
            continue
        with pytest.raises(
            RecipeError, match="takes one trained model, got 2 with critic.home model.*adapter or trunk"
        ):
            check_files(settings)
