"""The embedded default: builds the toy world's tokenizer, base policy, reward model and prompts in one folder.

The stories and the parser that judges them are `engine.stories`. What is built here is ordinary: Hugging Face folders
and jsonl files, which the engine treats like anybody's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random

import torch
import transformers
from pydantic import Field, PositiveInt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from engine import dist
from engine.preparation import copy_to_own_disks, writes_for_its_node
from engine.role_config import OptimizerSettings
from engine.section import Section
from engine.stories import (
    NAMES,
    THINGS,
    Opening,
    Plot,
    draw_opening,
    draw_plot,
    judge,
    normalize,
    vocabulary,
)
from engine.supervised import (
    Demonstration,
    FitSettings,
    Preference,
    fit,
    preference_accuracy,
    preference_loss,
    sft_loss,
)

__all__ = ["ToyWorldSettings", "judge", "prepare"]  # recipes name the judge as engine/toyworld.py:judge

logger = dist.get_logger(__name__)

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MANIFEST = "manifest.json"
# What the reward model learns to reject, and is measured on.
CORRUPTIONS = ("drop", "repeat", "swap", "cut", "early", "late", "endless", "noise")
# What it is measured on alone: a wrong name or thing. Two layers read at one position did not learn to see these (at
# chance after 24,576 pairs with them), so only the KL keeps a policy from them; the manifest says how blind it is.
UNLEARNED_CORRUPTIONS = ("stranger", "forgotten", "thing")
# Part of the cache's key: raise it when the stories or the recipes of this file change.
VERSION = 2


class ToyWorldSettings(Section):
    """How large the toy world is and how long its models train."""

    hidden_size: PositiveInt = 64
    """Width of both models."""
    layers: PositiveInt = 2
    """Transformer layers of both models."""
    heads: PositiveInt = 4
    """Attention heads of both models."""
    max_positions: PositiveInt = 128
    """Longest sequence of prompt and response, in tokens."""
    max_new_tokens: PositiveInt = 48
    """Response limit in the policy's generation config."""
    train_prompts: PositiveInt = 4096
    """Distinct prompts for all training."""
    heldout_prompts: PositiveInt = 512
    """Distinct prompts that no training sees."""
    stories: PositiveInt = 60000
    """Stories that the policy is trained on."""
    policy: FitSettings = FitSettings(
        optimizer=OptimizerSettings(
            learning_rate=8e-3, schedule="cosine", warmup_steps=20, beta2=0.98, weight_decay=0.01
        ),
    )
    """Training of the base policy."""
    pairs: PositiveInt = 24576
    """Preference pairs that the reward model is trained on."""
    heldout_pairs: PositiveInt = 512
    """Preference pairs, over held-out prompts, that its accuracy is measured on."""
    reward: FitSettings = FitSettings(
        optimizer=OptimizerSettings(
            learning_rate=3e-3, schedule="cosine", warmup_steps=20, beta2=0.98, weight_decay=0.01
        ),
    )
    """Training of the reward model."""
    minimum_accuracy: float = Field(0.95, ge=0, le=1)
    """Held-out accuracy below which the reward model is refused."""


def prepare(folder: str | Path, seed: int = 0, settings: ToyWorldSettings | None = None) -> None:
    """Build the toy world in `folder` unless it is there already; all ranks call it and train together.

    The folder appears whole or not at all: it is built beside its place and moved there at the end, so a killed build
    leaves nothing that looks finished.

    Nodes with disks of their own get a copy each.

    Layout: `policy/` (model and tokenizer), `reward/` (the same for the reward model), `prompts.jsonl`,
    `heldout.jsonl`, `manifest.json` (what it was built from and what was measured).

    Raises:
        ValueError: the folder holds something that is not a toy world.
        RuntimeError: the reward model's held-out accuracy is below `settings.minimum_accuracy`.
    """
    if dist.rank() != 0 and not dist.is_distributed():
        raise RuntimeError("start the process group before the toy world is prepared: its ranks train together")
    folder, settings = Path(folder), settings or ToyWorldSettings()
    identity = {"version": VERSION, "seed": seed, "settings": settings.model_dump(mode="json")}
    if all(dist.all_gather_objects(_is_built(folder, identity))):  # on every node's disk
        return
    dist.agree(_obstacle(folder))
    building = Path(dist.broadcast_object(f"{folder}.building-{secrets.token_hex(4)}"))
    logger.info("building the toy world in %s", folder)
    writes = dist.local_rank() == 0
    try:
        building.mkdir(parents=True, exist_ok=True)
        writes = writes_for_its_node(building)
        measured = _build(building, seed, settings)
        if dist.rank() == 0:
            _write_json(building / MANIFEST, {**identity, "measured": measured})
        copy_to_own_disks(building, writes)
        if writes:
            _move_into_place(building, folder)
    finally:
        if writes:
            shutil.rmtree(building, ignore_errors=True)
    dist.barrier()
    missing = f"{folder} on {os.uname().nodename} is not what was just built; start all ranks in one working folder"
    dist.agree(None if _is_built(folder, identity) else missing)
    plain = {name: value for name, value in measured.items() if "/" not in name}
    logger.info("built the toy world: %s", ", ".join(f"{name} {value:.4g}" for name, value in plain.items()))


def _build(folder: Path, seed: int, settings: ToyWorldSettings) -> dict[str, float]:
    """Everything but the manifest; returns what was measured."""
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = build_tokenizer(settings.max_positions)
    train, heldout = draw_prompts(settings.train_prompts, settings.heldout_prompts, seed)
    policy, policy_loss = train_policy(tokenizer, train, heldout, seed, settings)
    policy_seconds = time.monotonic() - started
    reward, accuracy = train_reward(tokenizer, policy, train, heldout, seed, settings)
    reward_seconds = time.monotonic() - started - policy_seconds
    if accuracy < settings.minimum_accuracy:
        raise RuntimeError(
            f"the reward model orders {accuracy:.3f} of the held-out pairs rightly, and {settings.minimum_accuracy} is "
            "the least; train it longer (settings.pairs, settings.reward)"
        )
    if dist.rank() == 0:
        _write_prompts(folder / "prompts.jsonl", train)
        _write_prompts(folder / "heldout.jsonl", heldout)
        for name, model in (("policy", policy), ("reward", reward)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return {
        "policy_heldout_loss": policy_loss,
        "reward_accuracy": accuracy,
        "policy_seconds": policy_seconds,
        "reward_seconds": reward_seconds,
        **accuracy_by_corruption(tokenizer, reward, heldout, seed),
    }


def build_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """One token per word; decoding puts full stops back at their words. No BOS: all stories begin with one word."""
    words = [PAD, END, UNKNOWN, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # WordPiece's decoder is the one that joins words by spaces and then tidies " ." up; no word here starts with ##.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=max_positions,
        model_input_names=["input_ids", "attention_mask"],
    )


def draw_prompts(train: int, heldout: int, seed: int) -> tuple[list[Opening], list[Opening]]:
    """Distinct openings for training, and others for evaluation."""
    random, openings = Random(f"{seed} prompts"), {}
    while len(openings) < train + heldout:
        opening = draw_opening(random)
        openings[opening.text] = opening
    drawn = list(openings.values())
    return drawn[heldout:], drawn[:heldout]


def train_policy(
    tokenizer: PreTrainedTokenizerFast,
    train: list[Opening],
    heldout: list[Opening],
    seed: int,
    settings: ToyWorldSettings,
) -> tuple[LlamaForCausalLM, float]:
    """The base policy, supervised on stories of which half end well, and its loss per token on held-out prompts."""
    model = _seeded(LlamaForCausalLM, _model_config(tokenizer, settings), seed)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    random = Random(f"{seed} stories")
    stories = ((opening, draw_plot(opening, random)) for opening in random.choices(train, k=settings.stories))
    fit(model, demonstrations(tokenizer, stories), sft_loss, settings.policy, "toy policy")
    unseen = demonstrations(tokenizer, ((opening, draw_plot(opening, random)) for opening in heldout))
    with torch.no_grad():
        return model, sft_loss(model, unseen, sum(example.count for example in unseen)).item()


def train_reward(
    tokenizer: PreTrainedTokenizerFast,
    policy: LlamaForCausalLM,
    train: list[Opening],
    heldout: list[Opening],
    seed: int,
    settings: ToyWorldSettings,
) -> tuple[LlamaForSequenceClassification, float]:
    """The reward model, grown from the policy's backbone, and its accuracy on pairs over held-out prompts."""
    config = _model_config(tokenizer, settings, num_labels=1)
    model = _seeded(LlamaForSequenceClassification, config, seed)
    model.model.load_state_dict(policy.model.state_dict())
    pairs = preferences(tokenizer, train, settings.pairs, Random(f"{seed} pairs"))
    fit(model, pairs, preference_loss, settings.reward, "toy reward")
    unseen = preferences(tokenizer, heldout, settings.heldout_pairs, Random(f"{seed} held-out pairs"))
    return model, preference_accuracy(model, unseen)


def accuracy_by_corruption(
    tokenizer: PreTrainedTokenizerFast, reward: LlamaForSequenceClassification, openings: list[Opening], seed: int
) -> dict[str, float]:
    """How often a plot scores above its own corruption, for each kind."""
    measured, random = {}, Random(f"{seed} corruptions")
    for kind in CORRUPTIONS + UNLEARNED_CORRUPTIONS:
        pairs = []
        for opening in openings[:256]:
            plot, prompt = draw_plot(opening, random), opening.text
            texts = [f"{prompt} {plot.text} {END}", f"{prompt} {corrupt(opening, plot, random, kind)}"]
            pairs.append(Preference(*tokenizer(texts)["input_ids"]))
        measured[f"reward_accuracy/{kind}"] = preference_accuracy(reward, pairs)
    return measured


def demonstrations(tokenizer: PreTrainedTokenizerFast, stories: Iterable[tuple[Opening, Plot]]) -> list[Demonstration]:
    """Stories as token ids, each ended."""
    stories = list(stories)
    prompts = tokenizer([opening.text for opening, _ in stories])["input_ids"]
    responses = tokenizer([plot.text for _, plot in stories])["input_ids"]
    end = tokenizer.eos_token_id
    return [Demonstration([*p, *r, end], len(p)) for p, r in zip(prompts, responses, strict=True)]


def preferences(
    tokenizer: PreTrainedTokenizerFast, openings: list[Opening], count: int, random: Random
) -> list[Preference]:
    """Preference pairs: a happy plot over a sad one, and a sound plot of any mood over a corrupted one of any mood.

    Half of the pairs differ in nothing else, so that the reward model has no reason to like one plot's key better than
    another's kite: a policy would soon tell of nothing but keys. The second kind keeps PPO from earning by gibberish.
    """
    prompts, chosen, rejected = [], [], []
    for opening in random.choices(openings, k=count):
        by_mood, alike = random.random() < 0.5, random.random() < 0.5
        better = draw_plot(opening, random, happy=True if by_mood else None)
        worse = draw_plot(opening, random, happy=False if by_mood else None)
        if alike:
            worse = (
                Plot(better.first, better.turn, better.ending | {"ending": worse.ending["ending"]})
                if by_mood
                else better
            )
        prompts.append(opening.text)
        chosen.append(f"{better.text} {END}")
        rejected.append(f"{worse.text} {END}" if by_mood else corrupt(opening, worse, random))
    encoded = [tokenizer(texts)["input_ids"] for texts in (prompts, chosen, rejected)]
    return [Preference(p + c, p + r) for p, c, r in zip(*encoded, strict=True)]


def corrupt(opening: Opening, plot: Plot, random: Random, kind: str | None = None) -> str:
    """A response that is no sound story of `opening`, with its end token where it has one.

    Args:
        kind: one of CORRUPTIONS or UNLEARNED_CORRUPTIONS; None: any of the first.
    """
    kind = kind or random.choice(CORRUPTIONS)
    words, sentences = normalize(plot.text).split(), list(plot.sentences)
    if kind in ("drop", "repeat", "swap"):
        for _ in range(random.choice((1, 3, 5))):
            _misplace(words, kind, random)
    elif kind == "forgotten" and len(opening.names) == 2:
        name = random.choice(opening.names)
        words = [name if word in opening.names else word for word in words]
    elif kind == "thing" and plot.turn:
        other = random.choice([thing for thing in THINGS if thing != plot.turn["thing"]])
        words = [Plot(plot.first, plot.turn | {"thing": other}, plot.ending).text]
    elif kind == "cut":
        return " ".join(words[: random.randrange(len(words))] + [END] * random.randrange(2))
    elif kind == "early":
        words = sentences[:-1]
    elif kind == "late":
        words = [*sentences, random.choice([*sentences, *draw_plot(opening, random).sentences])]
    elif kind == "endless":
        return " ".join([plot.text] + [draw_plot(opening, random).text for _ in range(random.randrange(2))])
    elif kind == "noise":
        words = random.choices(vocabulary(), k=len(words))
    else:  # a stranger, also where a story has nothing of the other two kinds
        gone = random.choice([name for name in opening.names if name in words])
        stranger = random.choice([name for name in NAMES if name not in opening.names])
        words = [stranger if word == gone else word for word in words]
    return " ".join([*words, END])


def _misplace(words: list[str], kind: str, random: Random) -> None:
    """Drop or repeat a word, or swap it with the next one, in place. An odd number of them leaves no text as it was."""
    place = random.randrange(len(words) - 1)
    if kind == "drop":
        del words[place]
    elif kind == "repeat":
        words.insert(place, words[place])
    else:
        words[place : place + 2] = reversed(words[place : place + 2])


def _model_config(tokenizer: PreTrainedTokenizerFast, settings: ToyWorldSettings, **extra) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # transformers' 0.02 is meant for wide models: at this width, learning to copy a name took twice the steps.
        initializer_range=0.05,
        dtype="float32",
        **extra,
    )


def _seeded(model_class: type[PreTrainedModel], config: LlamaConfig, seed: int) -> PreTrainedModel:
    """A new model whose weights follow from the seed alone; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.set_attn_implementation("eager")  # for sequences this short a quarter faster on CPU; not saved
    return model


def _is_built(folder: Path, identity: dict) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return all(manifest.get(key) == value for key, value in identity.items())


def _obstacle(folder: Path) -> str | None:
    """Why nothing may be built at `folder`; an older toy world may be replaced, other people's files may not."""
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        return f"{folder} holds files but no toy world ({MANIFEST}); remove it or name another folder"
    return None


def _move_into_place(building: Path, folder: Path) -> None:
    if folder.exists():
        older = building.with_name(building.name + "-older")
        os.replace(folder, older)
        shutil.rmtree(older)
    os.replace(building, folder)


def _write_prompts(path: Path, openings: list[Opening]) -> None:
    rows = [{"prompt": opening.text, "characters": list(opening.names)} for opening in openings]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
