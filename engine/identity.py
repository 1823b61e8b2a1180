"""What a run is, as against how it is run: a checkpoint goes on with the same base, data, roles and seed or not at all.

Large files are told apart by their size, their first and their last bytes: a weights file's names and shapes stand at
its beginning, and reading hundreds of gigabytes at every start would cost minutes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from engine.config import Recipe, RewardConfig, locate

ENDS_BYTES = 2**24
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")
IN_NO_IDENTITY = (
    *("name", "output", "resume", "time_limit", "watchdog_seconds", "self_check"),
    *("checkpoint", "failures", "evaluation", "iterations"),
)
"""Settings that may change without the slightest effect on the iteration that has begun."""


def identity_of(recipe: Recipe) -> dict[str, object]:
    """By what a person would call it; values that JSON knows."""
    model, critic = recipe.model, recipe.critic
    data = recipe.data.model_dump(exclude={"dataset", "prompts_per_iteration", "samples_per_prompt"})
    return {
        "base": {"weights": _weights(model.path, model.revision), "quantization": model.quantization},
        "tokenizer": digest(model.path, lambda file: file.name.startswith(TOKENIZER)) or model.path,
        "roles": {
            "actor": recipe.actor.train,
            "critic": [critic.home, critic.train] + ([_weights(critic.path)] if critic.path else []),
            "reference": [recipe.reference_home, _weights(recipe.reference_path)],
            "rewards": {reward.label: _source(reward) for reward in recipe.rewards},
        },
        "adapter shapes": {
            "actor": _weights(recipe.actor.init_adapter) if recipe.actor.init_adapter else _lora(recipe.actor.lora),
            "critic": _lora(critic.lora),
        },
        "data": {"prompts": _weights(recipe.data.dataset), **data},
        "seed": recipe.seed,
        "batch sizes": {
            "data.prompts_per_iteration": recipe.data.prompts_per_iteration,
            "data.samples_per_prompt": recipe.data.samples_per_prompt,
            "ppo.minibatch_sequences": recipe.ppo.minibatch_sequences,
        },
    }


def changed_identity(before: dict, now: dict, remedy: str = "go on with the old one, or start a new run") -> list[str]:
    """One line for each part of the identity that is another."""
    return [
        f"the {name} changed since the checkpoint: {_differences(before.get(name), value)}; {remedy}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def changed_settings(before: dict, now: dict, prefix: str = "") -> dict[str, tuple]:
    """Dotted keys of two recipes (as JSON) whose values differ, with both."""
    found = {}
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = old, new
    return found


def _differences(before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        changed = changed_settings(before, now)
        return ", ".join(f"{key} was {_short(old)}, is {_short(new)}" for key, (old, new) in changed.items())
    return f"was {_short(before)}, is {_short(now)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _source(reward: RewardConfig) -> str:
    if reward.function:
        return reward.function.rpartition(":")[2]  # its file may be mended
    return _weights(reward.model or reward.adapter)


def _lora(settings) -> dict:
    return settings.model_dump(mode="json", exclude={"alpha"})


def _weights(path: str, revision: str | None = None) -> str:
    """The digest of a local file or folder; a hub name stands for itself."""
    return digest(path, lambda file: not file.name.startswith(TOKENIZER)) or f"{path}@{revision or 'default'}"


def digest(path: str, wanted: Callable[[Path], bool] = lambda file: True) -> str | None:
    """SHA-256 over names, sizes and ends of the files of a folder; None: there is no such folder or file."""
    place = locate(path)
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file() and wanted(f))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        # A data set's own name doesn't matter, those of a folder's files do.
        name = "" if file == place else file.relative_to(place).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(ENDS_BYTES))
            opened.seek(max(ENDS_BYTES, size - ENDS_BYTES))
            digest.update(opened.read(ENDS_BYTES))
    return digest.hexdigest()
