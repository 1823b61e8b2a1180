"""The tables of docs/scaling.md: `python -m tests.scaling_table measured` runs, `... paper` predicts.

Measured: three iterations of the quickstart on 1, 2, 4 and 8 ranks of this machine, bytes received in the last one
beside those predicted. Paper: a 70B policy on 8, 64 and 512 GPUs, as many sequences for each GPU, from given rates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from engine import planner, shapes, volume
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
VARIANTS = {
    "micro-batches of 2": {},
    "micro-batches of 8": {"ppo": {"micro_batch_sequences": 8}},
    "micro-batches of 8, critic: trunk": {"ppo": {"micro_batch_sequences": 8}, "critic": {"home": "trunk"}},
    "micro-batches of 8, critic: trunk, old log-probs of the sampler": {
        "ppo": {"micro_batch_sequences": 8, "old_logprobs": "rollout"},
        "critic": {"home": "trunk"},
    },
}


def measured(stages: list[str], folder: Path) -> None:
    print("| stage | ranks | phase | predicted | received | other |\n|---|---|---|---|---|---|")
    for stage in stages:
        for ranks in RANKS:
            run = folder / f"{stage}-{ranks}"
            settings = load_recipe(
                "launch/recipes/quickstart.yaml", {"zero": {"ds_config": f"ds_configs/{stage}.json"}}
            )
            options = ["--iterations", 3, "--evaluation.dataset", "null", "--output", run]
            done = launch("--zero.ds_config", settings.zero.ds_config, *options, ranks=ranks, timeout=1200)
            assert done.returncode == 0, done.stderr
            row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            raw = read_ds_config(settings.zero.ds_config)
            for phase, of in volume.of_iteration(settings, raw, ranks, on_cuda=False).items():
                wanted = of.gathered + of.reduced
                real = row[f"comm/{phase}_gathered_bytes"] + row[f"comm/{phase}_reduced_bytes"]
                print(
                    f"| {stage} | {ranks} | {phase} | {wanted:,.0f} | {real:,.0f} | {real - wanted:,.0f} |", flush=True
                )


def on_paper(folder: Path) -> None:
    MODELS["70B"].save_pretrained(folder)
    phases = ("generation", "inference", "training")
    print("| | GPUs | held, GB | received, GB | computing / network, s: generation | inference | training |")
    print("|---|---|---|---|---|---|---|")
    for name, sections in VARIANTS.items():
        for gpus in GPUS:
            sizes = {"prompts_per_iteration": SEQUENCES * gpus, "max_prompt_tokens": 1024}
            ppo = {"epochs": 1, "minibatch_sequences": SEQUENCES * gpus // 4, "micro_batch_sequences": 2}
            settings = recipe(folder, **sections | {"ppo": ppo | sections.get("ppo", {}), "data": sizes})
            print(f"| {name} | {gpus} | {' | '.join(_on(settings, gpus, phases))} |", flush=True)


def _on(settings: Recipe, gpus: int, phases: tuple[str, ...]) -> list[str]:
    asked = (settings, read_ds_config(settings.zero.ds_config), gpus, True, 80 * 10**9)
    held, moved = planner.phases(*asked), volume.of_iteration(*asked)
    copy = sum(held["generation"][shapes.SHARED].device[part] for part in (planner.WEIGHTS, planner.COPY))
    times = volume.seconds(settings, moved, gpus, RATES, copy)
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
