"""Prove machine and recipe: `deepspeed --num_accelerators 2 launch/doctor.py [RECIPE.yaml] [--section.key ...]`."""

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
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():
            from engine import dist, doctor, findings
        found = doctor.examine(recipe)
        if dist.rank() == 0:
            for one in found:
                verdict = "ok" if one.problem is None else "FAILED"
                print(f"{one.name:21} {verdict:6} {one.seconds:6.2f} s  {one.measured}", flush=True)
        findings.refuse(found)  # exit status 2
        dist.leave()


if __name__ == "__main__":
    main()
