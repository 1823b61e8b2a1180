"""What a search for the fastest setting leaves behind: the winner's files, a table and a picture of all trials."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.tuning import RAN, Trial
from engine.tuning_space import PHASES, Space, changed, write_files

MOST_BARS = 60


def write(space: Space, trials: Sequence[Trial], winner: Trial, folder: Path) -> str:
    """Write `recipe.yaml`, `ds_config.json`, `trials.txt`, `trials.json` and `trials.png`; returns the text."""
    write_files(*changed(space.recipe, winner.settings), folder)
    (folder / "trials.json").write_text(json.dumps([trial.as_json() for trial in trials], indent=2) + "\n")
    text = page(space, trials, winner)
    (folder / "trials.txt").write_text(text)
    draw(trials, winner, folder / "trials.png")
    return text


def page(space: Space, trials: Sequence[Trial], winner: Trial) -> str:
    """All trials, the fastest first, of each setting the longest; and what the winner changes."""
    keys = [axis.key for axis in space.axes]
    table = Table(title="seconds of an iteration", title_justify="left")
    for key in keys:
        table.add_column(key.rpartition(".")[2], overflow="fold")
    for name in (*PHASES, "iteration", "of iterations", "peak GB"):
        table.add_column(name, justify="right")
    for trial in _ranked(trials):
        values = (_short(trial.settings[key]) for key in keys)
        if trial.status == RAN:
            seconds = [f"{trial.seconds[phase]:.2f}" for phase in PHASES]
            table.add_row(
                *values,
                *seconds,
                f"{trial.iteration_seconds:.2f}",
                str(trial.iterations),
                f"{trial.peak_bytes / 1e9:.2f}",
                style="bold" if trial == winner else None,
            )
        else:
            table.add_row(*values, "", "", "", trial.status, str(trial.iterations), "")
    text = io.StringIO()
    console = Console(file=text, width=max(140, 16 * (len(keys) + 6)))
    console.print(table)
    own = space.settings(space.own)
    differs = {key: value for key, value in winner.settings.items() if value != own[key]}
    said = ", ".join(f"{key} {json.dumps(value)}" for key, value in differs.items())
    console.print(f"fastest: {said or 'the recipe as it is'}", soft_wrap=True)
    same = [t for t in trials if t.settings == own and t.status == RAN]
    if same and differs:
        longest = max(same, key=lambda trial: trial.iterations)
        console.print(
            f"{winner.iteration_seconds:.2f} s an iteration, the recipe as it was {longest.iteration_seconds:.2f} s"
        )
    return text.getvalue()


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    longest: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.iterations):
        longest[json.dumps(trial.settings)] = trial
    return sorted(longest.values(), key=lambda trial: (-trial.iterations, trial.iteration_seconds))


def draw(trials: Sequence[Trial], winner: Trial, path: Path) -> None:
    """A bar for each setting, its phases one beside the other, the fastest on top; at most MOST_BARS."""
    import matplotlib

    matplotlib.use("Agg")  # no screen on a cluster
    import matplotlib.pyplot as plt

    ran = sorted((t for t in _ranked(trials) if t.status == RAN), key=lambda trial: trial.iteration_seconds)[:MOST_BARS]
    varied = [key for key in winner.settings if len({json.dumps(t.settings[key]) for t in ran}) > 1]
    names = [", ".join(_short(trial.settings[key]) for key in varied) or "as it is" for trial in ran]
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.28 * len(ran)), constrained_layout=True)
    left = [0.0] * len(ran)
    for phase in PHASES:
        widths = [trial.seconds[phase] for trial in ran]
        axis.barh(range(len(ran)), widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(ran)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("seconds of an iteration, median")
    axis.set_title("by " + ", ".join(key.rpartition(".")[2] for key in varied), fontsize=8)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _short(value) -> str:
    return Path(value).stem if isinstance(value, str) and value.endswith(".json") else json.dumps(value).strip('"')
