"""One role of a run for plain libraries: `python launch/export.py RUN --what actor|critic|merged|reward`."""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.command_line import readable_errors


def main() -> None:
    with readable_errors("this export"):
        arguments = _parser().parse_known_args()  # torch takes seconds to import, --help answers at once
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():
            from engine.export_source import Wanted
            from engine.exporting import export
        options, rest = arguments
        export(Wanted(**vars(options), overrides=[word for word in rest if not word.startswith("--local_rank")]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="launch/export.py",
        description="Write one role of a run for plain transformers and peft, and verify it by loading it in a fresh "
        "process: log-probs, values or scores must be the engine's.",
        epilog="Every key of the recipe is an option too: --model.path FOLDER where the base lies elsewhere by now. "
        "For a model that needs several devices: deepspeed --num_accelerators N launch/export.py",
        allow_abbrev=False,
    )
    parser.add_argument(
        "place", metavar="RUN", type=Path, help="a run's folder (its newest checkpoint), or a checkpoint"
    )
    parser.add_argument("--what", required=True, choices=("actor", "critic", "merged", "reward"))
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="a folder that isn't there yet; default RUN/export/WHAT"
    )
    parser.add_argument(
        "--reward", metavar="NAME", help="which one, by its name in the metrics, where there are several"
    )
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=kinds, help="of merged weights (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
