"""launch/export.py on real runs of two ranks under ZeRO-3: every export computes the same in plain libraries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import TaskType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from engine import export_check, merging, verify_export
from engine.errors import RunError
from engine.export_source import Source, Wanted
from engine.merging import Merged
from engine.model_card import Form, loading_code
from engine.role_config import ModelConfig
from tests import checkpoints, tiny
from tests.launching import launch, launch_plain
from tests.test_adapters import save_adapter

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RATES = {"actor": {"optimizer": {"learning_rate": 1e-2}}, "critic": {"optimizer": {"learning_rate": 1e-2}}}
"""Two iterations must move weights further than rounding does."""


def trained(folder: Path, **sections) -> Path:
    """The folder of a finished run."""
    sharded = {"ds_config": tiny.ds_config("zero3")}
    common = RATES | {"generation": {"max_new_tokens": 6, "temperature": 0.7}}  # log-probs are the sampler's
    sections = {"zero": sharded} | common | sections
    recipe = checkpoints.save_recipe(folder, checkpoint={"every_iterations": 1}, **sections)
    done = launch(recipe)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


def export(*arguments) -> subprocess.CompletedProcess:
    return launch_plain(*map(str, arguments), script="launch/export.py")


def about(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


def weights_of(folder: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {f"{file.name}/{name}": tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return found


LOADED = """
import re, sys, torch
folder, ids = sys.argv[1], torch.tensor([[3, 4, 5, 6, 1]])
names = {"folder": folder}
exec(re.findall(r"^```python\\n(.*?)^```", open(folder + "/README.md").read(), re.DOTALL | re.MULTILINE)[0], names)
print([round(x, 4) for x in names[sys.argv[2]](ids).flatten().tolist()])
"""


def loaded(folder: Path, function: str) -> list[float]:
    """The page's own code, in a process of its own, from another folder."""
    command = [sys.executable, "-c", LOADED, str(folder), function]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("what", "function", "numbers"), [("actor", "logprobs", 4), ("critic", "values", 5), ("reward", "score", 1)]
)
def test_an_export_is_verified_and_its_page_loads_it(run, what, function, numbers):
    done = export(run, "--what", what)
    assert done.returncode == 0, done.stderr
    folder = run / "export" / what
    found = about(folder)
    assert found["deviation"] <= 1e-5 and found["rounding"] == 0 and found["numbers"] >= 8 and found["iteration"] == 2
    assert len(loaded(folder, function)) == numbers
    shapes = weights_of(folder)
    assert shapes and all(0 not in shape for shape in shapes.values())
    page = (folder / "README.md").read_text()
    assert "deviate by at most" in page and str(run.parent / "policy") in page and "learning_curve.png" in page
    assert (folder / "learning_curve.png").stat().st_size > 1000 and (folder / "recipe.yaml").is_file()
    assert (folder / "tokenizer.json").is_file() and not list(folder.parent.glob(".*"))


def test_merged_is_a_plain_model_in_whatever_type_and_on_two_ranks(run):
    done = launch(run, "--what", "merged", script="launch/export.py")
    assert done.returncode == 0, done.stderr
    done = export(run, "--what", "merged", "--dtype", "bfloat16", "--output", run / "half")
    assert done.returncode == 0, done.stderr
    whole, half = run / "export" / "merged", run / "half"
    assert (
        not list(whole.glob("adapter*")) and about(whole)["lost_to_rounding"] < 1e-3 < about(half)["lost_to_rounding"]
    )
    assert (whole / "generation_config.json").is_file()
    assert loaded(whole, "logprobs") == pytest.approx(loaded(half, "logprobs"), abs=0.1)


@pytest.mark.parametrize("critic", [{"home": "trunk"}, {"home": "model", "train": "full"}], ids=lambda c: c["home"])
def test_critics_elsewhere(tmp_path, critic):
    run = trained(tmp_path, critic=RATES["critic"] | critic)
    done = export(run, "--what", "critic")
    assert done.returncode == 0, done.stderr
    assert about(run / "export" / "critic")["deviation"] <= 1e-5
    assert len(loaded(run / "export" / "critic", "values")) == 5


@pytest.mark.parametrize("what", ["actor", "critic", "reward", "merged"])
@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "nf4 in bfloat16"])
def test_what_rounds_is_held_to_what_rounding_does(rounded_runs, kind, what):
    run = rounded_runs(kind)
    done = export(run, "--what", what, *(["--dtype", "bfloat16"] if what == "merged" else []))
    assert done.returncode == 0, done.stderr
    found = about(run / "export" / what)
    assert found["deviation"] <= 1e-5 / 0.7 + 4 * found["rounding"] < 0.5
    if kind == "nf4" and what != "merged":
        assert found["rounding"] < 1e-5 and found["deviation"] < 1e-5
    else:
        assert found["rounding"] > 1e-3


def reward_adapter(folder: Path) -> Path:
    """A sequence classifier's, on the policy."""
    scorer = LlamaForSequenceClassification(checkpoints.config(num_labels=1))
    scorer.model.load_state_dict(LlamaForCausalLM.from_pretrained(folder / "policy").model.state_dict())
    save_adapter(folder / "adapter", scorer, task_type=TaskType.SEQ_CLS, r=4)
    return folder / "adapter"


@pytest.fixture(scope="module")
def rounded_runs(tmp_path_factory):
    """The run of a kind of base, with its reward as an adapter on it; trained when it is first asked for."""
    made = {}

    def run_of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("rounded")
            model = {"dtype": "bfloat16" if "bfloat16" in kind else "float32"}
            model |= {"quantization": "nf4"} if "nf4" in kind else {}
            model |= {"path": str(checkpoints.save_policy(folder / "policy"))}
            made[kind] = trained(folder, model=model, rewards=[{"adapter": str(reward_adapter(folder))}])
        return made[kind]

    return run_of


def test_what_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    done = export(run, "--what", "actor", "--output", tmp_path / "mine")
    assert done.returncode == 2 and "overwrites nothing" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]
    done = export(run, "--what", "reward", "--reward", "nobody", "--output", tmp_path / "new")
    assert done.returncode == 2 and "'nobody'" in done.stderr
    done = export(tmp_path, "--what", "actor")
    assert done.returncode == 2 and "no run's folder" in done.stderr
    checkpoints.save_policy(tmp_path / "other", initializer_range=0.1)
    done = export(run, "--what", "actor", "--output", tmp_path / "new", "--model.path", tmp_path / "other")
    assert done.returncode == 2 and "the base changed since the checkpoint" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_weight_that_is_not_the_checkpoints_is_noticed(run, tmp_path):
    """What the verification says of an export in which one number was changed."""
    output = tmp_path / "export"
    assert export(run, "--what", "actor", "--output", output).returncode == 0
    ids = [3, 4, 5, 6, 1]
    row, expected = {"ids": ids, "at": [0, 1, 2, 3]}, loaded(output, "logprobs")
    trained_in = run / "checkpoints" / "000002" / "actor.safetensors"
    cases = {"function": "logprobs", "rows": [row], "expected": expected, "dtype": "float32"}
    cases["trained"] = [{"role": "actor", "file": str(trained_in)}]
    (tmp_path / "cases.json").write_text(json.dumps(cases))

    def verified() -> dict:
        command = [sys.executable, "-P", verify_export.__file__, str(output), str(tmp_path / "cases.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    whole = verified()
    assert whole["differing"] == [] and whole["weights"] > 10 and whole["deviation"] < 1e-3
    tensors = load_file(output / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 1e-6
    save_file(tensors, output / "adapter_model.safetensors")
    assert [re.sub(r"\.default", "", found) for found in verified()["differing"]] == [name]


AGREES = {"deviation": 0.0, "exact": 0.0, "rounding": 0.0, "numbers": 2, "differing": [], "weights": 4}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"deviation": 2e-5}, "log-probs of the export deviate by up to 2e-05"),
        ({"deviation": float("nan")}, "log-probs of the export deviate by up to nan"),
        ({"deviation": 0.041, "rounding": 0.01}, "at most 0.04 can be rounding"),
        ({"deviation": float("inf"), "rounding": float("inf")}, "log-probs of the export deviate by up to inf"),
        ({"deviation": 0.039, "rounding": 0.01}, None),
        ({"differing": ["lora_A"]}, "1 of the export's 4 weights are not those of the checkpoint (lora_A)"),
    ],
)
def test_what_is_more_than_rounding_is_refused(found, said):
    form = Form("actor", ModelConfig(path="base"), adapter=True)
    if said is None:
        assert "rounding makes 0.01" in " ".join(export_check.judge(AGREES | found, form))
        return
    with pytest.raises(RunError, match=re.escape(said)):
        export_check.judge(AGREES | found, form)


def test_log_probs_at_a_low_temperature_round_more():
    form = Form("actor", ModelConfig(path="base"), adapter=True, temperature=0.1)
    export_check.judge(AGREES | {"deviation": 9e-5}, form)
    with pytest.raises(RunError):
        export_check.judge(AGREES | {"deviation": 2e-4}, form)


@pytest.mark.parametrize("what", ["actor", "merged"])
def test_8_bit_products_round_too(int8_run, what):
    done = export(int8_run, "--what", what)
    assert done.returncode == 0, done.stderr
    assert about(int8_run / "export" / what)["iteration"] == 2


@pytest.fixture(scope="module")
def int8_run(tmp_path_factory) -> Path:
    sections = {"model": {"quantization": "int8"}, "zero": {"ds_config": "ds_configs/zero2.json"}}
    folder = tmp_path_factory.mktemp("int8")
    sections["model"]["path"] = str(checkpoints.save_policy(folder / "policy"))
    return trained(folder, **sections)


@pytest.mark.parametrize(
    ("merged", "found", "said"),
    [
        ({"apart": torch.tensor([-1.0, -2.1])}, {}, "adapter and base in plain peft deviate by up to 0.05 "),
        ({"merging": 2e-5, "lost_by_merging": 0.02}, {}, "the merged weights deviate by up to 2e-05"),
        ({}, {"rounding": float("nan")}, "log-probs in bfloat16 deviate by up to nan"),
        ({"merging": 2e-5, "lost_by_merging": 0.001}, {}, None),
        ({}, {"exact": 2e-5}, "the weights that were written deviate by up to 2e-05"),
        ({"apart": torch.tensor([-1.0, -2.1]), "rounding": 0.02}, {"deviation": 0.5}, None),
    ],
)
def test_each_step_of_a_merge_is_held_to_its_bound(merged, found, said):
    expected = torch.tensor([-1.0, -2.0])
    steps = {"apart": expected, "rounding": 0.0, "merging": 0.0, "lost_by_merging": 0.0}
    steps |= {"rounded": expected, "lost": 0.01} | merged
    wanted = Wanted(Path("run"), "merged", dtype="bfloat16")
    source = Source(wanted, Path(), Path(), {}, tiny.recipe(), tiny.recipe(), Path(), None)
    if said is None:
        assert "took 1.0%" in export_check.judge_merged(source, Merged(**steps), expected, AGREES | found)[-1]
        return
    with pytest.raises(RunError, match=said):
        export_check.judge_merged(source, Merged(**steps), expected, AGREES | found)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["q_proj"]])
def test_a_head_that_changed_alone_is_merged_alone(tmp_path, targets):
    """Where the base has one weight for embeddings and head; one that nothing changed stays one."""
    base = checkpoints.save_policy(tmp_path / "base", tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(base)
    plain = save_adapter(tmp_path / "adapter", model, target_modules=targets, r=4)
    rows = [{"ids": [3, 4, 5, 6, 1], "at": [0, 3]}]
    recipe = tiny.recipe(model={"path": str(base)})
    merged = merging.merge(recipe, tmp_path / "adapter", tmp_path / "merged", "float32", rows)
    assert merged.merging < 1e-5 and merged.rounding == 0 and merged.lost < 1e-3
    ids = torch.tensor([rows[0]["ids"]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(found(ids).logits, plain(ids).logits, atol=1e-5)
    assert found.config.tie_word_embeddings == (targets == ["q_proj"])
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (targets != ["q_proj"])


def test_a_reward_that_is_a_function_is_refused(run, tmp_path):
    function = ("--rewards", '[{"function": "tests/tiny.py:length_reward"}]')
    done = export(run, "--what", "reward", *function, "--output", tmp_path / "new")
    assert done.returncode == 2 and "has no weights" in done.stderr


def test_the_documented_code_is_the_pages(run):
    """Of a critic on the shared base."""
    text = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    assert loading_code(Form("critic", ModelConfig(path="BASE"), adapter=True)) in text


def test_a_run_answers(run, tmp_path):
    def answer(*arguments) -> str:
        command = (run, "--prompt", "abc", "--temperature", "0", *arguments)
        done = launch_plain(*map(str, command), script="launch/chat.py")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    trained_one, before = answer(), answer("--base")
    assert trained_one and before and trained_one != before
    copy = shutil.copytree(run, tmp_path / "stranger", ignore=shutil.ignore_patterns("checkpoints", "export"))
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    done = launch_plain(str(copy), "--prompt", "abc", script="launch/chat.py")
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr
    done = launch_plain(str(run / "checkpoints"), script="launch/chat.py")
    assert done.returncode == 2 and "neither a run's folder" in done.stderr
