"""Whether an export computes what the engine did: tried in a fresh process, and judged by what rounding can explain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from engine import dist, models, verify_export
from engine.errors import RunError
from engine.export_source import Source
from engine.merging import Merged
from engine.model_card import Form
from engine.roles import ACTOR, CRITIC

logger = dist.get_logger(__name__)

TOLERANCES = {name: 1e-5 if name == "float32" else 4 * torch.finfo(kind).eps for name, kind in models.DTYPES.items()}
"""Largest deviation, relative to max(1, |number|): for 16 bit four of its roundings, as docs/export.md explains."""


def verify(folder: Path, form: Form, rows: list[dict], source: Source) -> dict:
    """What `verify_export.py` finds, in a process that knows nothing of ranks.

    Raises:
        RunError: plain libraries can't load the folder.
    """
    of_roles = {"actor": [ACTOR], "critic": [CRITIC]}.get(form.what, [])
    if form.what == "critic" and source.recipe.critic.home == "trunk":
        of_roles = [ACTOR, CRITIC]
    trained = [{"role": role, "file": str(source.checkpoint / f"{role}.safetensors")} for role in of_roles]
    cases = {"function": form.function, "rows": rows, "trained": trained, "dtype": source.recipe.model.dtype}
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if name not in group}
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "cases.json"
        file.write_text(json.dumps(cases))
        # -P: or the engine's modules would stand before installed ones of the same name.
        command = [sys.executable, "-P", verify_export.__file__, str(folder), str(file)]
        done = subprocess.run(command, env=alone | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"the export can't be loaded by plain libraries:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(found: dict, tolerance: float, form: Form) -> list[str]:
    """What to say of a verification.

    Raises:
        RunError: the export is not what the engine computed with.
    """
    names = {"logprobs": "log-probs", "values": "values", "score": "scores"}[form.function]
    if found["differing"]:
        shown = ", ".join(found["differing"][:3])
        raise RunError(
            f"{len(found['differing'])} of the export's {found['weights']} weights are not those of the checkpoint "
            f"({shown}); nothing is exported"
        )
    if not found["deviation"] <= tolerance:
        raise RunError(
            f"{names} of the export deviate by up to {found['deviation']:.2g} from the engine's, and at most "
            f"{tolerance:.2g} can be rounding; nothing is exported"
        )
    said = [
        f"The code above, in a fresh process on a CPU: {found['numbers']} {names} deviate by at most "
        f"{found['deviation']:.2g} (bound {tolerance:.2g}; relative to max(1, |number|))."
    ]
    if found["weights"]:
        said.append(f"All {found['weights']} trained weights are bitwise those of the checkpoint.")
    return said


def judge_merged(source: Source, merged: Merged, rows: list[dict]) -> list[str]:
    """Compare with the engine what plain peft computes in float32; in 16 bit that is what the folder is held to.

    Its own figure then is sharp: what the engine rounds would hide a young adapter that is missing altogether.

    Args:
        rows: their `expected` changes where the run was in 16 bit.
    """
    kind, largest = source.recipe.model.dtype, 0.0
    for row, apart in zip(rows, merged.apart, strict=True):
        largest = max(largest, _deviation(apart[row["at"]], torch.tensor(row["expected"])))
        if kind != "float32":
            row["expected"] = apart[row["at"]].tolist()
    if not largest <= TOLERANCES[kind]:
        raise RunError(
            f"adapter and base in plain peft deviate by up to {largest:.2g} from the engine, and at most "
            f"{TOLERANCES[kind]:.2g} can be rounding; nothing is exported"
        )
    lost = f"Rounding to {source.wanted.dtype} took {merged.lost:.1%} of what the adapter changes in these log-probs."
    if merged.lost > 0.05:
        logger.warning("%s Export in float32, or serve the adapter beside its base", lost)
    return [f"Adapter beside base, in float32: at most {largest:.2g} from the engine's {kind}.", lost]


def _deviation(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
