"""The mutation harness: its table fits the source, it kills mutants, and it tells one that was not killed."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests import mutants
from tests.mutant_table import MUTANTS, Mutant

SAMPLE = ("value-clip-dropped", "value-one-late", "kl-loss-unweighted")


def test_every_mutant_fits_the_source():
    assert mutants.problems(MUTANTS) == []


@pytest.mark.slow
def test_a_sample_is_killed():
    command = [sys.executable, mutants.__file__, "--only", *SAMPLE]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(SAMPLE)} of {len(SAMPLE)} mutants killed" in result.stdout


def test_an_unknown_name_is_an_error(capsys):
    with pytest.raises(SystemExit):
        mutants.main(["--only", "no-such-mutant"])
    assert "no-such-mutant" in capsys.readouterr().err


# A project of one function, one test and git, for the harness's own behaviour.
GOOD = Mutant("plus", "sums.py", "a + b", "a - b", "adds", ("test_sums.py",), timeout_seconds=30)


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sums.py").write_text("from sums import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    (tmp_path / "ignored.py").write_text("")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_mutants.py").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def tree(project, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("copy")
    mutants.copy_tree(target, project)
    return target


def test_the_copy_has_the_working_files_but_not_ignored_ones_nor_this_test(tree):
    assert sorted(str(path.relative_to(tree)) for path in tree.rglob("*")) == [".gitignore", "sums.py", "test_sums.py"]


@pytest.mark.parametrize(
    "new, verdict, detail",
    [
        ("a - b", "killed", "test_sums.py::test_add"),
        ("b + a", "SURVIVED", "all of test_sums.py passed"),
        ("a + b\nimport nothing", "BROKEN", "pytest exit code 2"),
    ],
)
def test_verdicts(tree, new, verdict, detail):
    source = (tree / "sums.py").read_text()
    outcome = mutants.run_mutant(replace(GOOD, new=new), tree)
    assert outcome.verdict == verdict and outcome.detail.startswith(detail)
    assert (tree / "sums.py").read_text() == source


def test_a_mutant_that_hangs_is_broken(tree):
    outcome = mutants.run_mutant(replace(GOOD, new="a + b\nwhile True: pass", timeout_seconds=3), tree)
    assert outcome.verdict == "BROKEN" and outcome.detail.startswith("timed out after 3 s")


def test_a_declared_exit_code_counts_as_killed(tree):
    mutant = replace(GOOD, new="a + b\nimport nothing", exit_codes=(2,))
    assert mutants.run_mutant(mutant, tree).killed


@pytest.fixture
def console() -> Console:
    return Console(record=True, file=io.StringIO(), width=200)


def test_nothing_is_run_when_the_tests_fail_without_a_mutant(project, console):
    (project / "sums.py").write_text("def add(a, b):\n    return a + b + 1\n")
    assert not mutants.run_all([GOOD], console, project)
    assert "don't pass without a mutant" in console.export_text()


def test_one_survivor_fails_the_run_and_stands_in_the_table(project, console):
    assert not mutants.run_all([GOOD, replace(GOOD, name="swapped", new="b + a")], console, project)
    text = console.export_text()
    assert "1 of 2 mutants killed" in text and "swapped: SURVIVED" in text and "test_sums.py::test_add" in text


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"old": "a * b"}, "occurs 0 times"),
        ({"old": "a"}, "occurs 3 times"),
        ({"new": "a + b"}, "the new text is the old one"),
        ({"new": "a +"}, "is no Python"),
        ({"file": "gone.py"}, "no file gone.py"),
        ({"tests": ("test_gone.py::test_it",)}, "no test file test_gone.py"),
        ({"tests": ()}, "no tests are named"),
    ],
)
def test_rows_that_do_not_fit_are_told(project, change, problem):
    found = mutants.problems([replace(GOOD, **change)], project)
    assert len(found) == 1 and problem in found[0]


def test_names_are_unique(project):
    assert mutants.problems([GOOD, GOOD], project) == ["plus: the name is used 2 times"]
