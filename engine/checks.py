"""What the schema can't check: files, all before any model loads and reported at once; and what deserves a warning."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from engine.config import Recipe, steps_per_iteration
from engine.ds_config import read_ds_config
from engine.errors import RecipeError
from engine.plugins import load_function

# The names that transformers' configurations give to the longest sequence a model takes.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_seq_len", "seq_length")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_files(recipe: Recipe, built: bool = True) -> None:
    """Check everything that the recipe points at.

    Args:
        built: False before the toy world exists: what will lie in its folder is then left for a second call.

    Raises:
        RecipeError: every problem found.
    """
    world = Path(recipe.toyworld).resolve() if recipe.toyworld and not built else None

    def due(path: str) -> bool:
        return world is None or world not in Path(path).resolve().parents

    problems = _check_output(recipe)
    problems += _attempt(read_ds_config, recipe.zero.ds_config)
    if due(recipe.model.path):
        problems += _check_policy(recipe)
    for reward in recipe.rewards:
        if reward.function:
            problems += _attempt(load_function, reward.function)
        elif due(reward.model):
            problems += _check_reward_model(recipe, reward.model)
    if recipe.evaluation.judge:
        problems += _attempt(load_function, recipe.evaluation.judge)
    problems += [problem for dataset in _datasets(recipe) if due(dataset) for problem in _check_rows(recipe, dataset)]
    if due(recipe.data.dataset):
        problems += _check_columns(recipe)
    if problems:
        raise RecipeError(*problems)


def warnings_of(recipe: Recipe) -> list[str]:
    """What the recipe allows and its author may not have meant, for the log."""
    kl, generation, evaluation = recipe.kl, recipe.generation, recipe.evaluation
    warnings = []
    if kl.placement == "reward" and kl.estimator in ("k2", "k3"):
        warnings.append(
            f"kl.estimator {kl.estimator} in the reward does not have the KL's gradient as its expectation; k1 does"
        )
    if kl.placement == "reward" and kl.estimator == "full":
        warnings.append(
            "kl.estimator full in the reward leaves out the gradient of each token's own KL; k1 in the reward or full "
            "in the loss has it"
        )
    if kl.placement == "loss" and kl.estimator == "k3":
        warnings.append(
            "kl.estimator k3 in the loss has the gradient of the other direction, KL(reference || policy); k2 and full "
            "have that of KL(policy || reference)"
        )
    for role, settings in (("actor", recipe.actor), ("critic", recipe.critic)):
        if settings.optimizer.warmup_steps >= steps_per_iteration(recipe) * recipe.iterations:
            warnings.append(f"{role}.optimizer.warmup_steps is as long as the run: the peak rate is never reached")
    if generation.temperature == 0:
        warnings.append("generation.temperature 0 trains on argmax responses: nothing is explored")
    restricted = {
        "top_k": generation.top_k > 0,
        "top_p": generation.top_p < 1,
        "min_new_tokens": generation.min_new_tokens,
    }
    for key in (key for key, on in restricted.items() if on):
        warnings.append(
            f"generation.{key} restricts the draw alone: log-probs and ratio are those of the full softmax, so the "
            "update is not exactly on-policy"
        )
    if evaluation.dataset is None and (evaluation.judge or evaluation.every_iterations):
        warnings.append("evaluation.judge and evaluation.every_iterations have no effect without evaluation.dataset")
    return warnings


def _attempt(function, *arguments) -> list[str]:
    try:
        function(*arguments)
    except RecipeError as error:
        return list(error.problems)
    return []


def _datasets(recipe: Recipe) -> list[str]:
    return [recipe.data.dataset] + ([recipe.evaluation.dataset] if recipe.evaluation.dataset else [])


def _check_columns(recipe: Recipe) -> list[str]:
    """A reward function gets the columns by name, beside its own two arguments."""
    from engine.prompts import LOCAL_FORMATS, read_rows  # here: it imports torch

    if Path(recipe.data.dataset).suffix.lower() not in LOCAL_FORMATS or not any(r.function for r in recipe.rewards):
        return []
    try:
        taken = {"prompts", "responses"} & {name for row in read_rows(recipe.data) for name in row.values}
    except RecipeError:
        return []  # told by _check_rows
    taken -= {recipe.data.text_column}
    if not taken:
        return []
    return [
        f"{recipe.data.dataset}: a column named {' and '.join(sorted(taken))} would meet the reward function's "
        "argument of that name; rename it"
    ]


def _check_rows(recipe: Recipe, dataset: str) -> list[str]:
    from engine.prompts import LOCAL_FORMATS, read_rows  # here: it imports torch

    # A hub dataset is downloaded once, when the trainer reads it; that too comes before any model.
    return _attempt(read_rows, recipe.data, dataset) if Path(dataset).suffix.lower() in LOCAL_FORMATS else []


def _check_output(recipe: Recipe) -> list[str]:
    if recipe.output is None:
        return []
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        return [f"output: {folder} is a file; give a folder with --output"]
    if folder.is_dir() and any(folder.iterdir()):
        what = "already holds a run" if (folder / "recipe.yaml").exists() else "is not empty"
        return [f"output: {folder} {what}, and a run never overwrites one; give another folder with --output"]
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return [f"output: {folder} can't be made, {there} takes no new files; give another folder with --output"]
    return []


def _check_policy(recipe: Recipe) -> list[str]:
    model, problems = recipe.model, []
    config = _model_config("model.path", model.path, model.revision, problems)
    if config is None:
        return problems
    problems += _check_positions(recipe, "model.path", model.path, config)
    return problems + _check_tokenizer(recipe)


def _check_reward_model(recipe: Recipe, path: str) -> list[str]:
    problems = []
    config = _model_config("rewards.model", path, None, problems)
    if config is None:
        return problems
    problems += _check_positions(recipe, "rewards.model", path, config)
    # transformers writes the labels, not their number, and takes 2 where neither is given.
    outputs = config.get("num_labels") or len(config.get("id2label") or "12")
    if outputs != 1:
        problems.append(
            f"rewards.model: {path} must be a sequence-classification model with one output, its config.json says "
            f"{outputs}; name a reward model"
        )
    if Path(path).is_dir() and Path(recipe.model.path).is_dir():
        problems += _check_same_tokenizer(recipe.model.path, path)
    return problems


def _check_same_tokenizer(policy: str, reward: str) -> list[str]:
    """Reward models read the policy's token ids: with another vocabulary they would score other words, in silence."""
    ids = []
    for folder in (policy, reward):
        try:
            ids.append(json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
        except (OSError, ValueError, KeyError):
            return []  # not a fast tokenizer's file: nothing to compare by
    if ids[0] == ids[1]:
        return []
    return [
        f"rewards.model: {reward} has another vocabulary than {policy}, and it is given the policy's tokens; name a "
        "reward model with the policy's tokenizer, or score the text in a function"
    ]


def _model_config(setting: str, path: str, revision: str | None, problems: list[str]) -> dict | None:
    """The model's config.json; None, with a problem added, when there is none to be had."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        # "runs/policy" has a hub name's shape too; a first part that is a folder here says a path was meant.
        if not HUB_NAME.fullmatch(path) or Path(path.split("/")[0]).is_dir():
            problems.append(f"{setting}: no folder {path} (working directory {Path.cwd()}); correct the path")
            return None
        from huggingface_hub import hf_hub_download  # here: most recipes under test name folders

        try:
            file = Path(hf_hub_download(path, "config.json", revision=revision))
        except Exception as error:  # network, authorisation, name, cache: for the user they are one thing
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            problems.append(f"{setting}: {path} is no folder here, and the hub has no such model to give: {reason}")
            return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        problems.append(f"{setting}: {path} has no config.json; name the folder of a Hugging Face checkpoint")
        return None
    except ValueError as error:
        problems.append(f"{setting}: {file} is not valid JSON ({error}); save the checkpoint again")
        return None
    # Models of several modalities keep the language model's part one level down.
    return {**config.get("text_config", {}), **config}


def _check_positions(recipe: Recipe, setting: str, path: str, config: dict) -> list[str]:
    key = next((key for key in POSITION_KEYS if isinstance(config.get(key), int) and config[key] > 0), None)
    longest = recipe.data.max_prompt_tokens + recipe.generation.max_new_tokens
    if key is None or config[key] >= longest:
        return []
    return [
        f"{setting}: data.max_prompt_tokens {recipe.data.max_prompt_tokens} + generation.max_new_tokens "
        f"{recipe.generation.max_new_tokens} = {longest} tokens, but {path} takes at most {config[key]} ({key}); "
        "lower one of the two"
    ]


def _check_tokenizer(recipe: Recipe) -> list[str]:
    from transformers import AutoTokenizer  # here: it takes seconds

    model = recipe.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # a broken tokenizer raises whatever its parser raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return [f"model.path: the tokenizer of {model.path} can't be loaded: {reason}"]
    problems = []
    if tokenizer.eos_token_id is None:
        problems.append(
            f"model.path: the tokenizer of {model.path} has no EOS token, so no response could end; "
            "set eos_token in its tokenizer_config.json"
        )
    for token in recipe.generation.end_tokens:
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            problems.append(
                f"generation.end_tokens: {token!r} is not one token of {model.path}'s tokenizer; correct it"
            )
    if recipe.data.messages_column is not None and not tokenizer.chat_template:
        problems.append(
            f"data.messages_column: the tokenizer of {model.path} has no chat template; use data.text_column or a "
            "tokenizer that has one"
        )
    return problems
