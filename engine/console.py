"""What a person sees while a run goes on: quiet libraries, one log format, progress bars with the time left."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine import dist

CONSOLE = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
"""The one console: bars and log lines share it, so that neither tears the other."""


def set_up_logging() -> None:
    """The engine's log lines on rank 0; libraries speak of errors alone, unless ALTERNATOR_VERBOSE is set."""
    handler = RichHandler(console=CONSOLE, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    if os.environ.get("ALTERNATOR_VERBOSE"):
        return
    warnings.filterwarnings("ignore")
    for name in ("torch", "deepspeed", "DeepSpeed", "transformers", "datasets", "bitsandbytes", "peft", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import torch's and DeepSpeed's friends inside: what they announce while being imported is kept off the screen."""
    if not os.environ.get("ALTERNATOR_VERBOSE"):
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def progress_bar(label: str, total: int, completed: int = 0) -> Iterator[Callable[..., None]]:
    """A bar with the time left, on rank 0; the function that it gives moves it (by one) and sets its note."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    # rich forgets after half a minute, which one step can take.
    with Progress(*columns, console=CONSOLE, disable=dist.rank() != 0, speed_estimate_period=86400) as progress:
        task = progress.add_task(label, total=total, completed=completed, note="")
        yield lambda note="", by=1: progress.update(task, advance=by, note=note)
