"""Train a policy by PPO: `deepspeed --num_accelerators 2 launch/train.py [RECIPE.yaml] [--section.key value ...]`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import launchers
from engine.command_line import parse, readable_errors


def main() -> None:
    with readable_errors():
        launchers.adopt(os.environ)
        recipe = parse(sys.argv[1:])
        # Here and not above: torch and DeepSpeed take seconds to import, a bad recipe and --help answer at once.
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():
            from engine import dist
            from engine.trainer import train
        train(recipe)
        dist.leave()


if __name__ == "__main__":
    main()
