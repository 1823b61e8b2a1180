"""Bytes of a rank before anything is launched: `python launch/plan.py [RECIPE.yaml] --gpus N [--gpu-memory 80GB]`."""

import gc
import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.checks import check_world
from engine.command_line import byte_size, count, parse, parser_beside_recipe, readable_errors
from engine.ds_config import read_ds_config
from engine.errors import RecipeError


def main() -> None:
    with readable_errors("this plan"):
        options, rest = _arguments()
        recipe = parse(rest)
        check_world(recipe)
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        gc.disable()  # a plan takes seconds: there is nothing to collect, and looking for it takes half of one
        # Nothing is quantized here, and peft would wait for it: it takes a second and a half to import.
        sys.modules["bitsandbytes"] = None
        with quiet_imports():
            from engine import fitting, plan_report, planner, volume
        raw = read_ds_config(recipe.zero.ds_config)
        asked = (recipe, raw, options.gpus, not options.on_cpu, options.gpu_memory)
        found, moved = planner.phases(*asked), volume.of_iteration(*asked)
        times = _seconds(options, recipe, moved)
        try:
            if options.json:
                options.json.write_text(json.dumps(plan_report.as_json(found, moved, times), indent=2) + "\n")
            if options.png:
                plan_report.draw(found, options.gpu_memory, options.png)
        except OSError as error:
            raise RecipeError(f"{error.filename} can't be written ({error.strerror}); name another file") from None
        print(plan_report.page(found, options.gpu_memory), plan_report.traffic_page(moved, times), sep="\n", end="")
        ranks_of_a_node = options.gpus // options.nodes
        shares = [size and size // ranks_of_a_node for size in (options.cpu_memory, options.nvme)]
        job = fitting.Job(recipe, options.gpus, not options.on_cpu, options.gpu_memory, *shares)
        if over := job.over(found):
            raise RecipeError(_too_much(found, over) + "; " + _remedy(fitting.nearest(job), fitting.devices(job)))


def _too_much(found: dict, over: dict[str, tuple[int, int]]) -> str:
    """What a plan needs and there isn't, in words."""
    from engine.plan_report import device_total

    said = {"device": "--gpu-memory", "host": "its share of --cpu-memory", "disk": "its share of --nvme"}
    phase = max(found, key=lambda phase: device_total(found[phase]))
    where = {"device": f"in {phase}", "host": "in host memory", "disk": "on NVMe"}
    return ", and ".join(
        f"{where[place]} a rank needs {needed / 1e9:.1f} GB, and {said[place]} is {room / 1e9:.1f} GB"
        for place, (needed, room) in over.items()
    )


def _seconds(options: Namespace, recipe, moved: dict) -> dict | None:
    """By phase, where all rates were given."""
    from engine import volume

    rates = (options.flops, options.network, options.memory_speed)
    if None in rates:
        return None
    try:
        return volume.seconds(recipe, moved, options.gpus, volume.Rates(*rates))
    except AttributeError as error:
        raise RecipeError(f"--flops is for models that are built as Llama is, got one that isn't: {error}") from error


def _remedy(settings: dict[str, object], devices: int | None) -> str:
    """What makes it fit, in words."""
    options = " ".join(
        f"--{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
        for key, value in settings.items()
    )
    ways = [f"it fits with {options}"] if settings else []
    ways += [f"{'or ' if ways else 'it fits '}on {devices} devices"] if devices else []
    return " ".join(ways) or "no setting that is known makes it fit; take a smaller model"


def _arguments() -> tuple[Namespace, list[str]]:
    """The plan's own options, and the recipe's."""
    parser = parser_beside_recipe(
        "launch/plan.py",
        "What a rank holds in each phase, from the configs of the recipe's models: no weight is read.\n"
        "Weights, gradients, optimizer, DeepSpeed's buckets, the sampler's copy, KV cache, log-probs, activations.",
    )
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="devices of the whole job, a rank each")
    parser.add_argument("--gpu-memory", type=byte_size, metavar="SIZE", help="of one device, such as 80GB or 24GiB")
    parser.add_argument("--nodes", type=count, default=1, metavar="M", help="hosts that the devices are in, evenly")
    parser.add_argument("--cpu-memory", type=byte_size, metavar="SIZE", help="of one host, for what is offloaded there")
    parser.add_argument("--nvme", type=byte_size, metavar="SIZE", help="of one host, for what is offloaded there")
    parser.add_argument("--on-cpu", action="store_true", help="the ranks compute on CPUs: smaller buckets")
    parser.add_argument("--flops", type=float, metavar="RATE", help="that a device reaches, such as 4e14: seconds, too")
    parser.add_argument("--network", type=float, metavar="RATE", help="bytes a second that reach a rank, such as 25e9")
    parser.add_argument("--memory-speed", type=float, metavar="RATE", help="bytes a second of its memory, such as 2e12")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the plan as a picture: a bar for each phase")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the plan once more, in bytes, for machines")
    options, rest = parser.parse_known_args()
    if options.gpus % options.nodes:
        parser.error(f"--nodes must divide the {options.gpus} of --gpus, got {options.nodes}")
    return options, rest


if __name__ == "__main__":
    main()
