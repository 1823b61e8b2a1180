"""Find the fastest setting that fits: `python launch/tune.py [RECIPE.yaml] --gpus N [--gpu-memory 80GB]`."""

import signal
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.checkpoint_config import seconds_of
from engine.checks import check_world
from engine.command_line import byte_size, count, parse, parser_beside_recipe, readable_errors
from engine.config import locate
from engine.errors import RecipeError, RunError


def main() -> None:
    with readable_errors("this search"):
        options, rest = _arguments()
        recipe = parse(rest)
        check_world(recipe)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a trial that runs ends with the search
            signal.signal(number, lambda received, frame: sys.exit(128 + received))
        from engine.console import progress_bar, quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():  # of hundreds of plans each would say what it can't count, too
            from engine import tuning, tuning_report

            search, trials = _search(recipe, options)
        combinations, total = len(search.candidates()), search.expected_trials()
        with progress_bar("trials", combinations if options.exhaustive else total) as advance:
            trials.done = lambda one: advance(
                f"{one.iteration_seconds:.2f} s" if one.status == tuning.RAN else one.status
            )
            winner = search.exhaustive() if options.exhaustive else search.fastest()
        if winner is None:
            raise RunError(f"no trial ran; of the last one: {trials.made[-1].said}; see {trials.folder}")
        print(tuning_report.write(trials.space, trials.made, winner, options.search), end="")
        print(f"{len(trials.made)} trials, {combinations} combinations that fit; recipe: {options.search}/recipe.yaml")


def _search(recipe, options: Namespace) -> tuple:
    """The search, and what makes its trials; one that was broken off goes on."""
    import torch

    from engine import candidates, device_memory, trials, tuning, tuning_space

    ranks, on_cuda, memory = options.gpus, torch.cuda.is_available(), options.gpu_memory
    if memory is None and on_cuda:
        raise RecipeError("--gpu-memory is needed where there are GPUs: this process takes nothing of them, not a look")
    if memory is None:
        memory = device_memory.free_bytes(torch.device("cpu"), ranks)
    if options.axes:
        axes = tuning_space.read_axes(recipe, options.axes)
    else:
        axes = tuning_space.default_axes(recipe, ranks, on_cuda)
    space = tuning_space.Space(recipe, axes)
    planned = candidates.candidates(space, ranks, on_cuda, memory)
    said = {name: str(value) for name, value in vars(options).items() if name not in ("search", "trial_limit")}
    files = {recipe.zero.ds_config, recipe.zero.frozen_ds_config}
    files |= {file for axis in axes if axis.key.endswith("ds_config") for file in axis.values}
    said["axes"] = [[axis.key, *axis.values] for axis in axes]
    said["files"] = {file: locate(file).read_text() for file in sorted(files)}
    lock = trials.claim(options.search, recipe, said)
    limit = seconds_of(options.trial_limit)
    known = (ranks, options.by, memory, limit, on_cuda, options.hostfile)
    tries = trials.Trials(space, options.search / "trials", lock, *known)
    instead = {} if options.exhaustive else tuning_space.needless(space, planned, on_cuda)
    return tuning.Search(axes, planned, space.own, tries.measure, options.trial_iterations, instead), tries


def _arguments() -> tuple[Namespace, list[str]]:
    """The search's own options, and the recipe's."""
    parser = parser_beside_recipe(
        "launch/tune.py",
        "Plans all combinations of some settings, tries few of them in short real runs, and writes the fastest one\n"
        "as recipe and ds_config. No setting that it tries changes what a run learns.",
    )
    add = parser.add_argument
    add("--gpus", type=count, required=True, metavar="N", help="devices of the whole job, a rank each")
    add("--gpu-memory", type=byte_size, metavar="SIZE", help="of one device, such as 80GB; on CPUs what is free")
    add("--hostfile", type=Path, metavar="FILE", help="DeepSpeed's, for trials on several hosts")
    add("--axes", type=Path, metavar="FILE", help="YAML of settings and the values to try; none: docs/tuning.md")
    default = Path("runs/tune")
    add("--search", type=Path, default=default, metavar="DIR", help="the search's folder, taken up if it is there")
    add("--by", choices=["wall", "cpu"], default="wall", help="seconds that count; cpu: on CPUs that others use, too")
    add("--trial-iterations", type=count, default=2, metavar="N", help="of a short trial, without warm-up (default: 2)")
    add("--trial-limit", default="30m", metavar="TIME", help="a trial that takes longer is a failed one (default: 30m)")
    add("--exhaustive", action="store_true", help="try everything that fits, for comparison")
    options, rest = parser.parse_known_args()
    if options.hostfile and not options.hostfile.is_file():  # DeepSpeed would go on with this host alone
        parser.error(f"--hostfile: {options.hostfile} is no file; name one with a line 'HOST slots=N' for each host")
    try:
        seconds_of(options.trial_limit)
    except ValueError as error:
        parser.error(f"--trial-limit {error}")
    return options, rest


if __name__ == "__main__":
    main()
