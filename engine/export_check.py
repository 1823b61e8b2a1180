"""Whether an export computes what the engine did: tried in a fresh process, and judged by what rounding can explain."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from engine import dist, launchers, verify_export
from engine.errors import RunError
from engine.export_source import Source
from engine.merging import Merged
from engine.model_card import Form
from engine.roles import ACTOR, CRITIC

logger = dist.get_logger(__name__)

RELATIVE = "relative to max(1, |number|)"
BOUND = 1e-5
"""Largest deviation that float32 may have, so measured."""
ROUNDINGS = 4
"""How often the rounding of 16-bit types or 8-bit products, measured on the export's own numbers, may be between two
computations: each rounds once, elsewhere, and what is measured is the largest of few."""
MERGED_SHARE = 0.01
"""Of what an adapter changes, what merging may lose before anything is rounded to 16 bit."""


def bound(rounding: float, temperature: float) -> float:
    """Largest deviation that is no fault.

    Args:
        rounding: measured, the type's against float32 arithmetic; 0 in float32.
        temperature: of log-probs, by which logits are divided; 1 for other numbers.
    """
    return BOUND / min(1.0, temperature) + ROUNDINGS * rounding


def verify(folder: Path, form: Form, rows: list[dict], expected: Tensor, source: Source) -> dict:
    """What `verify_export.py` finds, in a process that knows nothing of ranks.

    Args:
        rows: `ids` of a sequence, and `at` which of the loading code's numbers it is compared.
        expected: the numbers there, of all rows, `[N]`.

    Raises:
        RunError: plain libraries can't load the folder.
    """
    of_roles = {"actor": [ACTOR], "critic": [CRITIC]}.get(form.what, [])
    if form.what == "critic" and source.recipe.critic.home == "trunk":
        of_roles = [ACTOR, CRITIC]
    trained = [{"role": role, "file": str(source.checkpoint / f"{role}.safetensors")} for role in of_roles]
    cases = {"function": form.function, "rows": rows, "expected": expected.tolist()}
    cases |= {"trained": trained, "dtype": source.recipe.model.dtype}
    alone = launchers.without_ranks(os.environ)
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "cases.json"
        file.write_text(json.dumps(cases))
        # -P: or the engine's modules would stand before installed ones of the same name.
        command = [sys.executable, "-P", verify_export.__file__, str(folder), str(file)]
        done = subprocess.run(command, env=alone | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"the export can't be loaded by plain libraries:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(found: dict, form: Form) -> list[str]:
    """What to say of a verification.

    Raises:
        RunError: the export is not what the engine computed with, or not finite.
    """
    names = {"logprobs": "log-probs", "values": "values", "score": "scores"}[form.function]
    if found["differing"]:
        shown = ", ".join(found["differing"][:3])
        raise RunError(
            f"{len(found['differing'])} of the export's {found['weights']} weights are not those of the checkpoint "
            f"({shown}); nothing is exported"
        )
    most = bound(found["rounding"], form.temperature if form.function == "logprobs" else 1.0)
    _within(found["deviation"], most, f"{names} of the export", "from the engine's")
    said = [
        f"The code above, in a fresh process on a CPU: {found['numbers']} {names} deviate by at most "
        f"{found['deviation']:.2g} from the engine's (bound {most:.2g}; {RELATIVE})."
    ]
    if found["rounding"]:
        said.append(f"Its rounding makes {found['rounding']:.2g}: the same code and weights in float32 arithmetic.")
    if found["weights"]:
        said.append(f"All {found['weights']} trained weights are bitwise those of the checkpoint.")
    return said


def judge_merged(source: Source, merged: Merged, expected: Tensor, found: dict) -> list[str]:
    """What to say of a merged model: each step from the engine's adapter to the folder's weights has its own bound.

    Args:
        expected: the engine's log-probs; `found` is of those that the merged weights have in float32.

    Raises:
        RunError: as `judge`.
    """
    kind, wanted = source.recipe.model.dtype, source.wanted.dtype
    temperature = source.recipe.generation.temperature or 1.0
    apart, most = verify_export.deviation(merged.apart, expected), bound(merged.rounding, temperature)
    exact = bound(0.0, temperature)
    _within(apart, most, "adapter and base in plain peft", "from the engine")
    if not merged.lost_by_merging <= MERGED_SHARE:  # of a large model float32 rounds more than the bound
        _within(merged.merging, exact, "the merged weights", "from adapter and base")
    _within(found["exact"], exact, "the weights that were written", "from those that were merged")
    _within(found["rounding"], math.inf, f"log-probs in {wanted}", "from float32")
    lost = f"Rounding to {wanted} took {merged.lost:.1%} of what the adapter changes in these log-probs."
    if merged.lost > 0.05:
        logger.warning("%s Export in float32, or serve the adapter beside its base", lost)
    return [
        f"Adapter beside base in plain peft, float32: {found['numbers']} log-probs deviate by at most {apart:.2g} from "
        f"the engine's {kind} (bound {most:.2g}; {RELATIVE}).",
        f"Merging adds {merged.merging:.2g}. The code above, in a fresh process on a CPU and in float32, computes what "
        f"the merged weights did, rounded to {wanted}, to {found['exact']:.2g} (bound {exact:.2g}).",
        lost,
    ]


def _within(deviation: float, most: float, what: str, of: str) -> None:
    if not (deviation <= most and math.isfinite(deviation)):
        raise RunError(
            f"{what} deviate by up to {deviation:.2g} {of}, and at most {most:.2g} can be rounding; nothing is exported"
        )
