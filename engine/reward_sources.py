"""Where scores come from: frozen reward models and Python functions, one raw number per response each."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine import models, zero
from engine.batch import Rollout
from engine.config import Recipe, RewardConfig, locate
from engine.errors import RunError
from engine.minibatches import micro_batches
from engine.plugins import line_of, load_function
from engine.scoring import last_token_scores


class RewardSource(Protocol):
    """One source of scores."""

    name: str

    def score(self, rollout: Rollout, texts: Texts) -> Tensor:
        """`[B]` float32 raw scores of this rank's responses; every rank calls it equally often."""

    def close(self) -> None:
        """Give memory back."""


class Texts:
    """A rollout as people read it: prompts, responses without special tokens, and the dataset's other columns."""

    def __init__(self, prompts: tuple[str, ...], responses: list[str], columns: tuple[dict, ...]):
        self.prompts, self.responses = list(prompts), responses
        names = columns[0].keys() if columns else ()
        self.columns = {name: [row[name] for row in columns] for name in names}

    @classmethod
    def of(cls, prompts, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Texts:
        """Decode this rank's responses."""
        rows = [
            ids[:n] for ids, n in zip(rollout.response_ids.tolist(), rollout.response_lengths.tolist(), strict=True)
        ]
        return cls(prompts.texts, tokenizer.batch_decode(rows, skip_special_tokens=True), prompts.columns)


class RewardModel:
    """A frozen sequence-classification model in its own ZeRO-3 inference engine."""

    def __init__(self, config: RewardConfig, recipe: Recipe):
        self.name = config.label
        self.micro_batch_sequences = recipe.ppo.micro_batch_sequences
        dtype = recipe.model.dtype
        module = _Scorer(models.load_scorer(config.model, dtype, recipe.model.trust_remote_code))
        self.engine = zero.FrozenEngine(module, models.DTYPES[dtype], offload_to_cpu=config.offload_param == "cpu")

    def score(self, rollout: Rollout, texts: Texts) -> Tensor:
        scores = torch.zeros(len(rollout))
        for rows in micro_batches(torch.arange(len(rollout)), self.micro_batch_sequences):
            if len(rows):
                ids, mask = rollout.sequences[rows], rollout.sequence_mask[rows]
            else:  # this rank has run out of rows; the weights are fetched all the same
                ids, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
            used = mask.any(0)
            device = self.engine.device
            output = self.engine(ids[:, used].to(device), mask[:, used].to(device))
            scores[rows] = output[: len(rows)].float().cpu()
        return scores

    def close(self) -> None:
        self.engine.close()


class _Scorer(torch.nn.Module):
    """Gives the frozen engine the pooling that reads the last real position."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return last_token_scores(self.model, input_ids, mask)


class RewardFunction:
    """A Python function f(prompts, responses, **columns) -> one float per response."""

    def __init__(self, config: RewardConfig):
        self.name = config.label
        self.reference = config.function
        self.function = load_function(config.function)

    def score(self, rollout: Rollout, texts: Texts) -> Tensor:
        """Call the function on this rank's rows.

        Raises:
            RunError: it raised, returned the wrong count, or something that is not a finite number.
        """
        if not texts.prompts:
            return torch.zeros(0)
        first, count = texts.prompts[0], len(texts.prompts)
        try:
            scores = [float(s) for s in self.function(texts.prompts, texts.responses, **texts.columns)]
        except Exception as error:  # the user's code can raise anything
            line = line_of(error, locate(self.reference.rpartition(":")[0]).resolve())
            raise RunError(
                f"reward function {self.reference} raised {type(error).__name__}: {error}{line} "
                f"(in a batch of {count} whose first prompt is {first!r})"
            ) from error
        if len(scores) != count:
            raise RunError(
                f"reward function {self.reference} returned {len(scores)} scores for {count} responses "
                f"(first prompt {first!r}); it must return one per response"
            )
        for prompt, score in zip(texts.prompts, scores, strict=True):
            if not math.isfinite(score):
                raise RunError(f"reward function {self.reference} returned {score} for the prompt {prompt!r}")
        return torch.tensor(scores)

    def close(self) -> None:
        pass


def build(recipe: Recipe) -> list[RewardSource]:
    """The recipe's sources, in its order."""
    return [RewardModel(config, recipe) if config.model else RewardFunction(config) for config in recipe.rewards]
