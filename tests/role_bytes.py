"""Model-state bytes of a rank: four roles on one base against a LoRA-SFT run and against four separate models.

`python -m tests.role_bytes` measures them with two ranks at ZeRO-3 in bfloat16 and prints the table of docs/models.md.
Counted are unique live storages of weights (small ones are whole beside their shards), gradients, float32 masters and
Adam's moments, after an optimizer step; DeepSpeed's communication buffers, activations and the replica are not model
state.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from engine import dist, zero
from engine.ds_config import frozen_ds_config
from engine.hybrid_engine import HybridEngine
from engine.roles import ACTOR, CRITIC, ReferenceModel, RolesModel, ValueModel, reward_role
from engine.update import update
from tests import live_storages, tiny

DTYPE = torch.bfloat16
RANK = 8


def config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    return LlamaConfig(vocab_size=4096, max_position_embeddings=128, **sizes, **changes)


def base(seed: int = 0) -> LlamaForCausalLM:
    """24.6 million parameters."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).to(DTYPE).requires_grad_(False)


def scorer() -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    return LlamaForSequenceClassification(config(num_labels=1)).to(DTYPE).requires_grad_(False)


def save_reward_adapter(folder: Path) -> str:
    settings = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, target_modules="all-linear")
    get_peft_model(scorer(), settings).save_pretrained(str(folder))
    return str(folder)


def recipe(**sections):
    lora = {"rank": RANK}
    return tiny.recipe(
        model={"dtype": "bfloat16"},
        zero={"ds_config": "ds_configs/zero3.json"},
        actor={"lora": lora},
        critic={"lora": lora, **sections.pop("critic", {})},
        **sections,
    )


def held_bytes(engine: zero.TrainedEngine) -> int:
    """Model state of a trained engine; a bucket is what its gradients travel in."""
    return sum(size for part, size in live_storages.held(engine).items() if part != "buckets")


def frozen_bytes(engine: zero.FrozenEngine) -> int:
    return live_storages.fresh_bytes((zero.local_shard(p) for p in engine.module.parameters()), set())


def stepped(engine: HybridEngine, settings) -> HybridEngine:
    update(engine, tiny.experience(), settings, 0, 0.0, frozenset())
    return engine


def four_roles(adapter: str) -> int:
    settings = recipe(rewards=[{"adapter": adapter}])
    engine = HybridEngine(RolesModel(base(), settings), settings)
    sampled = tiny.rollout()
    engine.scores(reward_role(0), sampled.sequences, sampled.sequence_mask)
    stepped(engine, settings)  # last, as in an iteration: at its end small weights are whole again
    return _close(engine, held_bytes(engine.engine))


def lora_sft() -> tuple[int, int]:
    """Bytes of the run, and how many of them each trained element costs (a trunk critic without its head's share)."""
    settings = recipe(critic={"home": "trunk"})
    roles = RolesModel(base(), settings)
    elements = sum(p.numel() for role in (ACTOR, CRITIC) for p in roles.role_parameters(role).values())
    engine = stepped(HybridEngine(roles, settings), settings)
    whole = held_bytes(engine.engine)
    frozen = sum(p.nbytes for p in base().parameters()) // dist.world_size()
    return _close(engine, (whole, round((whole - frozen) / elements, 3)))


def four_models() -> dict[str, int]:
    settings = recipe(critic={"home": "model"}, reference={"home": "model"})
    roles, own = RolesModel(base(), settings), ValueModel(scorer(), settings.critic)
    engine = stepped(HybridEngine(roles, settings, own, ReferenceModel(base(), 1.0)), settings)
    reward = zero.FrozenEngine(scorer(), frozen_ds_config(settings, "none"))
    found = {
        "actor": held_bytes(engine.engine),
        "critic": held_bytes(engine.critic_engine),
        "reference": frozen_bytes(engine.reference),
        "reward": frozen_bytes(reward),
    }
    reward.close()
    return _close(engine, found)


def _close(engine: HybridEngine, value):
    engine.close()
    return value


def adapter_elements() -> tuple[int, int]:
    """Elements of a trained critic (adapter and head) and of a frozen reward adapter with its head: as many."""
    settings = recipe()
    critic = sum(p.numel() for p in RolesModel(base(), settings).role_parameters(CRITIC).values())
    return critic, critic


def measure(pool, folder: Path) -> dict[str, float]:
    """All figures, of rank 0."""
    adapter = save_reward_adapter(folder)
    together = pool.run(four_roles, adapter)[0]
    sft, per_element = pool.run(lora_sft)[0]
    critic, reward = adapter_elements()
    ours = sft + critic * per_element + reward * DTYPE.itemsize * (1 / pool.world_size + 1)  # a shard, and whole
    separate = pool.run(four_models)[0]
    return {"together": together, "sft": sft, "sft and adapters": ours, **separate}


def table(found: dict[str, float]) -> str:
    separate = sum(found[role] for role in ("actor", "critic", "reference", "reward"))
    rows = [
        ("LoRA-SFT of the same base", found["sft"]),
        ("the same plus the critic's and the reward's adapters", found["sft and adapters"]),
        ("**four roles, one base**", found["together"]),
        *((f"separate {role}", found[role]) for role in ("actor", "critic", "reference", "reward")),
        ("**four separate models**", separate),
    ]
    lines = ["| model state of a rank | MB | against four roles, one base |", "|---|---|---|"]
    lines += [f"| {name} | {size / 1e6:.2f} | {size / found['together']:.2f} |" for name, size in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    from tests.distributed import Pool

    workers = Pool(world_size=2)
    with tempfile.TemporaryDirectory() as temporary:
        print(table(measure(workers, Path(temporary))))
    workers.close()
