"""Supervised training: one `fit` for language models on demonstrations and for reward models on preference pairs.

A loss is a local sum over a denominator that is passed in, so the step doesn't depend on how its batch was dealt to
ranks and cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from engine import causal, dist, zero
from engine.batch import length_mask
from engine.console import progress_bar
from engine.ds_config import read_ds_config, resolve_ds_config
from engine.hybrid_engine import Schedule
from engine.role_config import OptimizerSettings
from engine.scoring import last_token_scores
from engine.section import Section

# A local sum over a batch's denominator: loss(model, examples, denominator).
Loss = Callable[[nn.Module, Sequence, float], Tensor]


class FitSettings(Section):
    """One supervised training run."""

    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-3, schedule="cosine", warmup_steps=20)
    """AdamW for all trainable parameters."""
    epochs: PositiveInt = 1
    """Passes over the examples."""
    steps: PositiveInt | None = None
    """Optimizer steps after which training ends, within the epochs; null: the epochs decide."""
    batch_sequences: PositiveInt = 64
    """Examples of one optimizer step, over all ranks."""
    micro_batch_sequences: PositiveInt = 64
    """Most examples in one forward of one rank; changes speed and memory, never the result."""
    seed: NonNegativeInt = 0
    """Seed of the order of the examples."""
    ds_config: str = "ds_configs/zero2.json"
    """DeepSpeed JSON, stages 0 to 2."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response that a policy should give."""

    ids: list[int]  # prompt and response, the end token included
    prompt_tokens: int  # how many of them are prompt; at least 1, since the first response token is predicted from it

    @property
    def count(self) -> int:
        """What it adds to the loss's denominator: response tokens."""
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt; people liked the first better."""

    chosen: list[int]  # prompt and response
    rejected: list[int]  # prompt and response
    count: int = 1  # what it adds to the loss's denominator: pairs


@dataclass(frozen=True)
class FitReport:
    """What a training run did."""

    steps: int
    losses: tuple[float, ...]  # mean over the batch of each step, on all ranks
    seconds: float


def pad_right(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """`(ids [B, L], mask [B, L])` of rows of token ids, L the longest. Padding holds 0, whatever that id means."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = length_mask(lengths, int(lengths.max()))
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return ids.to(device), mask.to(device)


def sft_loss(model: nn.Module, examples: Sequence[Demonstration], denominator: float) -> Tensor:
    """Next-token cross-entropy summed over the response tokens of `examples`, divided by `denominator`."""
    ids, mask = pad_right([example.ids for example in examples], _device(model))
    logits = causal.call(model, ids, mask, use_cache=False).logits
    starts = torch.tensor([example.prompt_tokens for example in examples], device=ids.device)
    targets = (mask & (causal.positions(mask) >= starts[:, None]))[:, 1:]  # the logits at t - 1 predict token t
    return F.cross_entropy(logits[:, :-1][targets].float(), ids[:, 1:][targets], reduction="sum") / denominator


def preference_loss(model: nn.Module, examples: Sequence[Preference], denominator: float) -> Tensor:
    """Bradley-Terry loss -log sigmoid(score of chosen - score of rejected), summed and divided by `denominator`."""
    return -F.logsigmoid(preference_margins(model, examples)).sum() / denominator


def preference_margins(model: nn.Module, examples: Sequence[Preference]) -> Tensor:
    """`[B]` the score of each chosen response minus that of its rejected one, from a single forward."""
    rows = [example.chosen for example in examples] + [example.rejected for example in examples]
    scores = last_token_scores(model, *pad_right(rows, _device(model)))
    return scores[: len(examples)] - scores[len(examples) :]


def preference_accuracy(model: nn.Module, examples: Sequence[Preference], micro_batch_sequences: int = 64) -> float:
    """Fraction of pairs whose chosen response scores strictly higher, over the examples of all ranks."""
    micro_batches = deal(examples, dist.rank(), dist.world_size(), micro_batch_sequences)
    with torch.no_grad():
        right = sum(float((preference_margins(model, m).gt(0)).sum()) * real for m, real in micro_batches)
    return float(dist.all_reduce(torch.tensor(right, dtype=torch.float64))) / len(examples)


def fit(model: nn.Module, examples: Sequence, loss: Loss, settings: FitSettings, label: str = "training") -> FitReport:
    """Train `model` in place on `examples`, the same sequence on every rank.

    Args:
        examples: records with a `count`, which they add to the denominator of their batch.
        loss: `sft_loss`, `preference_loss` or another local sum over a denominator.
        label: what the progress bar calls this.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the step that it came from was not taken.
    """
    if not examples:
        raise ValueError(f"{label}: there are no examples to train on")
    started = time.monotonic()
    batches = list(batches_of_rows(len(examples), settings))
    schedule = Schedule(settings.optimizer, len(batches))
    engine = _make_engine(_WithLoss(model, loss), settings)
    losses = []
    with progress_bar(label, len(batches)) as advance:
        for step, rows in enumerate(batches):
            mean = _accumulate(engine, [examples[row] for row in rows], settings.micro_batch_sequences)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{label}: the loss of step {step} is {mean}; the optimizer did not take it up"
                )
            engine.step({_ROLE: schedule.rate(step)})
            losses.append(mean)
            advance(f"loss {mean:.4f}")
    engine.close()
    return FitReport(len(losses), tuple(losses), time.monotonic() - started)


def _accumulate(engine: zero.TrainedEngine, batch: list, micro_batch_sequences: int) -> float:
    """Forward and backward of one batch, shared by all ranks; returns its mean loss."""
    world = dist.world_size()
    # The engine averages gradients over ranks, so a mean over the whole batch needs the world size back.
    denominator = sum(example.count for example in batch) / world
    micro_batches = deal(batch, dist.rank(), world, micro_batch_sequences)
    total = 0.0
    for index, (examples, real) in enumerate(micro_batches):
        value = engine(examples, denominator) * float(real)
        total += value.item()
        engine.backward(value, last=index == len(micro_batches) - 1)
    return dist.all_reduce(torch.tensor(total, dtype=torch.float64)).item() / world


def deal(batch: Sequence, rank: int, world_size: int, size: int) -> list[tuple[list, bool]]:
    """This rank's micro-batches of a batch, as many on every rank, each with whether it counts.

    Ranks must run the same number of forwards, or they wait for each other. One that runs out of examples repeats the
    batch's first one, and that doesn't count.
    """
    mine = list(batch[rank::world_size])
    number = math.ceil(math.ceil(len(batch) / world_size) / size)
    parts = [mine[index * size : (index + 1) * size] for index in range(number)]
    return [(part, True) if part else ([batch[0]], False) for part in parts]


def batches_of_rows(count: int, settings: FitSettings) -> Iterator[list[int]]:
    """Row numbers of each optimizer step: a function of the seed and the epoch, never of the world size.

    The last batch of an epoch may be smaller; its mean is over what it holds.
    """
    step = 0
    for epoch in range(settings.epochs):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, settings.batch_sequences):
            if step == settings.steps:
                return
            yield order[start : start + settings.batch_sequences]
            step += 1


class _WithLoss(nn.Module):
    """A model whose forward is its loss: everything that trains passes through the engine's forward."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, examples: Sequence, denominator: float) -> Tensor:
        return self.loss(self.model, examples, denominator)


_ROLE = "model"


def _make_engine(module: nn.Module, settings: FitSettings) -> zero.TrainedEngine:
    """The module under DeepSpeed, all that trains in one group."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    config = resolve_ds_config(
        read_ds_config(settings.ds_config),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        world_size=dist.world_size(),
        micro_batch=settings.micro_batch_sequences,
        trainable_parameters=sum(p.numel() for p in parameters),
    )
    if config["zero_optimization"]["stage"] == 3:
        # The caller gets its model back whole, to save or to go on with.
        raise ValueError(f"supervised training runs at ZeRO stages 0 to 2, got {settings.ds_config} at stage 3")
    return zero.TrainedEngine(module, [zero.ParameterGroup(_ROLE, parameters, settings.optimizer)], config)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
