"""The shape of the code, held by reading its syntax trees: layers, seams, sizes, and what must not be written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from engine.config import REPOSITORY

LAYERS = [
    {"errors", "combinations", "device_memory", "section", "progress", "fetching", "onednn", "pointwise", "attention"}
    | {"checkpoint_store", "liveness", "verify_export", "ds_checks"},
    {"checkpoint_config", "role_config", "failure_config", "traffic", "swap_folder", "launchers"},
    {"ppo", "batch", "causal", "config", "dist", "randomness", "stories", "reward_text", "stopping", "workloads"},
    {"role_steps", "optimizer_state", "ds_config", "sharded_loading", "identity", "run_state", "findings"},
    {"zero", "plugins", "command_line", "console", "minibatches", "models", "prompts", "metrics"}
    | {"scoring", "flops", "machine", "kv_cache"},
    {"adapters", "sampling", "fused_lora", "vocabulary_head", "model_card", "merging", "chat"}
    | {"environment_checks"}
    | {"shapes"},
    {"roles", "adapter_checks"},
    {"weight_groups", "activations", "loading_bytes"},
    {"replica", "model_checks", "planner"},
    {"hybrid_engine", "checks", "logprob_memory", "volume"},
    {"checkpoint", "export", "reward_sources", "watchdog", "preparation", "plan_report"},
    {"rollout", "evaluation", "advantages", "update", "supervised", "resume", "interruption"}
    | {"export_source", "fitting"},
    {"heldout", "toyworld", "export_check", "probes", "tuning_space"},
    {"report", "benchmark_report", "run_folder", "self_checks", "tuning", "candidates"},
    {"divergence", "trials"},
    {"trainer", "exporting", "tuning_report"},
    {"benchmark", "doctor"},
    {"trial"},
]
"""DESIGN.md section 4 from the bottom up: a module imports from layers strictly below its own."""

LIGHT = ["combinations", "config", "command_line", "ds_config", "plugins", "checks", "model_checks", "reward_text"]
LIGHT += ["ds_checks", "adapter_checks", "section", "checkpoint_config", "role_config", "failure_config", "launchers"]
PHASES = {"rollout", "evaluation", "advantages", "update", "supervised"}
LAYER_OF = {name: index for index, layer in enumerate(LAYERS) for name in layer}
MODULES = {path.stem: path for path in sorted((REPOSITORY / "engine").glob("*.py")) if path.stem != "__init__"}
SOURCES = [path for folder in ("engine", "launch", "tests") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
FILE_LINES, FUNCTION_LINES = 420, 70


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def running_code(tree: ast.AST):
    """All nodes, but those under `if TYPE_CHECKING:`, which names types and never runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from running_code(node)


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that the code imports, in functions too; `from a import b` gives both a and a.b."""
    found = set()
    for node in running_code(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its layer"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree)}


def engine_imports(tree: ast.AST) -> set[str]:
    return {parts[1] for name in imports(tree) if (parts := name.split("."))[0] == "engine" and len(parts) > 1}


def uses(tree: ast.AST, dotted: str) -> bool:
    """Whether `dotted` (or something below it) is imported or written out as an attribute."""
    written = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return any(name == dotted or name.startswith(dotted + ".") for name in imports(tree) | written)


def calls(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_every_module_has_a_layer():
    assert LAYER_OF.keys() == MODULES.keys()
    assert sum(map(len, LAYERS)) == len(LAYER_OF), "a module in two layers"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    imported = engine_imports(tree_of(MODULES[name]))
    assert imported <= MODULES.keys(), "an import that is no module"
    upwards = {other for other in imported if LAYER_OF[other] >= LAYER_OF[name]}
    assert not upwards, f"engine/{name}.py imports {upwards}, not below it"


def test_phases_do_not_know_each_other():
    """Not even their types: they meet in the trainer, through the records of batch.py."""
    for name in PHASES:
        text = MODULES[name].read_text()
        for other in PHASES - {name}:
            assert f"engine.{other}" not in text and f"from engine import {other}" not in text, (name, other)


def test_one_door_to_deepspeed():
    assert [name for name, path in MODULES.items() if uses(tree_of(path), "deepspeed")] == ["zero"]


def test_one_user_of_torch_distributed():
    assert [name for name, path in MODULES.items() if uses(tree_of(path), "torch.distributed")] == ["dist"]


def test_the_mathematics_imports_torch_alone():
    assert packages(tree_of(MODULES["ppo"])) == {"__future__", "torch"}


@pytest.mark.parametrize("name", LIGHT)
def test_a_bad_recipe_is_told_without_torch(name):
    """`--help` and the checks of a recipe answer at once: nothing heavy is imported at the top of these."""
    heavy = {"torch", "transformers", "peft", "datasets", "deepspeed"}
    statements = [node for node in tree_of(MODULES[name]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    top = ast.Module(statements, type_ignores=[])
    assert not packages(top) & heavy
    assert engine_imports(top) <= {*LIGHT, "errors"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_imports_launch(path):
    assert "launch" not in packages(tree_of(path))


def test_the_engine_does_not_import_tests():
    for name, path in MODULES.items():
        assert "tests" not in packages(tree_of(path)), name


@pytest.mark.parametrize("name", MODULES)
def test_the_engine_does_not_print(name):
    assert not [node.lineno for node in calls(tree_of(MODULES[name])) if ast.unparse(node.func) == "print"]


@pytest.mark.parametrize("name", MODULES)
def test_sizes(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= FILE_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert not long, f"functions above {FUNCTION_LINES} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_code_from_strangers(path):
    for node in calls(tree_of(path)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("trust_remote_code") != "True", f"line {node.lineno}"
        if ast.unparse(node.func) == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}: torch.load runs what a pickle says"
        assert "pickle" not in ast.unparse(node.func), f"line {node.lineno}"


def test_trust_in_remote_code_is_off_by_default():
    from engine.config import Recipe

    assert Recipe().model.trust_remote_code is False


BAD = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from engine.trainer import Trainer
import torch
def f():
    from engine import zero as z
    import engine.update
    torch.distributed.barrier()
"""


def test_this_test_can_see():
    tree = ast.parse(BAD)
    assert engine_imports(tree) == {"zero", "update"}
    assert uses(tree, "torch.distributed") and not uses(tree, "deepspeed")
