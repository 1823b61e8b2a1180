"""Where scores come from: frozen reward models and Python functions, one raw number per response each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine import dist, models, zero
from engine.batch import Prompts, Rollout, length_mask
from engine.config import PPOConfig, Recipe, RewardConfig, locate
from engine.ds_config import frozen_ds_config
from engine.errors import RunError
from engine.fetching import prefetch_elements
from engine.hybrid_engine import HybridEngine
from engine.minibatches import micro_batches
from engine.plugins import line_of, load_function
from engine.reward_text import RewardText, other_tokenizer
from engine.roles import reward_role
from engine.scoring import last_token_scores
from engine.sharded_loading import sharded_loading
from engine.stopping import scored_text

logger = dist.get_logger(__name__)


class RewardSource(Protocol):
    """One source of scores."""

    name: str

    def score(self, rollout: Rollout, texts: Texts) -> Tensor:
        """`[B]` float32 raw scores of this rank's responses; every rank calls it equally often."""

    def close(self) -> None:
        """Give memory back."""


class Texts:
    """A rollout as people read it: prompts, responses without special tokens, and the dataset's other columns.

    Args:
        continuations: the responses as they go on from their prompts' text; None: as they stand. Decoded on its own, a
            response lacks the space before its first word with many tokenizers.
    """

    def __init__(
        self,
        prompts: tuple[str, ...],
        responses: list[str],
        columns: tuple[dict, ...],
        continuations: list[str] | None = None,
    ):
        self.prompts, self.responses = list(prompts), responses
        self.continuations = responses if continuations is None else continuations
        names = columns[0].keys() if columns else ()
        self.columns = {name: [row[name] for row in columns] for name in names}

    @classmethod
    def of(
        cls, prompts: Prompts, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()
    ) -> Texts:
        """Decode this rank's responses, each up to the first stop string in it."""
        rows = [
            ids[:n] for ids, n in zip(rollout.response_ids.tolist(), rollout.response_lengths.tolist(), strict=True)
        ]
        last = [ids[-1:] for ids in rollout.prompt_ids.tolist()]
        responses, before, joined = (
            tokenizer.batch_decode(part, skip_special_tokens=True)
            for part in (rows, last, [ids + row for ids, row in zip(last, rows, strict=True)])
        )
        continuations = [
            # A prompt that ends within a character decodes to something else than the character does.
            whole.removeprefix(token) if whole.startswith(token) else alone
            for whole, token, alone in zip(joined, before, responses, strict=True)
        ]
        kept = [scored_text(response, stop_strings) for response in responses]
        # Generation looks for stop strings in the response's own text: a space before it makes none.
        continuations = [
            text[: len(text) - len(response) + len(part)]
            for text, response, part in zip(continuations, responses, kept, strict=True)
        ]
        return cls(prompts.texts, kept, prompts.columns, continuations)


class RewardModel:
    """A frozen sequence-classification model in its own ZeRO-3 inference engine.

    It reads the policy's ids, or the text where its own tokenizer is another one.

    Args:
        tokenizer: the policy's.
    """

    def __init__(self, config: RewardConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase):
        self.name = config.label
        self.settings = recipe.ppo.for_inference
        self.messages_column = recipe.data.messages_column
        dtype, trust = recipe.model.dtype, recipe.model.trust_remote_code
        with sharded_loading(frozen_ds_config(recipe, config.offload_param), models.DTYPES[dtype]):
            model = models.load_scorer(config.model, dtype, trust)
        own = other_tokenizer(config.model, tokenizer, self.messages_column is not None, trust)
        # Not every model has a limit, and transformers has one name for those that have.
        longest = getattr(model.config, "max_position_embeddings", None)
        self.text = RewardText(own, longest) if own is not None else None
        self.tokenizer = tokenizer if own is None else own
        if self.text is not None:
            logger.info("reward %s reads text: its tokenizer is another one", self.name)
        ds_config = frozen_ds_config(recipe, config.offload_param, prefetch_elements=prefetch_elements(model))
        self.engine = zero.FrozenEngine(_Scorer(model, recipe.ppo.packing), ds_config)
        keep, offloaded = recipe.zero.keep_gathered_bytes, config.offload_param == "cpu"
        self.phase_weights = zero.phase_weights(self.engine.module, keep, self.engine.device, offloaded)

    def score(self, rollout: Rollout, texts: Texts) -> Tensor:
        ids, lengths = self.reads(rollout, texts)
        scores = _in_micro_batches(self._forward, ids, length_mask(lengths, ids.shape[1]), lengths, self.settings)
        self.phase_weights.let_go()
        return scores

    def reads(self, rollout: Rollout, texts: Texts) -> tuple[Tensor, Tensor]:
        """`[B, L]` ids that the model is given, padded on the right, and `[B]` lengths; a collective."""
        if self.text is None:
            return rollout.sequences, rollout.sequence_lengths
        return self._read(rollout, texts)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.engine(ids.to(self.engine.device), mask.to(self.engine.device))

    def _read(self, rollout: Rollout, texts: Texts) -> tuple[Tensor, Tensor]:
        """`[B, L]` ids of the texts in the model's own tokens, padded on the right, and `[B]` lengths; a collective.

        Raises:
            RunError: on every rank, when a text of any of them can't be read.
        """
        whole, problem = [], None
        try:
            for row, ended in enumerate(rollout.ended.tolist()):
                if self.messages_column is None:
                    whole.append(self.text.plain(texts.prompts[row], texts.continuations[row], ended))
                else:
                    messages = texts.columns[self.messages_column][row]
                    whole.append(self.text.chat(messages, texts.responses[row], ended))
        except ValueError as error:
            problem = f"reward {self.name}: {error} (prompt {texts.prompts[row]!r:.200})"
        dist.agree(problem)
        rows = [self.text.fit(ids) for ids in whole]
        lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int64)
        ids = torch.zeros(len(rows), max(map(len, rows), default=1), dtype=torch.int64)
        for row, of_row in enumerate(rows):
            ids[row, : len(of_row)] = torch.tensor(of_row)
        self._warn_of_cuts(sum(len(part) < len(all_) for part, all_ in zip(rows, whole, strict=True)))
        return ids, lengths

    def _warn_of_cuts(self, mine: int) -> None:
        """A collective: only rank 0 speaks."""
        cut = int(dist.all_reduce(torch.tensor(mine)))
        if cut:
            logger.warning(
                "reward %s: %d texts were longer than its %d positions and lost their beginning",
                self.name,
                cut,
                self.text.longest,
            )

    def close(self) -> None:
        self.engine.close()


def _in_micro_batches(
    forward: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, lengths: Tensor, settings: PPOConfig
) -> Tensor:
    """`[B]` float32 scores of this rank's rows; every rank makes as many forwards. `lengths` as in minibatches.py."""
    scores = torch.zeros(len(ids))
    for rows in micro_batches(lengths, settings):
        if len(rows):
            some, real = ids[rows], mask[rows]
        else:  # this rank has run out of rows; the weights are fetched all the same
            some, real = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
        used = real.any(0)
        scores[rows] = forward(some[:, used], real[:, used])[: len(rows)].float().cpu()
    return scores


class _Scorer(torch.nn.Module):
    """Gives the frozen engine the pooling that reads the last real position."""

    def __init__(self, model: PreTrainedModel, packed: bool):
        super().__init__()
        self.model, self.packed = model, packed

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return last_token_scores(self.model, input_ids, mask, self.packed)


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


class RewardAdapter:
    """A LoRA adapter and a score head on the shared base: one more role there, and no weights of its own to load."""

    def __init__(self, index: int, recipe: Recipe, engine: HybridEngine, tokenizer: PreTrainedTokenizerBase):
        self.name = recipe.rewards[index].label
        self.role, self.engine, self.tokenizer = reward_role(index), engine, tokenizer
        self.settings = recipe.ppo.for_inference

    def score(self, rollout: Rollout, texts: Texts) -> Tensor:
        def forward(ids: Tensor, mask: Tensor) -> Tensor:
            return self.engine.scores(self.role, ids, mask)

        ids, lengths = self.reads(rollout, texts)
        return _in_micro_batches(forward, ids, length_mask(lengths, ids.shape[1]), lengths, self.settings)

    def reads(self, rollout: Rollout, texts: Texts) -> tuple[Tensor, Tensor]:
        """As those of `RewardModel`."""
        return rollout.sequences, rollout.sequence_lengths

    def close(self) -> None:
        pass


def build(recipe: Recipe, engine: HybridEngine, tokenizer: PreTrainedTokenizerBase) -> list[RewardSource]:
    """The recipe's sources, in its order; `tokenizer` is the policy's."""
    sources: list[RewardSource] = []
    for index, config in enumerate(recipe.rewards):
        if config.model:
            sources.append(RewardModel(config, recipe, tokenizer))
        elif config.adapter:
            sources.append(RewardAdapter(index, recipe, engine, tokenizer))
        else:
            sources.append(RewardFunction(config))
    return sources
