"""Functions named as path/to/file.py:name."""

import pytest

from engine.config import REPOSITORY
from engine.errors import RecipeError
from engine.plugins import load_function


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "calls = []\n"
        "limit = 3\n"
        "@dataclass\nclass Scale:\n    factor: float = 2.0\n"
        "def brevity(prompts, responses):\n    calls.append(1)\n    return [float(-len(r)) for r in responses]\n"
        "def count(prompts, responses):\n    return [float(len(calls)) for _ in responses]\n"
    )
    return file


def problem(spec) -> str:
    with pytest.raises(RecipeError) as caught:
        load_function(str(spec))
    return str(caught.value)


def test_loads_and_calls(plugin):
    assert load_function(f"{plugin}:brevity")(["a"], ["xyz"]) == [-3.0]


def test_two_functions_of_a_file_share_its_module(plugin):
    load_function(f"{plugin}:brevity")(["a"], ["x"])
    load_function(f"{plugin}:brevity")(["a"], ["x"])
    assert load_function(f"{plugin}:count")(["a"], ["x"]) == [2.0]


def test_relative_path_is_from_the_working_directory(plugin, monkeypatch):
    monkeypatch.chdir(plugin.parent)
    assert load_function("my_rewards.py:brevity")([], ["ab"]) == [-2.0]


def test_a_file_of_the_engine_is_found_from_anywhere_and_not_copied(tmp_path, monkeypatch):
    import engine.plugins

    monkeypatch.chdir(tmp_path)
    assert load_function("engine/plugins.py:load_function") is engine.plugins.load_function
    assert load_function(f"{REPOSITORY}/engine/plugins.py:load_function") is engine.plugins.load_function


@pytest.mark.parametrize("spec", ["my_rewards.py", "my_rewards.brevity", ":brevity", "my_rewards.py:", "f.py:a-b"])
def test_not_in_the_form(spec):
    said = problem(spec)
    assert "path/to/file.py:name" in said and repr(spec) in said


def test_missing_file(tmp_path):
    assert "no Python file" in problem(f"{tmp_path}/none.py:f") and "none.py" in problem(f"{tmp_path}/none.py:f")


def test_missing_name_lists_what_is_there(plugin):
    said = problem(f"{plugin}:brevitty")
    there = said.split("it has ")[1].split(", ")
    assert "has no brevitty" in said
    assert there == ["Scale", "brevity", "count"]  # not limit, no function; not dataclass, imported


def test_not_callable(plugin):
    assert "limit is of type int" in problem(f"{plugin}:limit")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1\ndef f(:\n", ["SyntaxError", "line 2"]),
        ("import os\n\nimport nothing_like_this\n", ["ModuleNotFoundError", "nothing_like_this", "line 3"]),
        ("def g():\n    return 1 / 0\nx = g()\n", ["ZeroDivisionError", "line 2"]),
    ],
)
def test_a_file_that_does_not_run(tmp_path, source, parts):
    file = tmp_path / "broken.py"
    file.write_text(source)
    said = problem(f"{file}:f")
    assert all(part in said for part in [*parts, str(file)])
    assert problem(f"{file}:f") == said  # the failed module isn't left behind half-made
