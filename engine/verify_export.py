"""What an export computes in a fresh process of plain libraries: `python -P engine/verify_export.py FOLDER CASES`.

Imports nothing of the engine. It runs the loading code of the folder's own page, as a person would who copies it, and
writes one JSON object to standard output:

    deviation   largest |found - expected| / max(1, |expected|) over all numbers of all cases
    numbers     how many those were
    differing   names of weights that are not bitwise what the checkpoint holds
    weights     how many were compared
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open

MASTER = "/master"


def main(folder: str, file: str) -> None:
    cases = json.loads(Path(file).read_text())
    (code,) = re.findall(r"^```python\n(.*?)^```", (Path(folder) / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {"folder": folder}
    exec(code, names)
    found = _outputs(names[cases["function"]], cases["rows"])
    compared, differing = _weights(names, cases["trained"], getattr(torch, cases["dtype"]))
    found |= {"weights": compared, "differing": differing}
    sys.stdout.write(json.dumps(found) + "\n")


def _outputs(function, rows: list[dict]) -> dict:
    """Each row alone and without padding: nobody else's mask or batch has a part in it."""
    deviations = []
    for row in rows:
        with torch.no_grad():
            all_of_it = function(torch.tensor([row["ids"]])).double().flatten()
        expected = torch.tensor(row["expected"], dtype=torch.float64)
        deviations.append((all_of_it[row["at"]] - expected).abs() / expected.abs().clamp(min=1))
    whole = torch.cat(deviations)
    return {"deviation": whole.max().item(), "numbers": len(whole)}


def _weights(names: dict, trained: list[dict], dtype: torch.dtype) -> tuple[int, list[str]]:
    """Weights as they were loaded against the run's float32 masters, rounded to the type that the run computes in."""
    loaded = dict(names["model"].named_parameters())
    if "head" in names:
        loaded["value_head.weight"] = names["head"]
    compared, differing = 0, []
    for part in trained:
        with safe_open(part["file"], framework="pt") as masters:
            for key in (key for key in masters.keys() if key.endswith(MASTER)):  # noqa: SIM118 (no dict)
                name, compared = key.removesuffix(MASTER).replace(f".{part['role']}.", ".default."), compared + 1
                mine, wanted = loaded.get(name), masters.get_tensor(key).to(dtype)
                if mine is None or not torch.equal(mine.detach(), wanted.to(mine.dtype)):
                    differing.append(name)
    return compared, differing


if __name__ == "__main__":
    main(*sys.argv[1:])
