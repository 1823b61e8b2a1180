"""What self-checks look at an engine through: a few short responses, sampled or made up, and weights moved a little."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import adapters, causal, dist, zero
from engine.batch import Prompts, Rollout, map_rows, take_rows
from engine.config import GenerationConfig, Recipe
from engine.hybrid_engine import HybridEngine
from engine.prompts import PromptSet, PromptSource
from engine.randomness import Stream
from engine.reward_sources import RewardFunction, RewardSource, Texts
from engine.roles import ACTOR, CRITIC, Layout, RolesOutput
from engine.rollout import generate
from engine.sampling import boundary_distance, token_uniforms
from engine.stopping import Stops

BOUNDS = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.2}
"""On a ratio, and on a log-prob, value or score as a share of its size, if that is above 1: rounding alone.

docs/models.md has what was measured: 5e-6, 0.012 and 0.035. Dropout or a wrong adapter moves log-probs by tenths.
"""
NUDGE, GROWTH = 0.05, 1.25
"""What is added to weights that start at 0, and what others are multiplied by."""
CUT, CHANGED_BEFORE, CHANGED_END = [0, 3], [1], [2, 4]
"""Rows of made-up responses, by what is changed: the end token away, the second token another, the last another."""


@dataclass(frozen=True)
class Size:
    """How much is looked at."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Subject:
    """What is checked: a run's parts, before its first iteration."""

    recipe: Recipe
    engine: HybridEngine
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    stops: Stops
    sources: list[RewardSource]
    folder: Path

    @property
    def bound(self) -> float:
        return BOUNDS[self.recipe.model.dtype]

    @property
    def scorers(self) -> list[RewardSource]:
        """Reward models and adapters: what a user's function does besides scoring is not ours to set off."""
        return [source for source in self.sources if not isinstance(source, RewardFunction)]

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained, by role and name."""
        of_role = self.engine.role_parameters
        return {f"{role}.{name}": p for role in (ACTOR, CRITIC) for name, p in of_role(role).items()}

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.trained.items() if adapters.owner(name) is not None}

    @property
    def heads(self) -> dict[str, nn.Parameter]:
        """Where values are read; zeros at first, which hide what they are read from."""
        return {n: p for n, p in self.trained.items() if _is_head(n) and adapters.owner(n) is None}

    def said(self, rollout: Rollout, rows: Tensor | None = None) -> RolesOutput:
        """What the roles say of some rows, all in one forward."""
        rows = torch.arange(len(rollout)) if rows is None else rows
        return self.engine.forward(rollout, rows, values=True, ref_logprobs=True)

    def scores(self, prompts: Prompts, rollout: Rollout) -> dict[str, Tensor]:
        """`[B]` by source."""
        texts = Texts.of(prompts, rollout, self.tokenizer, self.recipe.generation.stop_strings)
        return {f"score of {source.name}": source.score(rollout, texts) for source in self.scorers}


@dataclass(frozen=True)
class Sample:
    """Responses to a few of the shortest prompts, all of which every rank samples."""

    prompts: Prompts
    settings: GenerationConfig
    mine: Rollout
    margins: Tensor  # [B, R] how near each of this rank's draws was to another token
    rollout: Rollout  # rank 0's

    @classmethod
    def of(cls, subject: Subject, size: Size) -> Sample:
        """Sample them (a collective)."""
        generation, seed = subject.recipe.generation, subject.recipe.seed
        changes = {"max_new_tokens": min(size.tokens, generation.max_new_tokens), "min_new_tokens": 0}
        # All tokens can be drawn: where a restriction ends, rounding alone would decide.
        settings = generation.model_copy(update=changes | {"top_k": 0, "top_p": 1.0, "compile": False})
        prompts = PromptSource(_shortest(subject.prompts, size.rows), seed, size.rows).head(size.rows)
        with subject.engine.generation() as actor:
            mine = generated(subject, actor, prompts, settings)
            margins = torch.cat([_margins(subject, actor, mine, row, settings) for row in range(len(mine))])
        everyones = map_rows(mine, dist.all_gather_rows)
        return cls(prompts, settings, mine, margins, take_rows(everyones, slice(len(prompts))))


@dataclass(frozen=True)
class MadeUp:
    """Responses of two words to some prompts, with an end token that also fills the padding."""

    prompts: Prompts
    words: tuple[int, int]
    end: int

    @classmethod
    def of(cls, subject: Subject, prompts: Prompts) -> MadeUp:
        ends = subject.stops.end_ids.tolist()
        special = {*ends, *subject.tokenizer.all_special_ids, subject.prompts.pad_id}
        ordinary = (token for token in range(len(subject.tokenizer)) if token not in special)
        own = subject.tokenizer.eos_token_id
        return cls(
            rows_of(prompts, [0, 1, 2, 3, 0]), tuple(islice(ordinary, 2)), own if own in ends or not ends else ends[0]
        )

    def rollout(self, filler: int | None = None, changed: bool = False) -> Rollout:
        """The responses.

        Args:
            filler: what fills the padding of prompts and responses; None: the end token.
            changed: as `CUT`, `CHANGED_BEFORE` and `CHANGED_END` say.
        """
        (a, b), end = self.words, self.end
        rows = [[a, b, end], [a, b, a, b, end], [a, b, end], [b, a, end], [b, a, end]]
        if changed:
            rows = [[a, b], [a, a, a, b, end], [a, b, a], [b, a], [b, a, b]]
        filler, width = end if filler is None else filler, 6
        return Rollout(
            prompt_ids=torch.where(self.prompts.prompt_mask, self.prompts.prompt_ids, filler),
            prompt_lengths=self.prompts.prompt_lengths,
            response_ids=torch.tensor([row + [filler] * (width - len(row)) for row in rows]),
            response_lengths=torch.tensor(list(map(len, rows))),
            ended=torch.tensor([row[-1] == end for row in rows]),
            sampler_logprobs=torch.zeros(len(rows), width),
            draws=self.prompts.draws,
            samples=self.prompts.samples,
        )


@contextmanager
def nudged(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, weights are a little off, alike on every rank; then their bytes are what they were."""
    # Shards alone are moved. What was gathered from them before, or is inside, would go on saying what they were.
    _cut(parameters.values())
    before = {name: zero.local_shard(p).clone() for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            if "lora_B" in name or _is_head(name):
                zero.local_shard(p).add_(NUDGE)
            else:
                zero.local_shard(p).mul_(GROWTH)
        yield
    finally:
        _cut(parameters.values())
        for name, p in parameters.items():
            zero.local_shard(p).copy_(before[name])


def generated(subject: Subject, actor: PreTrainedModel, prompts: Prompts, settings: GenerationConfig) -> Rollout:
    """Inside `engine.generation`: responses with the random numbers of self-checks."""
    recipe, engine = subject.recipe, subject.engine
    return generate(actor, prompts, settings, subject.stops, recipe.seed, Stream.SELF_CHECKS, engine.idle_pass)


def by_name(output: RolesOutput) -> dict[str, Tensor]:
    """What was asked for, on the CPU."""
    return {name: value.float().cpu() for name, value in vars(output).items() if value is not None}


def off(now: Tensor, wanted: Tensor) -> float:
    """The largest deviation, as a share of what is above 1; nan where something is no number."""
    now, wanted = now.float().cpu(), wanted.float().cpu()
    return largest(((now - wanted).abs() / wanted.abs().clamp(min=1)).flatten().tolist())


def felt(now: Tensor, before: Tensor, exactly: bool) -> bool:
    """Whether something changed; in float32 by more than another order of summation would do."""
    return off(now, before) > (0 if exactly else 1e-5)


def largest(numbers: Iterable[float]) -> float:
    """nan beats all: it is no number that could keep a bound. 0 of none."""
    return max(numbers, key=lambda x: (x != x, x), default=0.0)


def differing(one: Rollout, other: Rollout, margins: Tensor, bound: float) -> list[int]:
    """Rows that the same random numbers sampled differently, beyond what rounding can do (DESIGN.md, invariant 5).

    Args:
        margins: of `one`'s draws. A first difference is allowed where a draw lay that near another token.
    """
    rows = []
    for row, lengths in enumerate(zip(one.response_lengths.tolist(), other.response_lengths.tolist(), strict=True)):
        same = one.response_ids[row, : min(lengths)] == other.response_ids[row, : min(lengths)]
        common = int(same.long().cumprod(0).sum())
        logprobs = (rollout.sampler_logprobs[row, :common] for rollout in (one, other))
        at_boundary = common < min(lengths) and float(margins[row, common]) < bound
        whole = common == lengths[0] == lengths[1]
        if not (whole or at_boundary) or not off(*logprobs) <= bound:
            rows.append(row)
    return rows


def rows_of(prompts: Prompts, rows: Iterable[int]) -> Prompts:
    """Some rows of prompts."""
    rows = list(rows)
    tensors = {name: value[rows] for name, value in vars(prompts).items() if isinstance(value, Tensor)}
    texts, columns = (tuple(values[row] for row in rows) for values in (prompts.texts, prompts.columns))
    return replace(prompts, **tensors, texts=texts, columns=columns)


def _cut(parameters: Iterable[nn.Parameter]) -> None:
    """To the shards, under ZeRO-3; the engine gathers before its next forward what it keeps whole."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id") and zero.is_gathered(parameter):
            parameter.partition()


def _is_head(name: str) -> bool:
    return "value_head" in name or ".score." in name


def _shortest(prompts: PromptSet, count: int) -> PromptSet:
    """So many of the shortest, of different lengths as far as there are; a small dataset's come again."""
    of_length = {len(record.ids): record for record in reversed(prompts.records)}
    by_length = sorted(of_length.values(), key=lambda record: len(record.ids))
    return PromptSet(tuple(islice(cycle(by_length), count)), prompts.pad_id)


def _margins(
    subject: Subject, actor: PreTrainedModel, rollout: Rollout, row: int, settings: GenerationConfig
) -> Tensor:
    """`[1, R]` of one row, by a forward without a cache."""
    device = next(actor.parameters()).device
    one = take_rows(rollout, slice(row, row + 1))
    layout = Layout.of(one, device)
    logits = layout.before(causal.call(actor, layout.sequences, layout.mask, use_cache=False).logits).float()
    numbers = token_uniforms(subject.recipe.seed, Stream.SELF_CHECKS, one.draws, one.samples, len(logits))
    banned, unknown = None, subject.stops.banned(logits.shape[-1], early=False)
    if unknown is not None:
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
        banned[unknown.to(device)] = True
    margins = boundary_distance(logits, numbers[0].to(device), settings.temperature, banned)
    return nn.functional.pad(margins.cpu(), (0, rollout.response_ids.shape[1] - len(logits)))[None]
