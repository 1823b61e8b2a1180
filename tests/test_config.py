"""The recipe: rules, files, errors, and the way to disk and back."""

import json

import pytest
import yaml
from pydantic import BaseModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine.checks import check_files, warnings_of
from engine.command_line import known_keys, load_recipe, nearest, recipe_text
from engine.config import REPOSITORY, Recipe, RewardConfig, locate
from engine.errors import RecipeError
from engine.section import Section

RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))


def write(tmp_path, text, name="my run.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return file


def load(tmp_path, text="", **overrides) -> Recipe:
    return load_recipe(write(tmp_path, text), overrides)


def problems(tmp_path, text="", **overrides) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, **overrides)
    return list(caught.value.problems)


# ---- the schema


def sections(kind=Recipe):
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_every_setting_has_a_doc_line():
    undocumented = [
        key
        for key, field in known_keys().items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert undocumented == []
    assert all(kind.__doc__ for kind in sections())


def test_a_section_given_in_part_keeps_its_other_defaults(tmp_path):
    for kind in sections():
        for name, field in kind.model_fields.items():
            if isinstance(field.default, Section):
                assert field.default == field.annotation(), f"{kind.__name__}.{name}"
    recipe = load(tmp_path, "critic: {optimizer: {beta1: 0.8}}")
    assert recipe.critic.optimizer.learning_rate == 3e-4
    assert recipe.actor.optimizer.learning_rate == 1e-4


def test_the_recipe_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().ppo.epochs = 3


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_loads_and_warns_of_nothing(file):
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert warnings_of(recipe) == []


def test_quickstart_points_into_the_toy_world():
    recipe = load_recipe("launch/recipes/quickstart.yaml")
    paths = [recipe.model.path, recipe.rewards[0].model, recipe.data.dataset, recipe.evaluation.dataset]
    assert recipe.toyworld == "runs/toyworld" and all(path.startswith("runs/toyworld/") for path in paths)


def test_builtin_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("ds_configs/zero3.json") == REPOSITORY / "ds_configs/zero3.json"
    assert load_recipe("launch/recipes/quickstart.yaml").name == "quickstart"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero3.json").write_text("{}")
    assert locate("ds_configs/zero3.json").read_text() == "{}"  # the working directory comes first
    assert str(locate("no/such.file")) == "no/such.file"


# ---- YAML


def test_yaml_values(tmp_path):
    text = """
    ppo:
      # epochs: 3
    actor: {optimizer: {learning_rate: 1e-5, epsilon: 1.0e-6}}
    kl: {target: null, kl_coef: 5e-2}
    ppo: {whiten_advantages: no, value_clip: null}
    """
    text = text.replace("    ppo:\n      # epochs: 3\n", "    scores:\n")
    recipe = load(tmp_path, text)
    assert yaml.safe_load("1e-5") == "1e-5", "YAML 1.1 reads this as text: the schema must not"
    assert recipe.actor.optimizer.learning_rate == 1e-5 and recipe.actor.optimizer.epsilon == 1e-6
    assert recipe.kl.target is None and recipe.kl.kl_coef == 0.05
    assert recipe.ppo.whiten_advantages is False and recipe.ppo.value_clip is None
    assert recipe.scores == Recipe().scores  # a section whose keys are all commented out


def test_overrides_win_and_lists_are_replaced_whole(tmp_path):
    text = "seed: 5\nppo: {epochs: 3, clip_ratio: 0.3}\nrewards: [{model: a/b}, {model: a/c}]\n"
    recipe = load(tmp_path, text, ppo={"epochs": 7}, rewards=[{"function": "f.py:g", "weight": 2}])
    assert (recipe.seed, recipe.ppo.epochs, recipe.ppo.clip_ratio) == (5, 7, 0.3)
    assert recipe.rewards == [RewardConfig(function="f.py:g", weight=2.0)]
    assert load(tmp_path, "ppo:\n", ppo={"epochs": 7}).ppo.epochs == 7


def test_empty_file_is_the_defaults(tmp_path):
    assert load(tmp_path).model_copy(update={"name": None}) == Recipe()


def test_the_name_comes_from_the_file(tmp_path):
    assert load(tmp_path).name == "my-run"
    assert load(tmp_path, "name: other").name == "other"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ppo:\n  epochs: 3\n   clip: 2\n", ["my run.yaml:3", "not valid YAML"]),
        ("seed: 1\nppo: {epochs: 3\n", ["my run.yaml:3", "not valid YAML"]),
        ("ppo:\n  epochs: 1\nseed: 2\nppo: {epochs: 2}\n", ["my run.yaml:4", "ppo is given twice"]),
        ("- 1\n- 2\n", ["my run.yaml", "mapping", "list"]),
        ("seed: \x00", ["my run.yaml", "not valid YAML"]),
    ],
)
def test_malformed_yaml_names_file_and_line(tmp_path, text, parts):
    (said,) = problems(tmp_path, text)
    assert all(part in said for part in parts)


def test_missing_recipe(tmp_path):
    with pytest.raises(RecipeError, match="none.yaml: can't read.*No such file"):
        load_recipe(tmp_path / "none.yaml")


# ---- unknown keys and wrong types


@pytest.mark.parametrize(
    ("text", "unknown", "known"),
    [
        ("ppo: {clip_ration: 0.3}", "ppo.clip_ration", "ppo.clip_ratio"),
        ("clip_ratio: 0.3", "clip_ratio", "ppo.clip_ratio"),
        ("kll: {kl_coef: 1}", "kll", "kl"),
        ("actor: {optimizer: {lr: 1.0e-3}}", "actor.optimizer.lr", "actor.optimizer.learning_rate"),
        (
            "critic: {optimizer: {learningrate: 1.0e-3}}",
            "critic.optimizer.learningrate",
            "critic.optimizer.learning_rate",
        ),
        ("rewards: [{modle: x, model: y}]", "rewards[0].modle", "rewards.model"),
        ("generation: {max_tokens: 3}", "generation.max_tokens", "generation.max_new_tokens"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, text, unknown, known):
    assert problems(tmp_path, text) == [f"{unknown}: unknown key; the nearest is {known}"]


def test_nearest_is_always_a_known_key():
    assert nearest("qqqqqq", known_keys()) in known_keys()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: x", ["seed", "integer", "got 'x'", "default, 0"]),
        ("seed: -1", ["seed", "greater than or equal to 0", "got -1"]),
        ("seed: yes", ["seed", "no boolean", "got True", "quote"]),
        ("ppo: {epochs: 2.5}", ["ppo.epochs", "integer", "got 2.5", "Passes over"]),
        ("ppo: {gamma: 1.5}", ["ppo.gamma", "less than or equal to 1", "got 1.5"]),
        ("scores: {clip: .inf}", ["scores.clip", "finite", "got inf"]),
        ("model: {dtype: float8}", ["model.dtype", "'float32', 'bfloat16' or 'float16'", "got 'float8'"]),
        ("output: 2024", ["output", "string", "got 2024"]),
        ("data: 5", ["data", "mapping of keys", "got 5", "prompts_per_iteration"]),
        ("actor: {lora: {targets: 3}}", ["actor.lora.targets", "string or", "list", "got 3"]),
        ("generation: {end_tokens: [1]}", ["generation.end_tokens[0]", "string", "got 1"]),
        ("rewards: []", ["rewards", "at least 1", "got []"]),
        ("name: a/b", ["name", "got 'a/b'"]),
    ],
)
def test_wrong_type_says_rule_value_and_remedy(tmp_path, text, parts):
    (said,) = problems(tmp_path, text)
    assert all(part in said for part in parts), said


def test_all_errors_at_once(tmp_path):
    text = "seed: x\nppoo: {}\nppo: {epochs: 0, clip: 1}\nkl: {placement: loss}\nrewards: [{model: a, function: b}]\n"
    said = problems(tmp_path, text)
    assert len(said) == 6
    for key in ("seed", "ppoo", "ppo.epochs", "ppo.clip", "kl", "rewards[0]"):
        assert any(line.startswith(f"{key}: ") for line in said), key


# ---- rules across settings


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "ppo: {minibatch_sequences: 65}",
            ["minibatch_sequences 65 > 64", "prompts_per_iteration 64", "samples_per_prompt 1"],
        ),
        ("generation: {min_new_tokens: 9, max_new_tokens: 8}", ["min_new_tokens", "9 > 8"]),
        ("kl: {placement: loss}", ["k1", "gradient 0", "kl.estimator to k2 or full"]),
        ("kl: {target: 6, kl_coef: 0}", ["never leaves 0", "target 6", "kl.kl_coef"]),
        ("critic: {warmup_iterations: 40}", ["critic.warmup_iterations 40", "iterations 40"]),
        ("critic: {trunk_detach: true}", ["trunk_detach", "home adapter", "critic.home"]),
        ("rewards: [{model: a/x}, {model: b/x}]", ["distinct", "'x' 2 times", "name:"]),
        ("rewards: [{model: a, function: f.py:g}]", ["exactly one", "'a'", "'f.py:g'"]),
        ("rewards: [{weight: 1}]", ["exactly one", "got none"]),
    ],
)
def test_contradictions_are_refused(tmp_path, text, parts):
    (said,) = problems(tmp_path, text)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    "text",
    [
        "ppo: {minibatch_sequences: 128}\ndata: {samples_per_prompt: 2}",
        "generation: {min_new_tokens: 8, max_new_tokens: 8}",
        "kl: {placement: loss, estimator: k2, target: 6}",
        "kl: {target: 6}",
        "kl: {kl_coef: 0}",
        "critic: {warmup_iterations: 39}",
        "critic: {home: trunk, trunk_detach: true}",
        "rewards: [{model: a/x}, {model: b/x, name: y}]",
    ],
)
def test_their_neighbours_are_allowed(tmp_path, text):
    load(tmp_path, text)


def test_reward_labels():
    assert RewardConfig(model="runs/world/reward").label == "reward"
    assert RewardConfig(function="a/b.py:brevity").label == "brevity"
    assert RewardConfig(model="a/b", name="c").label == "c"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kl: {estimator: k2}", "k2 in the reward"),
        ("kl: {estimator: k3}", "k3 in the reward"),
        ("kl: {estimator: full}", "full in the reward"),
        ("kl: {placement: loss, estimator: k3}", "other direction"),
        ("generation: {temperature: 0}", "argmax"),
        ("generation: {top_k: 50}", "generation.top_k"),
        ("generation: {top_p: 0.9}", "generation.top_p"),
        ("generation: {min_new_tokens: 2}", "generation.min_new_tokens"),
        ("evaluation: {judge: a.py:f}", "without evaluation.dataset"),
    ],
)
def test_warnings(tmp_path, text, part):
    (said,) = warnings_of(load(tmp_path, text))
    assert part in said


@pytest.mark.parametrize("text", ["", "kl: {placement: loss, estimator: k2}", "kl: {placement: loss, estimator: full}"])
def test_no_warning_where_all_is_well(tmp_path, text):
    assert warnings_of(load(tmp_path, text)) == []


# ---- to disk and back


def test_saved_recipe_loads_back_equal(tmp_path):
    text = """
    seed: 9
    actor: {lora: {targets: [q_proj, v_proj]}, optimizer: {learning_rate: 1e-7, epsilon: 1e-12}}
    rewards: [{function: "rewards.py:f", weight: -0.5, name: "no"}, {model: org/reward}]
    generation: {end_tokens: ["<|im_end|>", "\\n", "ende ü"], top_p: 0.9}
    ppo: {value_clip: null, dual_clip: 3}
    evaluation: {dataset: null}
    """
    recipe = load(tmp_path, text, output="runs/1e3")
    (tmp_path / "saved.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert set(saved) == set(Recipe.model_fields) and saved["ppo"]["epochs"] == recipe.ppo.epochs


# ---- what the recipe points at


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working directory in which every file that the recipe names is good."""
    monkeypatch.chdir(tmp_path)
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 112})
    )
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_positions": 112, "id2label": {"0": "LABEL_0"}})
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "mine.py").write_text("def f(prompts, responses):\n    return [0.0 for _ in responses]\n")
    return tmp_path


def recipe_of(**changes) -> Recipe:
    values = {
        "model": {"path": "policy"},
        "rewards": [{"model": "reward"}, {"function": "mine.py:f"}],
        "data": {"dataset": "prompts.jsonl"},
        "evaluation": {"dataset": "prompts.jsonl", "judge": "mine.py:f"},
    }
    return Recipe.model_validate(values | changes)


def refused(**changes) -> str:
    with pytest.raises(RecipeError) as caught:
        check_files(recipe_of(**changes))
    (said,) = caught.value.problems
    return said


def test_good_files_pass(world):
    check_files(recipe_of())  # 64 + 48 tokens are just the 112 positions
    (world / "empty").mkdir()
    check_files(recipe_of(output="empty"))
    check_files(recipe_of(output="new/folder"))


def test_more_tokens_than_positions(world):
    said = refused(generation={"max_new_tokens": 49}, rewards=[{"function": "mine.py:f"}])
    assert all(part in said for part in ["64", "49", "113", "at most 112", "max_position_embeddings"])
    with pytest.raises(RecipeError) as caught:
        check_files(recipe_of(generation={"max_new_tokens": 49}))
    assert any("rewards.model" in problem and "n_positions" in problem for problem in caught.value.problems)


def test_positions_of_a_nested_text_model(world):
    (world / "policy" / "config.json").write_text(
        json.dumps({"model_type": "llama", "text_config": {"max_position_embeddings": 100}})
    )
    with pytest.raises(RecipeError) as caught:
        check_files(recipe_of())
    assert any("at most 100" in problem for problem in caught.value.problems)


def test_model_paths(world):
    assert "no folder policy/typo" in refused(model={"path": "policy/typo"})
    assert "no folder a/b/c" in refused(model={"path": "a/b/c"})
    assert "rewards.model: no folder ./none" in refused(rewards=[{"model": "./none"}])
    (world / "bare").mkdir()
    assert "no config.json" in refused(model={"path": "bare"})


def test_hub_name_that_the_hub_does_not_have(world, monkeypatch):
    import huggingface_hub

    def unreachable(name, file, revision):
        raise OSError(f"404 for {name} {file} {revision}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    said = refused(model={"path": "some-org/model", "revision": "v2"})
    assert "no folder here" in said and "404 for some-org/model config.json v2" in said


def test_reward_model_with_two_outputs(world):
    (world / "reward" / "config.json").write_text(json.dumps({"id2label": {"0": "bad", "1": "good"}}))
    assert "one output" in refused() and "says 2" in refused()
    (world / "reward" / "config.json").write_text("{}")  # transformers' own default is 2
    assert "says 2" in refused()
    (world / "reward" / "config.json").write_text('{"model_type": "gpt2", "num_labels": 1}')
    check_files(recipe_of())


def test_tokenizer_without_eos(world):
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(world / "policy")
    assert "no EOS token" in refused() and "tokenizer_config.json" in refused()


def test_tokens_and_templates_that_are_not_there(world):
    assert "generation.end_tokens: '<|stop|>'" in refused(generation={"end_tokens": ["</s>", "<|stop|>"]})
    (world / "prompts.jsonl").write_text('{"chat": [{"role": "user", "content": "a"}]}\n')
    assert "no chat template" in refused(data={"dataset": "prompts.jsonl", "messages_column": "chat"})


def test_functions_files_and_prompts(world):
    assert "mine.py has no g; it has f" in refused(rewards=[{"function": "mine.py:g"}])
    assert "no Python file judge.py" in refused(evaluation={"judge": "judge.py:f"})
    assert "none.json" in refused(zero={"ds_config": "none.json"})
    (world / "typo.json").write_text('{"gradient_cliping": 1}')
    assert "gradient_clipping" in refused(zero={"ds_config": "typo.json"})
    (world / "other.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    assert "other.jsonl:2" in refused(evaluation={"dataset": "other.jsonl"})
    assert "no column 'text'" in refused(data={"dataset": "prompts.jsonl", "text_column": "text"}, evaluation={})


@pytest.mark.parametrize(("file", "part"), [("recipe.yaml", "already holds a run"), ("x.txt", "is not empty")])
def test_output_that_holds_something(world, file, part):
    (world / "runs").mkdir()
    (world / "runs" / file).write_text("")
    said = refused(output="runs")
    assert part in said and "--output" in said
    assert "is a file" in refused(output="mine.py")


def test_all_problems_at_once(world):
    with pytest.raises(RecipeError) as caught:
        check_files(
            recipe_of(
                model={"path": "policy/none"},
                rewards=[{"function": "mine.py:g"}],
                data={"dataset": "none.jsonl"},
                zero={"ds_config": "none.json"},
                output="mine.py",
            )
        )
    assert len(caught.value.problems) == 5


def test_before_the_toy_world_is_built_only_what_it_makes_is_left_out(world):
    toy = {
        "toyworld": "runs/toyworld",
        "model": {"path": "runs/toyworld/policy"},
        "rewards": [{"model": "runs/toyworld/reward"}],
        "data": {"dataset": "runs/toyworld/prompts.jsonl"},
        "evaluation": {"dataset": "runs/toyworld/heldout.jsonl", "judge": "mine.py:g"},
    }
    with pytest.raises(RecipeError) as caught:
        check_files(recipe_of(**toy), built=False)
    assert [problem for problem in caught.value.problems if "mine.py" not in problem] == []
    with pytest.raises(RecipeError) as caught:
        check_files(recipe_of(**toy))
    assert len(caught.value.problems) == 5


def test_an_output_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="takes no new files; give another folder with --output"):
        check_files(Recipe(output=str(tmp_path / "file" / "run")), built=False)


def test_columns_that_would_meet_a_reward_functions_arguments(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "responses": 1}\n')
    (tmp_path / "r.py").write_text("def f(prompts, responses, **columns): return [0.0]\n")
    recipe = Recipe(
        rewards=[{"function": f"{tmp_path}/r.py:f"}], data={"dataset": str(tmp_path / "p.jsonl")}, toyworld="nowhere"
    )
    with pytest.raises(RecipeError, match="a column named responses would meet the reward function's argument"):
        check_files(recipe, built=False)


def own_tokenizer(folder, **changes):
    """A tokenizer of the reward model's own, with four ids."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "b": 2, "a": 3}, unk_token="<unk>"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>", **changes}
    PreTrainedTokenizerFast(tokenizer_object=raw, **settings).save_pretrained(folder)


def test_a_reward_model_with_another_tokenizer(world):
    reward = {"model_type": "gpt2", "n_positions": 10, "num_labels": 1, "vocab_size": 4}
    (world / "reward" / "config.json").write_text(json.dumps(reward))
    assert "takes at most 10" in refused(), "without a tokenizer it reads the policy's ids"
    own_tokenizer(world / "reward")
    check_files(recipe_of())  # it reads text: how long that gets nobody knows yet
    (world / "reward" / "config.json").write_text(json.dumps({**reward, "vocab_size": 3}))
    assert "has 3 embeddings (vocab_size), and its own tokenizer has token ids up to 3" in refused()
    (world / "reward" / "config.json").write_text(json.dumps(reward))
    own_tokenizer(world / "reward", eos_token=None)
    assert "no EOS token, so it could not tell whether a response ended; set eos_token" in refused()
    (world / "reward" / "tokenizer.json").write_text("{")
    assert "rewards.model: the tokenizer of reward can't be loaded" in refused()


def test_a_reward_model_needs_a_linear_score_head(world):
    (world / "reward" / "config.json").write_text(json.dumps({"model_type": "bert", "num_labels": 1}))
    assert "reward can't score: BertForSequenceClassification has no head named `score`" in refused()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_change_with_the_longest_row_end_at_the_original_length(world, kind):
    rope = {"rope_type": kind, "original_max_position_embeddings": 100, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = {"model_type": "phi3", "max_position_embeddings": 4096, "rope_scaling": rope, "pad_token_id": 0}
    (world / "policy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError) as caught:
        check_files(recipe_of())
    assert any("at most 100 (original_max_position_embeddings)" in problem for problem in caught.value.problems)


def test_a_reward_model_too_small_for_the_policys_ids(world):
    (world / "reward" / "config.json").write_text(json.dumps({"model_type": "gpt2", "num_labels": 1, "vocab_size": 2}))
    assert "reward has 2 embeddings (vocab_size), and the policy policy has token ids up to 2" in refused()
    (world / "reward" / "config.json").write_text(json.dumps({"model_type": "gpt2", "num_labels": 1, "vocab_size": 3}))
    check_files(recipe_of())


def test_a_reward_model_with_another_tokenizer_for_chats(world):
    (world / "policy" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    rows = [{"chat": [{"role": role, "content": "a"}, {"role": "user", "content": "b"}]} for role in ("user", "system")]
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = {"data": {"dataset": "prompts.jsonl", "messages_column": "chat"}}
    check_files(recipe_of(**chats))  # the policy's ids are those of its own template
    own_tokenizer(world / "reward", eos_token=None)
    said = refused(**chats)
    assert "no chat template for data.messages_column chat; give it one (chat_template.jinja)" in said
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    own_tokenizer(world / "reward", eos_token=None, chat_template=template)
    check_files(recipe_of(**chats))  # its template says where a turn ends
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
    own_tokenizer(world / "reward", chat_template=picky)
    chats["evaluation"] = {}
    said = refused(**chats)
    assert "reward can't read prompts.jsonl, line 2: its chat template failed: no system role; mend" in said


def test_a_horizon_that_could_turn_kl_coef_negative():
    with pytest.raises(ValueError, match="above a fifth of an iteration's 64 sequences, got 12.0"):
        Recipe(kl={"target": 1.0, "horizon": 12})
