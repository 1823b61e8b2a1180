"""Prompts -> Rollout: the actor samples responses, many at a time; a finished one makes room for the next prompt."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from engine import causal, dist, kv_cache, progress
from engine.batch import Prompts, Rollout
from engine.config import GenerationConfig
from engine.kv_cache import FixedRows, MovingRows, StillRows, can_move_rows, can_stand_still
from engine.onednn import packed_linears
from engine.randomness import Stream
from engine.sampling import sample, token_uniforms
from engine.stopping import Stops

logger = dist.get_logger(__name__)

AGREE_EVERY = 16
"""Passes between two questions whether any rank has work left: a reduced flag costs little, 15 idle passes too."""
PREFILL_TOKENS = 16384
"""Most prompt tokens of one forward, padding included: they bound what its activations take."""
COMPILED_COLUMNS = 256
"""A compiled step's cache is a multiple of this wide: prompts of other lengths seldom have it compiled anew."""


def generate(
    module: PreTrainedModel,
    prompts: Prompts,
    settings: GenerationConfig,
    stops: Stops,
    seed: int,
    stream: Stream = Stream.TRAINING,
    idle: Callable[[], None] | None = None,
) -> Rollout:
    """Sample one response for each prompt.

    Args:
        module: a causal model, called like a plain one.
        prompts: this rank's rows; none is fine.
        stops: what ends a response before its limit.
        idle: None: the module is whole on this rank, which decodes without any collective. Otherwise a forward fetches
            weights, all ranks must make as many, and this does what one does except to compute.
    """
    uniforms = token_uniforms(seed, stream, prompts.draws, prompts.samples, settings.max_new_tokens)
    compiled = settings.compile and idle is None
    if settings.compile and not compiled:
        logger.warning("generation.compile: not all weights fit the device; steps that fetch some aren't compiled")
    decoding = _Decoding(module, prompts, settings, stops, uniforms, compiled)
    if idle is None:
        with nullcontext() if compiled else packed_linears(module):  # a compiler can't read packed weights
            while decoding.busy:
                decoding.one_pass()
    else:
        _in_step(decoding, idle)
    responses = decoding.responses
    return Rollout(
        prompt_ids=prompts.prompt_ids,
        prompt_lengths=prompts.prompt_lengths,
        response_ids=responses.ids,
        response_lengths=responses.lengths,
        ended=responses.ended,
        sampler_logprobs=responses.logprobs,
        draws=prompts.draws,
        samples=prompts.samples,
    )


def _in_step(decoding: _Decoding, idle: Callable[[], None]) -> None:
    """As many passes on this rank as on any other, until none has work left."""
    for passes in itertools.count():
        busy = torch.tensor(int(decoding.busy))
        if passes % AGREE_EVERY == 0 and not dist.all_reduce(busy, "max"):
            return
        if busy:
            decoding.one_pass()
        else:
            idle()


@dataclass(frozen=True)
class _Responses:
    """Responses as they grow, padded on the right with 0."""

    ids: Tensor  # [B, R] int64
    logprobs: Tensor  # [B, R] float32
    lengths: Tensor  # [B] int64
    ended: Tensor  # [B] bool

    @classmethod
    def empty(cls, rows: int, width: int) -> _Responses:
        return cls(
            ids=torch.zeros(rows, width, dtype=torch.int64),
            logprobs=torch.zeros(rows, width),
            lengths=torch.zeros(rows, dtype=torch.int64),
            ended=torch.zeros(rows, dtype=torch.bool),
        )


@dataclass
class _Prefilled:
    """Rows that have their first token and wait for a slot."""

    indices: Tensor  # [N] int64, which prompts
    tokens: Tensor  # [N] int64, drawn last
    sources: Tensor  # [N] int64, rows of the cache: identical prompts share one
    cache: DynamicCache
    lengths: Tensor  # [rows of the cache] int64, real tokens


class _Decoding:
    """The responses that grow at the moment, a slot each, and the prompts that wait for one.

    Continuous batching takes the longest prompts first: those that come later, in the place of finished ones, then
    never widen what the others attend to. Without it prompts come in their order, and a whole batch ends together.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        prompts: Prompts,
        settings: GenerationConfig,
        stops: Stops,
        uniforms: Tensor,
        compiled: bool,
    ):
        self.module, self.device = module, next(module.parameters()).device
        self.prompts, self.settings, self.stops, self.uniforms = prompts, settings, stops, uniforms
        self.limits = prompts.max_new_tokens.clamp(max=settings.max_new_tokens)
        self.responses = _Responses.empty(len(prompts), settings.max_new_tokens)
        self.done = torch.zeros(len(prompts), dtype=torch.bool)
        self.slots = min(settings.max_concurrent_sequences, len(prompts))
        can_move = can_move_rows(module.config)
        self.continuous = settings.continuous_batching and can_move
        self.waiting = deque(_identical(prompts) if self.continuous else [[row] for row in range(len(prompts))])
        self.prefilled: _Prefilled | None = None
        self.indices = self.tokens = torch.empty(0, dtype=torch.int64)  # [live rows]: which prompts, and drawn last
        if len(prompts):
            longest, most = int(prompts.prompt_lengths.max()), int(self.limits.max())
            columns = longest + most + (kv_cache.BLOCK if self.slots < len(prompts) else 0)
            if not can_move:
                self.rows = FixedRows()
            elif compiled:
                columns = math.ceil(columns / COMPILED_COLUMNS) * COMPILED_COLUMNS
                self.rows = StillRows(self.slots, longest, columns, whole=True)
            else:
                self.rows = MovingRows(self.slots, longest, columns, whole=can_stand_still(module))
        self.step = _compiled(module) if compiled else module
        self._banned: Tensor | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilled or len(self.indices))

    def one_pass(self) -> None:
        """One forward: of new prompts, or of one token of each live row."""
        progress.moved()
        # A prefill is a forward, which on a GPU costs as much as a token of every row. So it waits until an eighth of
        # the slots is free: empty ones cost less than that, and nothing at all where arithmetic is the limit.
        enough = max(1, self.slots // 8) if self.continuous else self.slots
        if self.waiting and not self.prefilled and self._free >= enough:
            self._prefill()
        else:
            self._decode()
        self._take_in()

    @property
    def _free(self) -> int:
        return self.slots - len(self.indices)

    def _prefill(self) -> None:
        """The next prompts, each that is not like another once, and the first token of their responses."""
        groups = self._next_groups()
        firsts = torch.tensor([group[0] for group in groups])
        lengths = self.prompts.prompt_lengths[firsts]
        width = int(lengths.max())
        ids, mask = self.prompts.prompt_ids[firsts, -width:], self.prompts.prompt_mask[firsts, -width:]
        cache = DynamicCache(config=self.module.config)
        logits = self._logits(self.module, ids, mask.to(self.device), cache)
        indices = torch.tensor(list(itertools.chain.from_iterable(groups)))
        sources = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
        tokens = self._draw(indices, logits[sources.to(self.device)])
        stay = ~self.done[indices] if self.continuous else torch.ones_like(indices, dtype=torch.bool)
        if stay.any():
            self.prefilled = _Prefilled(indices[stay], tokens[stay], sources[stay], cache, lengths.to(self.device))

    def _next_groups(self) -> list[list[int]]:
        """Waiting prompts for the free slots, or a few more where the last one's samples go beyond."""
        groups, rows, width = [], 0, 0
        while self.waiting and rows < self._free:
            width = max(width, int(self.prompts.prompt_lengths[self.waiting[0][0]]))
            if self.continuous and groups and width * (len(groups) + 1) > PREFILL_TOKENS:
                break
            groups.append(self.waiting.popleft())
            rows += len(groups[-1])
        return groups

    def _take_in(self) -> None:
        """Give free slots to prefilled rows; there is nothing to compute."""
        new = self.prefilled
        if new is None or not self._free:
            return
        now, later = slice(self._free), slice(self._free, None)
        self.rows.append(new.cache, new.lengths, new.sources[now].to(self.device))
        self.indices = torch.cat([self.indices, new.indices[now]])
        self.tokens = torch.cat([self.tokens, new.tokens[now]])
        new.indices, new.tokens, new.sources = new.indices[later], new.tokens[later], new.sources[later]
        self.prefilled = new if len(new.indices) else None

    def _decode(self) -> None:
        """One more token for each live row, then their slots back from those that have ended."""
        mask = self.rows.next_mask()
        ids = nn.functional.pad(self.tokens, (0, len(mask) - len(self.tokens)))[:, None]
        logits = self._logits(self.step, ids, mask, self.rows.cache)[: len(self.tokens)]
        self.rows.advance()
        self.tokens = self._draw(self.indices, logits)
        alive = ~self.done[self.indices]
        if not self.continuous:
            alive[:] = alive.any()
        if not alive.all():
            order = _closed_up(alive)
            self.rows.keep(order.to(self.device))
            self.indices, self.tokens = self.indices[order], self.tokens[order]

    def _logits(self, module: nn.Module, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """`[B, V]` float32 after the last of `ids`."""
        ids = ids.to(self.device)
        output = causal.call(module, ids, mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float()

    def _draw(self, indices: Tensor, logits: Tensor) -> Tensor:
        """`[B]` the next tokens, which have been added to their responses; 0 for a response that has ended."""
        growing = ~self.done[indices]
        if not growing.all():
            tokens = torch.zeros_like(indices)
            tokens[growing] = self._draw(indices[growing], logits[growing.to(self.device)])
            return tokens
        position = self.responses.lengths[indices]
        uniforms = self.uniforms[indices, position].to(self.device)
        banned = self._banned_tokens(position, logits.shape[-1])
        tokens, logprobs = (x.cpu() for x in sample(logits, uniforms, self.settings, banned))
        self.responses.ids[indices, position] = tokens
        self.responses.logprobs[indices, position] = logprobs
        self.responses.lengths[indices] = position + 1
        self.responses.ended[indices] = ended = self._ended(indices, position)
        self.done[indices] = ended | (position + 1 >= self.limits[indices])
        return tokens

    def _banned_tokens(self, position: Tensor, vocabulary: int) -> Tensor | None:
        """`[B, V]` bool, what may not be drawn at these positions."""
        if self._banned is None:
            self._banned = torch.zeros(2, vocabulary, dtype=torch.bool, device=self.device)
            for early in (False, True):
                ids = self.stops.banned(vocabulary, early)
                if ids is not None:
                    self._banned[int(early), ids.to(self.device)] = True
            self._bans = self._banned.any(1).tolist()
        early = position < self.settings.min_new_tokens
        if not self._bans[bool(early.any())]:
            return None
        return self._banned[early.long().to(self.device)]

    def _ended(self, indices: Tensor, position: Tensor) -> Tensor:
        """`[B]` bool, whether the token at `position` ends its response."""
        if not self.stops.strings:
            return self.stops.reached(self.responses.ids[indices, position][:, None], 0)
        least, ended = self.settings.min_new_tokens, torch.zeros(len(indices), dtype=torch.bool)
        for at in position.unique().tolist():
            if at >= least:
                rows = position == at
                checked = at if at > least else 0  # a stop string that came too early ends the response now
                ended[rows] = self.stops.reached(self.responses.ids[indices[rows], : at + 1], checked)
        return ended


def _compiled(module: PreTrainedModel) -> nn.Module:
    """The module for steps of one shape; on a GPU a step is one launch of a CUDA graph."""
    on_gpu = next(module.parameters()).device.type == "cuda"
    return torch.compile(module, dynamic=False, mode="reduce-overhead" if on_gpu else "default")


def _identical(prompts: Prompts) -> list[list[int]]:
    """Rows by prompt, the longest prompts first."""
    groups: dict[bytes, list[int]] = {}
    for row, length in enumerate(prompts.prompt_lengths.tolist()):
        groups.setdefault(prompts.prompt_ids[row, -length:].numpy().tobytes(), []).append(row)
    return sorted(groups.values(), key=lambda rows: -int(prompts.prompt_lengths[rows[0]]))


def _closed_up(alive: Tensor) -> Tensor:
    """The numbers of the live rows, the last ones in the places of those that have ended: as few as can be move."""
    order = torch.arange(int(alive.sum()))
    order[~alive[: len(order)]] = torch.nonzero(alive[len(order) :]).flatten() + len(order)
    return order
