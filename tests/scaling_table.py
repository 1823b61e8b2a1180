"""The tables of docs/scaling.md: `python -m tests.scaling_table measured` runs, `... paper` predicts.

Measured: three iterations of the quickstart on 1, 2, 4 and 8 ranks of this machine, bytes received in the last one
beside those predicted. Paper: a 70B policy on 8, 64 and 512 GPUs, as many sequences for each GPU, from given rates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from engine import planner, volume
from engine.command_line import load_recipe
from engine.config import Recipe
from engine.ds_config import read_ds_config
from engine.plan_report import most
from tests.launching import launch
from tests.plan_table import MODELS, recipe

RANKS, GPUS = [1, 2, 4, 8], [8, 64, 512]
RATES = volume.Rates(flops_per_second=4e14, network_bytes_per_second=50e9, memory_bytes_per_second=2.5e12)
SEQUENCES = 64
"""Of each GPU in an iteration, in four optimizer steps."""
NF4 = {"model": {"quantization": "nf4"}}


def at_once(sequences: int) -> dict:
    return {"generation": {"max_concurrent_sequences": sequences, "max_new_tokens": 1024}}


VARIANTS = {
    "70B": ("70B", {}),
    "70B, 64 at once": ("70B", at_once(64)),
    "70B in nf4, 32 at once": ("70B", at_once(32) | NF4),
    "the same, critic: trunk": ("70B", at_once(32) | NF4 | {"critic": {"home": "trunk"}}),
    "7B, 64 at once": ("7B", at_once(64)),
}
"""Model, and what differs from 16 sequences at once, micro-batches of 2 and a critic of an adapter."""


def measured(stages: list[str], folder: Path) -> None:
    print("| stage | ranks | generation | inference | training |\n|---|---|---|---|---|")
    for stage in stages:
        for ranks in RANKS:
            run = folder / f"{stage}-{ranks}"
            zero = {"ds_config": f"ds_configs/{stage}.json"}
            settings = load_recipe("launch/recipes/quickstart.yaml", {"zero": zero})
            options = ["--iterations", 3, "--evaluation.dataset", "null", "--output", run]
            done = launch("--zero.ds_config", settings.zero.ds_config, *options, ranks=ranks, timeout=1200)
            assert done.returncode == 0, done.stderr
            row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            raw, cells = read_ds_config(settings.zero.ds_config), [stage.removeprefix("zero"), str(ranks)]
            for phase, of in volume.of_iteration(settings, raw, ranks, on_cuda=False).items():
                wanted = of.gathered + of.reduced
                real = row[f"comm/{phase}_gathered_bytes"] + row[f"comm/{phase}_reduced_bytes"]
                cells.append(f"{wanted:,.0f} + {real - wanted:,.0f}" if real else "0")
            print("|", " | ".join(cells), "|", flush=True)


def on_paper(folder: Path) -> None:
    phases = ("generation", "inference", "training")
    print("| | GPUs | held, GB | received, GB | computing / network, s: generation | inference | training |")
    print("|---|---|---|---|---|---|---|")
    for name, (model, sections) in VARIANTS.items():
        MODELS[model].save_pretrained(folder / model)
        for gpus in GPUS:
            sizes = {"prompts_per_iteration": SEQUENCES * gpus, "max_prompt_tokens": 1024}
            ppo = {"epochs": 1, "minibatch_sequences": SEQUENCES * gpus // 4, "micro_batch_sequences": 2}
            settings = recipe(folder / model, **sections | {"ppo": ppo, "data": sizes})
            print(f"| {name} | {gpus} | {' | '.join(_on(settings, gpus, phases))} |", flush=True)


def _on(settings: Recipe, gpus: int, phases: tuple[str, ...]) -> list[str]:
    asked = (settings, read_ds_config(settings.zero.ds_config), gpus, True, 80 * 10**9)
    held, moved = planner.phases(*asked), volume.of_iteration(*asked)
    times = volume.seconds(settings, moved, gpus, RATES)
    received = sum(of.gathered + of.reduced for of in moved.values())
    return [
        f"{most(held, 'device') / 1e9:.0f}",
        f"{received / 1e9:,.0f}",
        *(f"{times[phase][0]:.0f} / {times[phase][1]:.0f}" for phase in phases),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of docs/scaling.md.")
    parser.add_argument("table", choices=["measured", "paper"])
    parser.add_argument("--stages", nargs="*", default=["zero0", "zero2", "zero3"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.table == "paper":
            on_paper(Path(temporary))
        else:
            measured(options.stages, Path(temporary))


if __name__ == "__main__":
    main()
