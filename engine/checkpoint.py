"""What a run keeps of its weights: adapters that load in plain peft, and the value head beside the critic's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from engine import dist, zero
from engine.roles import ACTOR, CRITIC, RolesModel


def export_final(roles: RolesModel, folder: Path, base_path: str) -> None:
    """Write `folder/actor` and `folder/critic` (a collective: ZeRO-3 shards are gathered; rank 0 writes).

    actor/ loads with `PeftModel.from_pretrained(base, folder / "actor")`. critic/ is an adapter of the same form (with
    critic.home adapter) and value_head.safetensors, a `[1, hidden]` weight applied to the last hidden states.
    """
    for role in (ACTOR, CRITIC):
        parameters = roles.role_parameters(role)
        with torch.no_grad(), zero.gathered(parameters.values()):
            weights = {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}
        if dist.rank() == 0:
            _write(roles, role, weights, folder / role, base_path)
    dist.barrier()


def _write(roles: RolesModel, role: str, weights: dict[str, torch.Tensor], folder: Path, base_path: str) -> None:
    folder.mkdir(parents=True)
    head = weights.pop("value_head.weight", None)
    if head is not None:
        save_file({"weight": head}, folder / "value_head.safetensors")
        (folder / "value_head.json").write_text(json.dumps({"home": roles.critic.home, "base": base_path}, indent=2))
    if weights:
        # peft nests the files of an adapter that isn't called default in a folder of its name: write them flat instead.
        state = get_peft_model_state_dict(roles.policy, state_dict=weights, adapter_name=role)
        save_file(state, folder / "adapter_model.safetensors")
        config = roles.policy.peft_config[role]
        config.base_model_name_or_path, config.inference_mode = base_path, True
        config.save_pretrained(str(folder))
