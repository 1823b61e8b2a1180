"""Measure the engine: `deepspeed --num_accelerators 2 launch/bench.py WORKLOAD [--json FILE] [--section.key value]`."""

import json
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from engine import launchers
from engine.command_line import parse, parser_beside_recipe, readable_errors
from engine.config import Recipe
from engine.errors import RecipeError


def main() -> None:
    with readable_errors():
        launchers.adopt(os.environ)
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():
            from engine import benchmark, benchmark_report, dist, workloads
        options, overrides = _arguments(workloads.WORKLOADS)
        recipe = _recipe(options.workload, workloads.recipe_of(options.workload, options.assets), overrides)
        result = benchmark.run(options.workload, recipe, options.assets)
        first = dist.rank() == 0
        dist.leave()
        if not first:
            return
        result["command"] = shlex.join(["launch/bench.py", options.workload, *overrides])
        folder = Path(result["folder"])
        for file in {folder / "benchmark.json", options.json or folder / "benchmark.json"}:
            file.write_text(json.dumps(result, indent=2) + "\n")
        benchmark_report.draw_phases(result, folder / "phases.png")
        page = benchmark_report.page(result)
        (folder / "benchmark.txt").write_text(page)
        print(page + f"run folder: {folder}")


def _arguments(known: dict) -> tuple[Namespace, list[str]]:
    """The benchmark's own options, and the recipe's."""
    purposes = "\n".join(f"  {name:12}{workload.purpose}" for name, workload in known.items())
    parser = parser_beside_recipe(
        "launch/bench.py",
        f"Iterations of the real trainer on a made-up model; the first is warm-up.\n\n{purposes}",
        examples="--iterations 6 --critic.home trunk --output DIR",
    )
    parser.add_argument("workload", metavar="WORKLOAD", help="one of those above; first on the line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result once more, for machines")
    help_assets = "where models and prompts are made, and found again (default: %(default)s)"
    parser.add_argument("--assets", type=Path, default=Path("runs/bench"), metavar="DIR", help=help_assets)
    options, rest = parser.parse_known_args()
    if options.workload not in known:
        raise RecipeError(f"workload {options.workload}: unknown; name one of {', '.join(known)} first on the line")
    return options, [word for word in rest if not word.startswith("--local_rank")]


def _recipe(name: str, values: dict, overrides: list[str]) -> Recipe:
    """The workload's recipe by the way that any recipe goes: a file, and the command line that wins over it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return parse([str(file), *overrides])


if __name__ == "__main__":
    main()
