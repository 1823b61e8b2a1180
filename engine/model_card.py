"""The page that lies in an export's folder: what it is, how plain libraries load it, how well it did, how it was made.

The loading code is written once, here: people copy it from the page, and the verification of every export runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from engine import models
from engine.command_line import recipe_text
from engine.config import Recipe
from engine.role_config import ModelConfig

LIBRARIES = {True: "peft", False: "transformers"}
PURPOSES = {
    "actor": "The policy that PPO trained",
    "critic": "The value function that PPO trained: V(state), the return to be expected from there on",
    "merged": "The policy that PPO trained, its adapter merged into the base's weights",
    "reward": "The reward that PPO trained against, frozen, as it scored",
}
SHOWN_METRICS = (
    *("score/mean", "kl/k1_sequence_mean", "policy/entropy", "value/explained_variance"),
    "rollout/response_tokens_mean",
)


@dataclass(frozen=True)
class Form:
    """What an export's folder holds, as far as loading it goes."""

    what: str
    base: ModelConfig
    """What its adapter goes on."""
    adapter: bool = False
    """It holds an adapter; otherwise a whole model."""
    classifier: bool = False
    """It is a sequence classifier, whose score head is the value or reward head; otherwise a causal model."""
    temperature: float = 1.0
    """Of the log-probs."""

    @property
    def function(self) -> str:
        """What the loading code defines to be called."""
        return {"critic": "values", "reward": "score"}.get(self.what, "logprobs")


def loading_code(form: Form) -> str:
    """Python that loads the export in `folder` and defines `form.function` of ids `[B, L]` without padding."""
    auto = "AutoModelForSequenceClassification" if form.classifier else "AutoModelForCausalLM"
    head = form.what == "critic" and not form.classifier
    quantized = form.adapter and form.base.quantization != "none"
    lines = ["import torch"]
    lines += ["from peft import PeftModel"] * form.adapter
    lines += ["from safetensors.torch import load_file"] * head
    lines += [f"from transformers import {auto}{', BitsAndBytesConfig' * quantized}", ""]
    if form.adapter:
        lines += [_quantization(form.base)] if quantized else []
        lines += [f"base = {auto}.from_pretrained({_arguments(form, quantized)})"]
        lines += ["model = PeftModel.from_pretrained(base, folder)"]
    else:
        trust = ", trust_remote_code=True" if form.base.trust_remote_code else ""
        lines += [f'model = {auto}.from_pretrained(folder, dtype="auto"{trust})']
    lines += ['head = load_file(f"{folder}/value_head.safetensors")["weight"]'] * head
    return "\n".join([*lines, "", "", *_function(form)]) + "\n"


def _arguments(form: Form, quantized: bool) -> str:
    base = form.base
    said = [f'"{base.path}"', f"dtype=torch.{base.dtype}"]
    said += ["num_labels=1"] * form.classifier + ["quantization_config=quantized"] * quantized
    said += [f'revision="{base.revision}"'] if base.revision else []
    return ", ".join(said + ["trust_remote_code=True"] * base.trust_remote_code)


def _quantization(base: ModelConfig) -> str:
    settings = models.quantization_config(base).to_diff_dict()
    settings = {name.removeprefix("_"): value for name, value in settings.items()}
    return "quantized = BitsAndBytesConfig(\n" + "".join(f"    {k}={v!r},\n" for k, v in settings.items()) + ")"


def _function(form: Form) -> list[str]:
    inside = "model.get_base_model()" if form.adapter else "model"
    if form.function == "logprobs":
        scaled = "" if form.temperature == 1 else f" / {form.temperature}"
        return [
            "def logprobs(ids):  # [B, L] -> [B, L - 1]: of each token but the first",
            f"    logits = model(ids).logits[:, :-1].float(){scaled}",
            "    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)",
        ]
    hidden = f"{inside}.base_model(ids).last_hidden_state"
    if form.function == "values":
        read = f"{inside}.score(hidden)" if form.classifier else "(hidden @ head.T)"
        return [
            "def values(ids):  # [B, L] -> [B, L]: V of what is to come after each token",
            f"    hidden = {hidden}",
            f"    return {read}.squeeze(-1).float()",
        ]
    return [
        "def score(ids):  # [B, L], an end token included -> [B]: read at the last token",
        f"    hidden = {hidden}[:, -1]",
        f"    return {inside}.score(hidden).squeeze(-1).float()",
    ]


@dataclass(frozen=True)
class Record:
    """What a run's folder says of the moment that is exported."""

    checkpoint: str
    iteration: int
    base_identity: str
    metrics: dict[str, float]
    """Those of the last iteration before the checkpoint; empty where the run's files are gone."""
    before: dict[str, float]
    """Held-out prompts before the first iteration; empty: none were looked at."""
    after: dict[str, float]


def page(form: Form, recipe: Recipe, record: Record, verified: list[str], has_plot: bool) -> str:
    """The whole card. `verified`: what the verification found, a sentence each."""
    title = f"{recipe.name or 'run'}: {form.what}"
    data = ModelCardData(
        base_model=None if Path(recipe.model.path).exists() else recipe.model.path,  # the hub knows no local folder
        library_name=LIBRARIES[form.adapter],
        pipeline_tag="text-generation" if form.function == "logprobs" else None,
        tags=["ppo", "rlhf", "lora" if form.adapter else form.what],
        model_name=title,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n",
        f"{PURPOSES[form.what]}, after {record.iteration} iterations (checkpoint {record.checkpoint}) of PPO on "
        "DeepSpeed ZeRO by Alternator.\n",
        _base(recipe, record),
        f"## Loading\n\n`folder` is where this page lies.\n\n```python\n{loading_code(form)}```\n",
        "## Verification\n\n" + "".join(f"- {line}\n" for line in verified),
        _results(record),
        "![learning curve](learning_curve.png)\n" if has_plot else "",
        f"## Recipe\n\n```yaml\n{recipe_text(recipe)}```\n",
    ]
    return str(ModelCard("\n".join(part for part in parts if part), ignore_metadata_errors=True))


def _base(recipe: Recipe, record: Record) -> str:
    model = recipe.model
    rows = [("base model", f"`{model.path}`"), ("its weights", f"`{record.base_identity}`")]
    return _rows([*rows, ("computed in", model.dtype), ("quantization", model.quantization)])


def _rows(rows: list[tuple[str, ...]], head: tuple[str, ...] = ("", "")) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _results(record: Record) -> str:
    text = ""
    if record.after:
        rows = [(k.removeprefix("eval/"), f"{record.before[k]:.3f}", f"{v:.3f}") for k, v in record.after.items()]
        text += "Held-out prompts:\n\n" + _rows(rows, ("", "before", "after")) + "\n"
    if record.metrics:
        rows = [(f"`{name}`", f"{record.metrics[name]:.4g}") for name in SHOWN_METRICS if name in record.metrics]
        text += f"The last of {record.iteration} iterations:\n\n" + _rows(rows, ("metric", "")) + "\n"
    return text and f"## Results\n\n{text}"
