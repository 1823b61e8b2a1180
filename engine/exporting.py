"""One role of a run in a folder of its own, for plain libraries: written, tried in a fresh process, then put in place.

What the process computes is compared with what the engine computed of the same weights and sequences; an export that
deviates is never seen under its name.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from engine import dist, merging, model_card, models, reward_sources, zero
from engine.batch import Prompts, Rollout, map_rows
from engine.checkpoint import restore
from engine.checks import check_files
from engine.command_line import recipe_text
from engine.config import Recipe
from engine.errors import RunError
from engine.export import write_role
from engine.export_check import judge, judge_merged, verify
from engine.export_source import Source, Wanted, find
from engine.hybrid_engine import HybridEngine
from engine.metrics import read_jsonl
from engine.model_card import Form, Record
from engine.prompts import PromptSource, load_prompts
from engine.randomness import Stream
from engine.report import draw_learning_curve
from engine.reward_sources import RewardSource, Texts
from engine.role_config import ModelConfig
from engine.roles import ACTOR, CRITIC
from engine.rollout import generate
from engine.stopping import Stops

logger = dist.get_logger(__name__)

SEQUENCES, LONGEST = 8, 64
"""What an export is tried on: so many prompts of the run, with responses of at most so many tokens."""


def export(wanted: Wanted) -> Path:
    """Export and verify; returns the folder. All ranks call it; after the engine's part rank 0 goes on alone.

    Raises:
        RecipeError: there is nothing to export like that, or the base is not that of the run.
        RunError: the export does not compute what the engine does; nothing is left of it.
    """
    source = find(wanted)
    check_files(source.loaded)
    zero.start()
    torch.manual_seed(source.recipe.seed)
    unfinished = source.output.with_name(f".{source.output.name}-{os.getpid()}")
    try:
        with TemporaryDirectory() as scratch:
            done = _from_engine(source, unfinished, Path(scratch))
            if dist.rank() == 0:
                _finish(source, done, unfinished, Path(scratch))
    finally:
        if dist.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    return source.output


@dataclass(frozen=True)
class _FromEngine:
    """What only the engine knows."""

    form: Form
    rows: list[dict]
    """`ids` of a sequence, `at` which of the loading code's numbers it is compared, and the `expected` ones there."""
    generation: GenerationConfig
    """How it sampled."""

    @property
    def expected(self) -> Tensor:
        """The engine's numbers of all rows, `[N]`."""
        return torch.cat([torch.tensor(row["expected"], dtype=torch.float64) for row in self.rows])


def _finish(source: Source, done: _FromEngine, folder: Path, adapter: Path) -> None:
    """What a single process does: merge, describe, verify, put in place."""
    about = {"what": done.form.what, "checkpoint": source.checkpoint.name, "iteration": source.state["iteration"]}
    if done.form.what == "merged":
        merged = merging.merge(source.recipe, adapter, folder, source.wanted.dtype, done.rows)
        done.generation.save_pretrained(folder)
        _describe(source, done.form, folder, [])  # its code is what the verification runs
        found = verify(folder, done.form, done.rows, merged.rounded, source)
        said = judge_merged(source, merged, done.expected, found)
        about["lost_to_rounding"] = merged.lost
    else:
        _describe(source, done.form, folder, [])
        found = verify(folder, done.form, done.rows, done.expected, source)
        said = judge(found, done.form)
    _describe(source, done.form, folder, said)
    about |= found
    (folder / "export.json").write_text(json.dumps(about, indent=2) + "\n")
    _put_in_place(folder, source.output)
    for line in said:
        logger.info("%s", line)
    logger.info("exported and verified: %s", source.output)


def _from_engine(source: Source, folder: Path, scratch: Path) -> _FromEngine:
    """Everything that takes the engine: it is restored, samples and evaluates; weights are written (a collective)."""
    recipe, what = source.loaded, source.wanted.what
    tokenizer = models.load_tokenizer(recipe.model)
    prompts = load_prompts(recipe.data, recipe.generation, tokenizer)
    prompts = PromptSource(prompts, recipe.seed, SEQUENCES).head(SEQUENCES, dist.rank(), dist.world_size())
    engine, sources = HybridEngine.load(recipe), []
    try:
        restore(engine, source.checkpoint, source=0, same_course=False)
        end_ids = models.end_token_ids(tokenizer, engine.roles.causal, recipe.generation.end_tokens)
        mine = _sampled(engine, recipe, prompts, Stops(end_ids, recipe.generation.stop_strings, tokenizer))
        own = tokenizer
        if what == "reward":
            sources += reward_sources.build(recipe, engine, tokenizer)
            texts = Texts.of(prompts, mine, tokenizer, recipe.generation.stop_strings)
            rows, form = _scored(engine, sources[0], mine, texts), _write_reward(source, folder)
            own = sources[0].tokenizer
        else:
            rows = _per_token(engine, map_rows(mine, dist.all_gather_rows), values=what == "critic")
            form = _write_trained(engine, recipe, what, scratch if what == "merged" else folder, tokenizer)
        if dist.rank() == 0:
            own.save_pretrained(folder)
    finally:
        for reward in sources:
            reward.close()
        engine.close()
    return _FromEngine(form, rows, merging.generation_config(recipe, end_ids, tokenizer))


def _sampled(engine: HybridEngine, recipe: Recipe, prompts: Prompts, stops: Stops) -> Rollout:
    """This rank's responses, of the length that a verification needs."""
    limit = min(LONGEST, recipe.generation.max_new_tokens)
    shorter = {"max_new_tokens": limit, "min_new_tokens": min(limit, recipe.generation.min_new_tokens)}
    settings = recipe.generation.model_copy(update=shorter)
    with engine.generation() as actor:
        return generate(actor, prompts, settings, stops, recipe.seed, Stream.EVALUATION, idle=engine.idle_pass)


def _per_token(engine: HybridEngine, rollout: Rollout, values: bool) -> list[dict]:
    """The engine's log-probs, or values, of each sequence's response tokens (a collective)."""
    rows = []
    for row in range(len(rollout)):
        with engine.inference():
            output = engine.forward(rollout, torch.tensor([row]), values=values)
        n, before = int(rollout.response_lengths[row]), int(rollout.prompt_lengths[row]) - 1
        ids = rollout.sequences[row, : before + 1 + n].tolist()
        numbers = (output.values if values else output.logprobs)[0, :n]
        # Both functions of the loading code have at index t what the model says behind token t.
        rows.append({"ids": ids, "at": list(range(before, before + n)), "expected": numbers.tolist()})
    return rows


def _scored(engine: HybridEngine, reward: RewardSource, rollout: Rollout, texts: Texts) -> list[dict]:
    """The engine's scores of the sequences of all ranks (a collective)."""
    with engine.inference():
        scores, (ids, lengths) = reward.score(rollout, texts), reward.reads(rollout, texts)
    mine = [
        {"ids": row[:n], "at": [0], "expected": [score]}
        for row, n, score in zip(ids.tolist(), lengths.tolist(), scores.tolist(), strict=True)
    ]
    return [row for part in dist.all_gather_objects(mine) for row in part]


def _write_trained(
    engine: HybridEngine, recipe: Recipe, what: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Form:
    """The weights of a trained role (a collective). A value head on the actor's trunk comes with that trunk."""
    temperature = recipe.generation.temperature or 1.0
    on_base = Form(what, recipe.model, recipe.actor.train == "lora", temperature=temperature)
    if what != "critic":
        write_role(engine, ACTOR, folder, recipe, tokenizer)
        return on_base if what == "actor" else Form(what, recipe.model, temperature=temperature)
    write_role(engine, CRITIC, folder, recipe, tokenizer)
    if recipe.critic.home == "trunk":
        write_role(engine, ACTOR, folder, recipe, tokenizer)
        return on_base
    if recipe.critic.home == "adapter":
        return Form(what, recipe.model, adapter=True)
    adapter = recipe.critic.train == "lora"
    return Form(what, _beside(recipe.model, recipe.critic_path), adapter=adapter, classifier=True)


def _beside(base: ModelConfig, path: str) -> ModelConfig:
    return base.model_copy(update={"path": path, "revision": base.revision if path == base.path else None})


def _write_reward(source: Source, folder: Path) -> Form:
    """A reward model in the type that it scored in, or a copy of its adapter, which names its base (rank 0 writes)."""
    recipe, reward = source.recipe, source.reward
    form = Form("reward", recipe.model, adapter=reward.adapter is not None, classifier=True)
    if dist.rank() != 0:
        return form
    if reward.model:
        scorer = models.load_scorer(reward.model, recipe.model.dtype, recipe.model.trust_remote_code)
        scorer.save_pretrained(folder)
        return form
    folder.mkdir(parents=True)
    config = PeftConfig.from_pretrained(reward.adapter)
    config.base_model_name_or_path, config.revision = recipe.model.path, recipe.model.revision
    config.save_pretrained(folder)
    save_file(load_peft_weights(reward.adapter, device="cpu"), folder / "adapter_model.safetensors")
    return form


def _describe(source: Source, form: Form, folder: Path, verified: list[str]) -> None:
    """Everything beside the weights that a reader finds: the page, the plot, the recipe."""
    recipe, iteration = source.recipe, source.state["iteration"]
    metrics, looks = (_lines(source.run / name, iteration) for name in ("metrics.jsonl", "evaluation.jsonl"))
    if metrics and not (folder / "learning_curve.png").exists():
        draw_learning_curve(source.run, folder)
    named = [{k: v for k, v in row.items() if k != "iteration"} for row in (looks[:1] + looks[-1:])]
    before, after = named or ({}, {})
    identity = source.state["identity"]["base"]["weights"]
    record = Record(source.checkpoint.name, iteration, identity, metrics[-1] if metrics else {}, before, after)
    card = model_card.page(form, recipe, record, verified, has_plot=bool(metrics))
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")


def _lines(file: Path, iteration: int) -> list[dict]:
    """Those up to an iteration; the files of a run can be gone, or be ahead of a checkpoint."""
    return [row for row in read_jsonl(file) if row["iteration"] <= iteration] if file.exists() else []


def _put_in_place(unfinished: Path, output: Path) -> None:
    if output.exists():
        raise RunError(f"output: {output} has come into being meanwhile, and an export overwrites nothing")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(output)
