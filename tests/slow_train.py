"""launch/train.py that dwells for a while in the phase named in SLOW, in its second iteration, and marks it."""

import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import trainer  # noqa: E402

DWELL_SECONDS = float(os.environ["DWELL_SECONDS"])
PHASES = {"generation": "generate", "inference": "evaluate", "training": "make_experience"}
calls = 0
whole = getattr(trainer, PHASES[os.environ["SLOW"]])


def slow(*arguments, **named):
    global calls
    calls += 1
    if calls == 2:
        Path(os.environ["MARKER"] + os.environ["RANK"]).touch()
        time.sleep(DWELL_SECONDS)
    return whole(*arguments, **named)


setattr(trainer, PHASES[os.environ["SLOW"]], slow)
runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
