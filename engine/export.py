"""What a run keeps of its weights, in forms that plain peft and transformers load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine import dist, zero
from engine.config import Recipe
from engine.hybrid_engine import HybridEngine
from engine.roles import ACTOR, CRITIC, RolesModel, ValueModel

VALUE_HEAD = "value_head.weight"


def export_final(engine: HybridEngine, folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `folder/actor` and `folder/critic` (a collective: ZeRO-3 shards are gathered; rank 0 writes).

    A role that trained an adapter leaves a peft adapter, `PeftModel.from_pretrained(base, folder / "actor")`; one that
    trained in full leaves a whole model with its tokenizer. A critic on the shared base leaves value_head.safetensors
    too, a `[1, hidden]` weight applied to the last hidden states; one of its own is a sequence classifier.
    """
    for role in (ACTOR, CRITIC):
        write_role(engine, role, folder / role, recipe, tokenizer)
    if dist.rank() == 0 and recipe.critic.home != "model":
        on = {"trunk": "../actor"} if recipe.critic.home == "trunk" else {"base": recipe.critic_path}
        about = {"home": recipe.critic.home, **on}
        (folder / CRITIC / "value_head.json").write_text(json.dumps(about, indent=2))
    dist.barrier()


def write_role(
    engine: HybridEngine, role: str, folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write what one role trained, in the forms of `export_final` (a collective; rank 0 writes)."""
    home, weights = engine.home(role), _whole(engine, role)
    if dist.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    head = weights.pop(VALUE_HEAD, None)
    if head is not None:
        save_file({"weight": head}, folder / "value_head.safetensors")
    if weights:
        base = recipe.model.path if role == ACTOR else recipe.critic_path
        revision = recipe.model.revision if base == recipe.model.path else None
        _write(home, role, weights, folder, (base, revision), tokenizer)


def _whole(engine: HybridEngine, role: str) -> dict[str, Tensor]:
    """What a role trains, whole, on rank 0; one tensor at a time, since a role can be a whole model."""
    weights = {}
    for name, parameter in engine.role_parameters(role).items():
        with torch.no_grad(), zero.gathered([parameter]):
            if dist.rank() == 0:
                weights[name] = parameter.detach().cpu().clone().contiguous()
    return weights


def _write(
    home: RolesModel | ValueModel,
    role: str,
    weights: dict[str, Tensor],
    folder: Path,
    base_and_revision: tuple[str, str | None],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if not isinstance(home.policy, PeftModel):
        buffers = {name: buffer for name, buffer in home.policy.state_dict().items() if name not in weights}
        tied = set(buffers) & {name for name, _ in home.policy.named_parameters(remove_duplicate=False)}
        state = weights | {name: buffer for name, buffer in buffers.items() if name not in tied}
        home.policy.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        return
    # peft nests the files of an adapter that isn't called default in a folder of its name: write them flat instead.
    state = get_peft_model_state_dict(home.policy, state_dict=weights, adapter_name=role)
    save_file(state, folder / "adapter_model.safetensors")
    config, (base, revision) = home.policy.peft_config[role], base_and_revision
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file from every process
    config.save_pretrained(str(folder))
