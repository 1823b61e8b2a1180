"""What an export computes in a fresh process of plain libraries: `python -P engine/verify_export.py FOLDER CASES`.

Imports nothing of the engine. It runs the loading code of the folder's own page, as a person would who copies it, and
writes one JSON object to standard output; deviations are largest |one - other| / max(1, |other|) over all numbers:

    deviation   as loaded, from what is expected
    exact       the same weights in float32 arithmetic, from what is expected
    rounding    as loaded, from the same weights in float32 arithmetic: what the type alone does
    numbers     how many numbers those were
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
from torch import Tensor, nn

MASTER = "/master"


def main(folder: str, file: str) -> None:
    cases = json.loads(Path(file).read_text())
    (code,) = re.findall(r"^```python\n(.*?)^```", (Path(folder) / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {"folder": folder}
    exec(code, names)
    model, function, rows = names["model"], names[cases["function"]], cases["rows"]
    use_training_kernels(model)
    expected = torch.tensor(cases["expected"], dtype=torch.float64)
    loaded = _outputs(function, rows)
    compared, differing = _weights(names, cases["trained"], getattr(torch, cases["dtype"]))
    widen(model)
    if "head" in names:
        names["head"] = names["head"].float()
    exact = _outputs(function, rows)
    found = {"deviation": deviation(loaded, expected), "exact": deviation(exact, expected)}
    found |= {"rounding": deviation(loaded, exact), "numbers": len(expected)}
    sys.stdout.write(json.dumps(found | {"weights": compared, "differing": differing}) + "\n")


def use_training_kernels(model: nn.Module) -> None:
    """bitsandbytes computes 4 bit otherwise in eval(), on a CPU with AVX512-BF16: with a kernel that rounds more."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.training = True  # its own flag alone: dropout elsewhere stays off


def widen(model: nn.Module) -> None:
    """The same weights in float32, and arithmetic in it; packed ones are unpacked to what training computed with."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            # Its own: peft's layer around it shows the same one.
            if type(layer._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
                setattr(parent, name, _unpacked(layer))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()


def _unpacked(layer: nn.Module) -> nn.Linear:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight.data, plain.bias = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)), layer.bias
    return plain


def deviation(one: Tensor, other: Tensor) -> float:
    """Largest |one - other|, relative to max(1, |other|)."""
    return ((one - other).abs() / other.abs().clamp(min=1)).max().item()


@torch.no_grad()
def _outputs(function, rows: list[dict]) -> Tensor:
    """Each row alone and without padding: nobody else's mask or batch has a part in it."""
    return torch.cat([function(torch.tensor([row["ids"]])).double().flatten()[row["at"]] for row in rows])


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
