"""Whether the checkpoints that a recipe names can take their roles, told without reading their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine import adapter_checks
from engine.config import Recipe
from engine.errors import RecipeError
from engine.reward_text import RewardText, other_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The names that transformers' configurations give to the longest sequence a model takes.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_seq_len", "seq_length")
POSITION_KEYS += ("original_max_position_embeddings",)  # of longrope, the last that counts
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(path: str) -> bool:
    """Whether what is no folder here can be a name on the hub."""
    # "runs/policy" has a hub name's shape too; a first part that is a folder here says a path was meant.
    return not Path(path).is_dir() and HUB_NAME.fullmatch(path) is not None and not Path(path.split("/")[0]).is_dir()


def problems_of(recipe: Recipe, due: Callable[[str], bool]) -> list[str]:
    """All that is wrong with the models, tokenizers and adapters that lie where `due` says it is time to look."""
    problems = []
    base = _check_policy(recipe, problems) if due(recipe.model.path) else None
    told = base is None and recipe.critic_path == recipe.model.path
    if recipe.critic.home == "model" and due(recipe.critic_path) and not told:
        problems += _check_critic(recipe)
    if recipe.reference_home == "model" and due(recipe.reference_path):
        problems += _check_reference(recipe)
    for reward in recipe.rewards:
        if reward.model and due(reward.model):
            problems += _check_reward_model(recipe, reward.model)
    return problems + adapter_checks.problems_of(recipe, due, base)


def _check_policy(recipe: Recipe, problems: list[str]) -> PreTrainedModel | None:
    """The policy without its weights, for adapters to be tried on; None if it can't be had. Adds to `problems`."""
    model = recipe.model
    config = _model_config("model.path", model.path, model.revision, problems)
    if config is None:
        return None
    problems += _check_positions(recipe, "model.path", model.path, config)
    problems += _check_packing(recipe, "model.path", model.path, config)
    base = _without_weights(recipe, "model.path", model.path, config, problems)
    if base is not None and recipe.generation.compile:
        problems += _check_compile(recipe, base)
    problems += _check_tokenizer(recipe, config)
    return base


def _check_compile(recipe: Recipe, base: PreTrainedModel) -> list[str]:
    from engine.kv_cache import can_stand_still  # here: it imports torch

    if can_stand_still(base):
        return []
    return [
        f"model.path: a model of type {base.config.model_type} can't decode with a cache of one size, which a "
        f"compiled step takes, got {recipe.model.path} with generation.compile true; set that to false"
    ]


def _check_critic(recipe: Recipe) -> list[str]:
    """A critic of its own: a sequence classifier that reads the policy's ids."""
    path, problems = recipe.critic_path, []
    setting = "critic.path" if recipe.critic.path else "critic.home model"
    config = _beside(recipe, setting, path, problems, same_vocabulary=False)
    if config is None:
        return problems
    outputs = _outputs(config)
    if outputs != 1 and any("ForSequenceClassification" in name for name in config.get("architectures") or []):
        problems.append(
            f"{setting}: {path} is a sequence classifier with {outputs} outputs, and a value is one; name a reward "
            "model with one, or a causal model"
        )
    critic = _without_weights(recipe, setting, path, config, problems, classifier=True)
    if critic is None or recipe.critic.train == "full":
        return problems
    return problems + adapter_checks.problems_of_critic(recipe, critic)


def _check_reference(recipe: Recipe) -> list[str]:
    """A reference of its own: it reads the policy's ids, and predicts them."""
    path, problems = recipe.reference_path, []
    config = _beside(recipe, "reference.path", path, problems, same_vocabulary=True)
    if config is not None and path != recipe.model.path:
        _without_weights(recipe, "reference.path", path, config, problems)
    return problems


def _beside(recipe: Recipe, setting: str, path: str, problems: list[str], same_vocabulary: bool) -> dict | None:
    """The config.json of a model beside the base; whether that reads the policy's ids is checked."""
    model = recipe.model
    config = _model_config(setting, path, model.revision if path == model.path else None, problems)
    if config is None or path == model.path:
        return config
    problems += _check_positions(recipe, setting, path, config)
    problems += _check_packing(recipe, setting, path, config)
    policy = _model_config("model.path", model.path, model.revision, [])
    if policy is None:
        return config  # told by _check_policy
    ours, theirs = policy.get("vocab_size"), config.get("vocab_size")
    if isinstance(ours, int) and isinstance(theirs, int) and (theirs != ours if same_vocabulary else theirs < ours):
        problems.append(
            f"{setting}: {path} has a vocabulary of {theirs} and model.path {model.path} one of {ours}, whose "
            "token ids it must read; name a model with the policy's tokenizer"
        )
    try:
        tokenizer = _policy_tokenizer(recipe)
        other = other_tokenizer(path, tokenizer, chat=False, trust_remote_code=model.trust_remote_code)
    except Exception:  # the policy's is told by _check_tokenizer; this one's is not needed
        return config
    if other is not None and other.get_vocab() != tokenizer.get_vocab():  # a base and its instruct model differ in EOS
        problems.append(
            f"{setting}: {path} has another tokenizer than model.path {model.path}, whose token ids it must "
            "read; name a model with the policy's tokenizer"
        )
    return config


def _without_weights(
    recipe: Recipe, setting: str, path: str, config: dict, problems: list[str], classifier: bool = False
) -> PreTrainedModel | None:
    """The model that a checkpoint's configuration describes, on torch's meta device; None, with a problem added.

    It takes no memory and, for 70 billion parameters, a second.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification  # here: seconds
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    found = _check_quantized(setting, path, config)
    if found:
        problems += found
        return None
    trust = recipe.model.trust_remote_code
    wanted = {"revision": recipe.model.revision if path == recipe.model.path else None, "trust_remote_code": trust}
    if recipe.model.attn_implementation:
        wanted["attn_implementation"] = recipe.model.attn_implementation
    if classifier:
        wanted["num_labels"] = 1
    try:
        described = AutoConfig.from_pretrained(path, **wanted)
        _check_causal(described, setting)
        own = "AutoModelForSequenceClassification" in (getattr(described, "auto_map", None) or {})
        if classifier and not own and type(described) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise RecipeError(
                f"transformers has no sequence classifier of type {described.model_type}, got {path} for a critic of "
                "its own; set critic.home to adapter or trunk, or critic.path to a model of another type"
            )
        with adapter_checks.on_meta():
            factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
            model = factory.from_config(described, trust_remote_code=trust)
    except RecipeError as error:
        problems += [f"{setting}: {problem}" for problem in error.problems]
        return None
    except Exception as error:  # an unknown model_type, code that isn't trusted, a broken value, an unknown kernel
        problems.append(f"{setting}: the configuration of {path} can't be used: {_reason(error)}")
        return None
    if classifier and not hasattr(getattr(model, "score", None), "in_features"):
        problems.append(
            f"{setting}: the classifier of type {described.model_type} has no linear score head, got {path}; set "
            "critic.home to adapter or trunk, or critic.path to a model of another type"
        )
        return None
    if recipe.zero.activation_checkpointing and not model.supports_gradient_checkpointing:
        problems.append(
            f"{setting}: a model of type {described.model_type} can't recompute activations, got "
            "zero.activation_checkpointing true; set it to false"
        )
    return model


def _check_causal(config, setting: str) -> None:
    from engine.causal import check_causal  # here: it imports torch

    try:
        check_causal(config)
    except RecipeError as error:
        role = "the policy" if setting == "model.path" else f"the {setting.partition('.')[0]}"
        raise RecipeError(*(problem.replace("the policy", role, 1) for problem in error.problems)) from None


def _check_quantized(setting: str, path: str, config: dict) -> list[str]:
    found = config.get("quantization_config")
    if not found:
        return []
    method = found.get("quant_method", "") if isinstance(found, dict) else found
    then = "" if setting == "rewards.model" else ", and model.quantization nf4 or int8 to quantize it while it loads"
    return [f"{setting}: {path} is quantized already ({method}); name the checkpoint it was made from{then}"]


def _check_reward_model(recipe: Recipe, path: str) -> list[str]:
    problems = []
    config = _model_config("rewards.model", path, None, problems)
    if config is None:
        return problems
    outputs = _outputs(config)
    if outputs != 1:
        problems.append(
            f"rewards.model: {path} must be a sequence-classification model with one output, its config.json says "
            f"{outputs}; name a reward model"
        )
    problems += _check_quantized("rewards.model", path, config) + _check_packing(recipe, "rewards.model", path, config)
    if not problems:
        problems += _check_score_head(recipe, path)
    return problems + _check_reward_tokenizer(recipe, path, config)


def _check_score_head(recipe: Recipe, path: str) -> list[str]:
    from transformers import AutoConfig, AutoModelForSequenceClassification  # here: it takes seconds

    from engine.scoring import check_scorable

    trust = recipe.model.trust_remote_code
    try:
        described = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        with adapter_checks.on_meta():
            check_scorable(AutoModelForSequenceClassification.from_config(described, trust_remote_code=trust))
    except Exception as error:  # no such head; or an unknown model_type, code that isn't trusted, a broken value
        return [f"rewards.model: {path} can't score: {_reason(error)}"]
    return []


def _outputs(config: dict) -> int:
    """transformers writes the labels, not their number, and takes 2 where neither is given."""
    return config.get("num_labels") or len(config.get("id2label") or "12")


def _check_reward_tokenizer(recipe: Recipe, path: str, config: dict) -> list[str]:
    """A reward model reads the policy's ids, or the text where its tokenizer is another one (`reward_text.py`)."""
    model, chat = recipe.model, recipe.data.messages_column is not None
    if recipe.toyworld and not Path(model.path).is_dir():
        return []  # not built yet: left for the second call
    if _model_config("model.path", model.path, model.revision, []) is None:
        return []  # told by _check_policy
    try:
        policy = _policy_tokenizer(recipe)
    except Exception:
        return []  # told by _check_tokenizer
    try:
        own = other_tokenizer(path, policy, chat, model.trust_remote_code)
    except Exception as error:  # a broken tokenizer raises whatever its parser raises
        return [
            f"rewards.model: the tokenizer of {path} can't be loaded: {_reason(error)}; save it again, or remove its "
            "files if the model takes the policy's tokens"
        ]
    problems = []
    whose, tokenizer = (f"the policy {model.path}", policy) if own is None else ("its own tokenizer", own)
    embeddings, last = config.get("vocab_size"), max(tokenizer.get_vocab().values())
    if isinstance(embeddings, int) and embeddings <= last:
        problems.append(
            f"rewards.model: {path} has {embeddings} embeddings (vocab_size), and {whose} has token ids up to {last}; "
            "save the model with the tokenizer that it was trained with beside it"
        )
    if own is None:
        return problems + _check_positions(recipe, "rewards.model", path, config)
    if not chat and own.eos_token_id is None:
        problems.append(
            f"rewards.model: the tokenizer of {path} has no EOS token, so it could not tell whether a response ended; "
            "set eos_token in its tokenizer_config.json"
        )
    if chat and not own.chat_template:
        problems.append(
            f"rewards.model: {path} has another tokenizer than the policy, and that has no chat template for "
            f"data.messages_column {recipe.data.messages_column}; give it one (chat_template.jinja), or use "
            "data.text_column"
        )
    elif chat:
        problems += [problem for dataset in recipe.datasets for problem in _check_chats(recipe, path, own, dataset)]
    return problems


def _check_chats(recipe: Recipe, path: str, tokenizer, dataset: str) -> list[str]:
    """Whether the template of a reward model's own tokenizer takes every conversation: some refuse a system message."""
    from engine.prompts import LOCAL_FORMATS, read_rows  # here: it imports torch

    if Path(dataset).suffix.lower() not in LOCAL_FORMATS:
        return []
    try:
        rows = read_rows(recipe.data, dataset)
    except RecipeError:
        return []  # told by _check_rows
    for row in rows:
        try:
            RewardText(tokenizer).chat(row.values[recipe.data.messages_column], "a", ended=False)
        except ValueError as error:
            return [
                f"rewards.model: {path} can't read {dataset}, {row.where}: {error}; mend these messages, or use a "
                "reward model whose template takes them"
            ]
    return []


def _model_config(setting: str, path: str, revision: str | None, problems: list[str]) -> dict | None:
    """The model's config.json; None, with a problem added, when there is none to be had."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        if not is_hub_name(path):
            problems.append(f"{setting}: no folder {path} (working directory {Path.cwd()}); correct the path")
            return None
        from huggingface_hub import hf_hub_download  # here: most recipes under test name folders

        try:
            file = Path(hf_hub_download(path, "config.json", revision=revision))
        except Exception as error:  # network, authorisation, name, cache: for the user they are one thing
            problems.append(
                f"{setting}: {path} is no folder here, and the hub has no such model to give: {_reason(error)}"
            )
            return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        problems.append(f"{setting}: {path} has no config.json; name the folder of a Hugging Face checkpoint")
        return None
    except ValueError as error:
        problems.append(f"{setting}: {file} is not valid JSON ({error}); save the checkpoint again")
        return None
    if not isinstance(config, dict):
        problems.append(f"{setting}: {file} holds no object; save the checkpoint again")
        return None
    # Models of several modalities keep the language model's part one level down.
    return {**(config.get("text_config") or {}), **config}


def _check_positions(recipe: Recipe, setting: str, path: str, config: dict) -> list[str]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) in ("longrope", "dynamic"):
        # Beyond it transformers changes the frequencies by the longest row of a batch: a row would depend on its
        # company, and cached keys would keep the old ones.
        name = "original_max_position_embeddings"
        config = {name: rope.get(name) or config.get(name) or config.get("max_position_embeddings")}
    key = next((key for key in POSITION_KEYS if isinstance(config.get(key), int) and config[key] > 0), None)
    longest = recipe.longest_sequence
    if key is None or config[key] >= longest:
        return []
    return [
        f"{setting}: data.max_prompt_tokens {recipe.data.max_prompt_tokens} + generation.max_new_tokens "
        f"{recipe.generation.max_new_tokens} = {longest} tokens, but {path} takes at most {config[key]} ({key}); "
        "lower one of the two"
    ]


def _check_packing(recipe: Recipe, setting: str, path: str, config: dict) -> list[str]:
    from engine.causal import PACKABLE  # here: it imports torch

    kind = config.get("model_type")
    if not recipe.ppo.packing or kind in PACKABLE:
        return []
    return [
        f"{setting}: that sequences of a model of type {kind} can lie end to end was not measured, or it was wrong "
        f"(docs/models.md), got {path} with ppo.packing true; set that to false"
    ]


def _policy_tokenizer(recipe: Recipe):
    from transformers import AutoTokenizer  # here: it takes seconds

    model = recipe.model
    return AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_tokenizer(recipe: Recipe, config: dict) -> list[str]:
    from engine.stopping import check_stop_strings, check_vocabulary  # here: it imports torch

    model = recipe.model
    try:
        tokenizer = _policy_tokenizer(recipe)
    except Exception as error:  # a broken tokenizer raises whatever its parser raises
        return [f"model.path: the tokenizer of {model.path} can't be loaded: {_reason(error)}"]
    problems = check_stop_strings(tokenizer, recipe.generation.stop_strings)
    if isinstance(config.get("vocab_size"), int):
        problems += check_vocabulary(tokenizer, config["vocab_size"])
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
