"""One trial of launch/tune.py, which starts it: `deepspeed launch/trial.py RECIPE.yaml RECORD.json`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import launchers
from engine.command_line import load_recipe, readable_errors


def main() -> None:
    with readable_errors("this trial"):
        launchers.adopt(os.environ)
        recipe, record = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():
            from engine import dist, trial
        trial.run(load_recipe(recipe), Path(record))
        dist.leave()


if __name__ == "__main__":
    main()
