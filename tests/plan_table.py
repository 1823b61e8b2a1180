"""The table of docs/planning.md: on how many devices models of usual sizes fit. `python -m tests.plan_table` prints it.

The recipe: bfloat16, LoRA of rank 16 for actor and critic on all linear layers, a reward model of the policy's size, up
to 1024 tokens of prompt and of response, 16 sequences at once in generation, micro-batches of 2, activation
checkpointing. "Separate" has a critic (LoRA), a reference and a reward in models of their own, as other engines do.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from engine import planner, shapes
from engine.config import Recipe
from engine.ds_config import read_ds_config
from engine.plan_report import most


def sizes(kind, hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> PretrainedConfig:
    """A config with a head of its own."""
    return kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


MODELS = {
    "7B": sizes(Qwen2Config, 3584, 18944, 28, 28, 4, 152064),
    "13B": sizes(LlamaConfig, 5120, 13824, 40, 40, 40, 32000),
    "32B": sizes(Qwen2Config, 5120, 27648, 64, 40, 8, 152064),
    "70B": sizes(LlamaConfig, 8192, 28672, 80, 64, 8, 128256),
}
"""Shapes of Qwen 2.5 7B, Llama 2 13B (whose heads share no keys), Qwen 2.5 32B and Llama 3 70B."""
DEVICES = [1, 2, 4, 8, 16, 32, 64]
MEMORIES = [24, 40, 80]
SEPARATE = {"critic": {"home": "model"}, "reference": {"home": "model"}}


def recipe(folder: Path, **sections) -> Recipe:
    positions = {"max_prompt_tokens": 1024, "prompts_per_iteration": 512}
    critic = {"lora": {"rank": 16}, **sections.pop("critic", {})}
    model = {"path": str(folder), "dtype": "bfloat16", **sections.pop("model", {})}
    return Recipe.model_validate(
        {
            "model": model,
            "actor": {"lora": {"rank": 16}},
            "critic": critic,
            "rewards": [{"model": str(folder)}],
            "data": positions,
            "generation": {"max_new_tokens": 1024, "max_concurrent_sequences": 16},
            "ppo": {"micro_batch_sequences": 2},
            "zero": {"activation_checkpointing": True},
            **sections,
        }
    )


def peak(settings: Recipe, devices: int, memory: int | None) -> int:
    """The most bytes of a rank, over all phases."""
    raw = read_ds_config(settings.zero.ds_config)
    phases = planner.phases(settings, raw, devices, on_cuda=True, device_memory=memory)
    return most(phases, "device")


def model_state(settings: Recipe, devices: int) -> int:
    """Bytes of a rank's weights, masters, moments and gradients, of all homes."""
    raw = read_ds_config(settings.zero.ds_config)
    states = [planner.state(home, settings, raw, devices, on_cuda=True).device for home in shapes.homes(settings)]
    return sum(size for of in states for part, size in of.items() if part != planner.BUCKETS)


def least(settings: Recipe, devices: int) -> str:
    """The smallest device that is enough, in GB."""
    enough = (memory for memory in MEMORIES if peak(settings, devices, memory * 10**9) <= memory * 10**9)
    return str(next(enough, "-"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of docs/planning.md.")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS, metavar="NAME")
    names = parser.parse_args().only
    with tempfile.TemporaryDirectory() as temporary:
        print(f"| | {' | '.join(map(str, DEVICES))} | model state on 8 |\n|---|{'---|' * (len(DEVICES) + 1)}")
        for name in names:
            folder = Path(temporary, name)
            MODELS[name].save_pretrained(folder)
            for title, sections in ((f"{name}, one base", {}), (f"{name}, separate", SEPARATE)):
                settings = recipe(folder, **sections)
                cells = [*(least(settings, devices) for devices in DEVICES), f"{model_state(settings, 8) / 1e9:.1f} GB"]
                print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
