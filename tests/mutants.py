"""Mutation testing: break the code on purpose, one line at a time, and see the tests notice.

    python tests/mutants.py                      every mutant of mutant_table.py (minutes)
    python tests/mutants.py --short              those that a single process kills in seconds
    python tests/mutants.py --only kl-sign ...   these
    python tests/mutants.py --file engine/ppo.py those of one file
    python tests/mutants.py --check              only that each one still fits the source; runs no test

A mutant is one replacement in a copy of the tree, of which the named tests must fail (pytest exit code 1). One that all
tests pass has survived: a bug like it would go unnoticed. One that can't be imported or collected is broken and proves
nothing. The tree itself is never changed. Exit status 0 if every mutant was killed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, this file sees only its own folder

from tests.mutant_table import MUTANTS, Mutant  # noqa: E402

# The test that runs this file must not find itself in the copy, or it would copy and run itself without end.
NOT_COPIED = {"tests/test_mutants.py"}


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    mutant: Mutant
    verdict: str  # killed, SURVIVED or BROKEN
    detail: str  # the test that failed, or why nothing was proved
    seconds: float

    @property
    def killed(self) -> bool:
        return self.verdict == "killed"


def problems(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """Why rows of the table don't fit the tree (any more), one line each."""
    found = [f"{name}: the name is used {n} times" for name, n in Counter(m.name for m in mutants).items() if n > 1]
    for mutant in mutants:
        found += [f"{mutant.name}: {problem}" for problem in _misfits(mutant, root)]
    return found


def _misfits(mutant: Mutant, root: Path) -> list[str]:
    if not (root / mutant.file).is_file():
        return [f"no file {mutant.file}"]
    found = [f"no test file {test}" for test in mutant.tests if not (root / test.split("::")[0]).exists()]
    if not mutant.tests:
        found.append("no tests are named")
    source = (root / mutant.file).read_text()
    if (count := source.count(mutant.old)) != 1:
        return [*found, f"the old text occurs {count} times in {mutant.file}, must be once: {mutant.old!r}"]
    if mutant.old == mutant.new:
        found.append("the new text is the old one")
    if mutant.file.endswith(".py"):
        try:
            ast.parse(source.replace(mutant.old, mutant.new))
        except SyntaxError as error:
            found.append(f"the mutated file is no Python: {error}")
    return found


def copy_tree(target: Path, root: Path = ROOT) -> None:
    """What git tracks or would track, as it lies in the working folder: no .venv, no runs."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in set(listed.split("\0")) - {""} - NOT_COPIED:
        if (root / name).is_file():  # a tracked file may have been deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_pytest(tree: Path, tests: Sequence[str], timeout_seconds: float) -> tuple[int | None, str]:
    """Exit code (None: timed out) and output of pytest in `tree`, up to its first failure."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # The copy comes first wherever Python looks, in child processes too. No bytecode: a .pyc is told from its source by
    # size and whole seconds, which two mutants of one file can share. COLUMNS keeps pytest from cutting test names.
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: workers that the tests started go with it
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def run_mutant(mutant: Mutant, tree: Path) -> Outcome:
    """Mutate `tree`, run the mutant's tests, put the file back."""
    path = tree / mutant.file
    source = path.read_text()
    start = time.perf_counter()
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        code, output = run_pytest(tree, mutant.tests, mutant.timeout_seconds)
    finally:
        path.write_text(source)
    seconds = time.perf_counter() - start
    if code in mutant.exit_codes:
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
        return Outcome(mutant, "killed", failed.group(1) if failed else f"exit code {code}", seconds)
    if code == 0:
        return Outcome(mutant, "SURVIVED", f"all of {' '.join(mutant.tests)} passed", seconds)
    reason = f"timed out after {mutant.timeout_seconds:g} s" if code is None else f"pytest exit code {code}"
    return Outcome(mutant, "BROKEN", f"{reason}: {_last_line(output)}", seconds)


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def run_all(mutants: Sequence[Mutant], console: Console, root: Path = ROOT) -> bool:
    """Run every mutant, print the table; whether all were killed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        # What starts ranks of its own keeps every core busy alone.
        trees = [Path(folder, str(index)) for index in range(_cores() if all(m.short for m in mutants) else 1)]
        for tree in trees:
            copy_tree(tree, root)
        # A test that fails anyway would "kill" everything.
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        code, output = run_pytest(trees[0], tests, sum(mutant.timeout_seconds for mutant in mutants))
        if code != 0:
            console.print(output, markup=False)
            console.print(f"the tests don't pass without a mutant (exit code {code}): nothing was run", style="red")
            return False
        free: SimpleQueue[Path] = SimpleQueue()
        for tree in trees:
            free.put(tree)
        counter = itertools.count(1)

        def run_one(mutant: Mutant) -> Outcome:
            tree = free.get()
            try:
                outcome = run_mutant(mutant, tree)
            finally:
                free.put(tree)
            console.print(f"{next(counter)}/{len(mutants)} {mutant.name}: {outcome.verdict}", markup=False)
            return outcome

        with ThreadPoolExecutor(len(trees)) as pool:
            outcomes = sorted(pool.map(run_one, mutants), key=lambda outcome: not outcome.killed)  # bad news last
    console.print(_table(outcomes))
    killed = sum(outcome.killed for outcome in outcomes)
    console.print(f"{killed} of {len(outcomes)} mutants killed", style="green" if killed == len(outcomes) else "red")
    return killed == len(outcomes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table()
    for column in ("mutant", "file", "what it breaks", "verdict", "by", "seconds"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        mutant, style = outcome.mutant, None if outcome.killed else "red"
        by, seconds = outcome.detail.removeprefix("tests/"), f"{outcome.seconds:.1f}"
        # Node ids hold square brackets, which rich would take for markup.
        cells = (x.replace("[", r"\[") for x in (mutant.name, mutant.file, mutant.breaks, outcome.verdict, by, seconds))
        table.add_row(*cells, style=style)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--file", choices=sorted({mutant.file for mutant in MUTANTS}), help="those of this file")
    parser.add_argument("--short", action="store_true", help="the short ones")
    parser.add_argument("--check", action="store_true", help="run nothing; does every mutant fit the source?")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant named {', '.join(sorted(unknown))}")
    mutants = [
        mutant
        for mutant in MUTANTS
        if (options.only is None or mutant.name in options.only)
        and (options.file is None or mutant.file == options.file)
        and (mutant.short or not options.short)
    ]
    console = Console(width=None if sys.stdout.isatty() else 160)
    if found := problems(mutants):
        for line in found:
            console.print(line, style="red", markup=False)
        return 1
    if options.check:
        console.print(f"{len(mutants)} mutants fit the source")
        return 0
    return 0 if run_all(mutants, console) else 1


if __name__ == "__main__":
    sys.exit(main())
