"""The command line, in processes of its own as a user starts it."""

import os
import re
import subprocess
import sys
import time

import pytest

from engine.command_line import known_keys, parse
from engine.config import REPOSITORY, Recipe
from engine.errors import RecipeError
from engine.section import Section

TRAIN = str(REPOSITORY / "launch" / "train.py")


def run(*arguments, cwd=REPOSITORY, **environment):
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, TRAIN, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=clean | environment,
    )


# ---- in a process of its own


def test_help_lists_every_option_with_its_doc_line():
    done = run("--help", COLUMNS="1000")
    assert done.returncode == 0 and done.stderr == ""
    for key, field in known_keys().items():
        if key.startswith("rewards."):
            continue  # items of a list: one option, --rewards, takes them as JSON
        if isinstance(field.default, Section):
            assert f"{key} options:\n  {type(field.default).__doc__.splitlines()[0]}" in done.stdout
            continue
        shown = re.search(rf"^ +--{re.escape(key)} \S+\s+(.*)$", done.stdout, re.MULTILINE)
        assert field.description in shown[1], key
    assert "local_rank" not in done.stdout and "unknown" not in done.stdout
    assert "RECIPE" in done.stdout


def test_help_and_errors_import_nothing_heavy(tmp_path):
    probe = (
        "import sys\n"
        f"sys.argv = ['train.py', *sys.argv[1:]]; sys.path.insert(0, {str(REPOSITORY / 'launch')!r})\n"
        "import train\n"
        "try:\n    train.main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    for arguments, code in [(["--help"], 0), (["--sed", "1"], 2)]:
        done = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr


def test_a_bad_recipe_is_a_message_and_status_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("ppo: {clip_ration: 0.3}\nseed: x\n")
    done = run("bad.yaml", "--ppo.epochs", "0", "--local_rank=0", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    for part in ["ppo.clip_ration", "ppo.clip_ratio", "seed", "got 'x'", "ppo.epochs", "greater than 0"]:
        assert part in done.stderr
    assert done.stderr.count("\n  - ") == 3


def test_malformed_yaml_names_file_and_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 1\nppo: [1, 2\n")
    done = run("bad.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "bad.yaml:3" in done.stderr and "Traceback" not in done.stderr


def test_rank_0_speaks_and_another_rank_that_outlives_the_pause():
    """The launcher ends the others within a second of the first; who is left fails alone, on another host perhaps."""
    started = time.monotonic()
    done = run("--sed", "1", RANK="1")
    assert done.returncode == 2 and done.stderr.startswith("rank 1: error: this run can't start") and done.stdout == ""
    assert time.monotonic() - started > 3
    assert "--seed" in run("--sed", "1", RANK="0").stderr
    assert run("--help", RANK="1").stdout == ""


def test_the_recipe_reaches_the_trainer(tmp_path):
    """Any working directory, DeepSpeed's extra argument, overrides: what `train` gets is the parsed recipe."""
    probe = (
        "import sys, types\n"
        "fake = types.ModuleType('engine.trainer')\n"
        "fake.train = lambda recipe: print(recipe.name, recipe.seed, recipe.ppo.epochs, recipe.output)\n"
        "sys.modules['engine.trainer'] = fake\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'launch')!r})\n"
        "import train\n"
        "train.main()\n"
    )
    command = [sys.executable, "-c", probe, "--local_rank=1", "--seed", "7", "--ppo.epochs=3", "--output", "runs/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.split() == ["quickstart", "7", "3", "runs/x"], done.stderr


def test_an_error_of_ours_keeps_its_traceback():
    from engine.command_line import readable_errors

    with pytest.raises(ValueError, match="shape"), readable_errors():
        raise ValueError("shape")
    with pytest.raises(SystemExit), readable_errors():
        raise RecipeError("user")


# ---- parsing


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\niterations: 9\nppo: {epochs: 4, clip_ratio: 0.3}\nrewards: [{model: a/b}]\n")
    return str(file)


def problems(*argv) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(list(argv))
    return list(caught.value.problems)


def test_command_line_over_file_over_defaults(recipe_file):
    recipe = parse([recipe_file, "--ppo.epochs", "7", "--seed", "1"])
    assert (recipe.name, recipe.seed, recipe.iterations) == ("mine", 1, 9)
    assert (recipe.ppo.epochs, recipe.ppo.clip_ratio, recipe.ppo.gamma) == (7, 0.3, Recipe().ppo.gamma)


def test_the_recipe_may_stand_anywhere(recipe_file):
    argvs = [[recipe_file, "--seed", "1"], ["--seed", "1", recipe_file], ["--local_rank=0", recipe_file, "--seed=1"]]
    assert parse(argvs[0]) == parse(argvs[1]) == parse(argvs[2])


def test_values(recipe_file):
    recipe = parse(
        [recipe_file, "--ppo.whiten_advantages", "false", "--ppo.value_clip", "null", "--ppo.dual_clip", "3"]
        + ["--actor.optimizer.learning_rate", "1e-5", "--scores.scale", "-1", "--kl.target", "6.0"]
        + ["--output", "runs/2024", "--critic.home", "trunk", "--model.path", "123"]
    )
    assert recipe.ppo.whiten_advantages is False and recipe.ppo.value_clip is None and recipe.ppo.dual_clip == 3.0
    assert recipe.actor.optimizer.learning_rate == 1e-5 and recipe.scores.scale == -1.0 and recipe.kl.target == 6.0
    assert recipe.output == "runs/2024" and recipe.critic.home == "trunk" and recipe.model.path == "123"


def test_lists(recipe_file):
    rewards = '[{"function": "a b.py:f", "weight": -0.5}, {"model": "x/y", "offload_param": "cpu"}]'
    recipe = parse([recipe_file, "--rewards", rewards])
    assert [reward.label for reward in recipe.rewards] == ["f", "y"]
    assert recipe.rewards[0].weight == -0.5 and recipe.rewards[1].offload_param == "cpu"
    assert parse([recipe_file, "--rewards", '{"model": "x/y"}']).rewards[0].model == "x/y"
    ends = ["--generation.end_tokens", '["<|im_end|>", "a, b"]']
    assert parse([recipe_file, *ends]).generation.end_tokens == ["<|im_end|>", "a, b"]
    targets = "--actor.lora.targets"
    assert parse([recipe_file, targets, "all-linear"]).actor.lora.targets == "all-linear"
    assert parse([recipe_file, targets, "q_proj", targets, "v_proj"]).actor.lora.targets == ["q_proj", "v_proj"]


def test_environment_variables_are_not_settings(recipe_file, monkeypatch):
    expected = parse([recipe_file])
    for name in (
        "SEED",
        "OUTPUT",
        "NAME",
        "ITERATIONS",
        "seed",
        "output",
        "PPO",
        "MODEL__PATH",
        "ppo.epochs",
        "RECIPE",
    ):
        monkeypatch.setenv(name, "77")
    assert parse([recipe_file]) == expected


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--ppo.clip_ration", "--ppo.clip_ratio"),
        ("--clip_ratio", "--ppo.clip_ratio"),
        ("--ppo.clip-ration", "--ppo.clip_ratio"),
        ("--iteration", "--iterations"),
        ("--rewards.0.weight", "--rewards"),
        ("--generation.max_tokens", "--generation.max_new_tokens"),
    ],
)
def test_unknown_option_names_the_nearest(recipe_file, option, known):
    expected = [f"{option}: unknown option; the nearest is {known}"]
    assert problems(recipe_file, option, "3") == expected
    assert problems(f"{option}=3") == expected
    assert problems(option, "3") == expected  # argparse takes the 3 for the recipe: that must not show
    assert problems(option, "3", recipe_file) == expected


def test_all_errors_of_line_and_file_at_once(recipe_file):
    said = problems(recipe_file, "--sed", "1", "--ppo.epochs", "x", "--rewards", '[{"modle": "x"}]', "stray")
    text = "\n".join(said)
    assert all(part in text for part in ["--sed:", "ppo.epochs", "got 'x'", "rewards[0].modle", "'stray'"])
    assert len(said) == 4


def test_stray_argument_and_missing_value(recipe_file):
    (said,) = problems(recipe_file, "second.yaml")
    assert "'second.yaml': unexpected argument" in said
    (said,) = problems(recipe_file, "--seed")
    assert "--seed" in said and "expected one argument" in said
    (said,) = problems(recipe_file, "--rewards", "[{")
    assert "rewards" in said
    (said,) = problems("none.yaml")
    assert "none.yaml" in said and "can't read" in said
