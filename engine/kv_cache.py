"""The key-value cache of rows that come and go: preallocated, no copy of it per token, a slot per row.

Every row's tokens are contiguous and end at the one column that all rows write next, so a row is known by its first:

    column      0 1 2 3 4 5 6 7 8 9
    row 0           a a a a a a            a prompt of 4 that has decoded 2 tokens
    row 1               b b b b            taken in later: its prefill was copied to where it ends now
    row 2             c c c c c            beyond these rows lie free slots
                    ^ start     ^ end

There are few more columns than that: when the last one is written, the live ones move to the front, with `BLOCK` free
ones behind them. So attention reads rows whole, and a mask hides what isn't theirs. Read up to `end` alone, each row
and head would be a piece of memory with a gap behind it, and a processor that reads ahead takes twice as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

BLOCK = 64
"""Free columns after a move: fewer mean more copying, more mean more that attention reads in vain."""


@dataclass
class _Span:
    """Where the live rows lie in the buffers of all layers."""

    columns: int
    """Of each row, at the moment."""
    whole: bool
    """Attention is shown all columns, and positions count from the first; else those from start to end."""
    rows: int = 0
    start: int = 0
    """The leftmost column that a row uses."""
    end: int = 0
    """The column that the next token is written to."""
    column: Tensor | None = None
    """The same as a scalar int64 on the device, for a compiled step: it can't follow a Python number."""


class _AttentionRows(CacheLayerMixin):
    """Keys and values of an attention layer, `[rows, heads, columns, width]`; the two may differ in width.

    A layer with a sliding window keeps all columns, and shows the last ones.
    """

    def __init__(self, like: DynamicLayer, span: _Span, rows: int, columns: int):
        super().__init__()
        self.span = span
        self.sliding_window = getattr(like, "sliding_window", None)
        self.is_sliding = self.sliding_window is not None
        self.memory = [new.new_zeros(rows, new.shape[1], columns, new.shape[3]) for new in (like.keys, like.values)]
        self.is_initialized = True
        self._lay_out()

    def _lay_out(self) -> None:
        """Buffers of the span's columns, without a gap, at the front of the memory."""
        self.buffers = []
        for whole in self.memory:
            rows, heads, _, width = whole.shape
            shape = (rows, heads, self.span.columns, width)
            self.buffers.append(whole.view(-1)[: math.prod(shape)].view(shape))

    def append(self, prefilled: DynamicLayer, sources: Tensor) -> None:
        rows, end = slice(self.span.rows, self.span.rows + len(sources)), self.span.end
        for buffer, new in zip(self.buffers, (prefilled.keys, prefilled.values), strict=True):
            buffer[rows] = 0  # the mask hides what an earlier row left in this slot, but 0 * nan is nan
            buffer[rows, :, end - new.shape[2] : end] = new[sources]

    def keep(self, order: Tensor) -> None:
        moved = torch.nonzero(order != torch.arange(len(order), device=order.device)).flatten()
        for buffer in self.buffers if len(moved) else ():
            buffer[moved, :, : self.span.end] = buffer[order[moved], :, : self.span.end]

    def move(self, live: slice) -> None:
        """Move columns `live` so that they end at the span's end, among as many columns as it says."""
        rows = self.span.rows
        held = [buffer[:rows, :, live].clone() for buffer in self.buffers]
        self._lay_out()
        for buffer, kept in zip(self.buffers, held, strict=True):
            buffer[:rows] = 0
            buffer[:rows, :, self.span.end - kept.shape[2] : self.span.end] = kept

    # ---- what transformers asks of a layer

    def lazy_initialization(self, *states, **named_states) -> None:
        """Nothing: the buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token of every live row; views of all that its attention sees."""
        rows, end = self.span.rows, self.span.end
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, end] = new[:, :, 0]
        self.keys, self.values = (buffer[:rows, :, self._shown()] for buffer in self.buffers)
        return self.keys, self.values

    def _shown(self) -> slice:
        """The columns that the next token's attention is shown, its own included."""
        span = self.span
        if self.is_sliding and self.sliding_window < (span.columns if span.whole else span.end + 1 - span.start):
            return slice(max(0 if span.whole else span.start, span.end + 1 - self.sliding_window), span.end + 1)
        return slice(0, span.columns) if span.whole else slice(span.start, span.end + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        shown = self._shown()
        return shown.stop - shown.start, shown.start - (0 if self.span.whole else self.span.start)

    def get_seq_length(self) -> int:
        return self.span.end - (0 if self.span.whole else self.span.start)

    def get_max_length(self) -> int:
        return -1


class _StillRows(_AttentionRows):
    """The same in one shape and at one address for every token: all slots, all columns, and the mask hides the rest."""

    is_compileable = True

    def __init__(self, like: DynamicLayer, span: _Span, rows: int, columns: int):
        super().__init__(like, span, rows, columns)
        if span.column is None:
            span.column = torch.zeros((), dtype=torch.int64, device=like.keys.device)
        self.keys, self.values = self.buffers
        for tensor in (*self.buffers, span.column):
            torch._dynamo.mark_static_address(tensor)  # a CUDA graph reads them where they are

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer.index_copy_(2, self.span.column[None], new)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Tensor:
        return self.span.column


class _StateRows(LinearAttentionLayer):
    """States of a recurrent or convolution layer, one per row whatever its length."""

    def __init__(self, like: LinearAttentionLayer, *sizes):
        super().__init__(like.number_of_states)

    def append(self, prefilled: LinearAttentionLayer, sources: Tensor) -> None:
        _append_states(self, prefilled, sources)

    def keep(self, order: Tensor) -> None:
        self.reorder_cache(order)

    def move(self, live: slice) -> None:
        """Nothing: states have no columns."""


def _append_states(layer: LinearAttentionLayer, prefilled: LinearAttentionLayer, sources: Tensor) -> None:
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        for index, new in getattr(prefilled, name).items():
            if new is not None:
                states[index] = new[sources] if states[index] is None else torch.cat([states[index], new[sources]])
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
        setattr(layer, name, dict(getattr(prefilled, name)))
    layer.conv_kernel_size = dict(prefilled.conv_kernel_size)
    layer.device, layer.dtype = prefilled.device, prefilled.dtype


class _HybridRows(_AttentionRows, LinearAttentionAndFullAttentionLayer):
    """A layer with both (Falcon-H1)."""

    def __init__(self, like: LinearAttentionAndFullAttentionLayer, span: _Span, rows: int, columns: int):
        _AttentionRows.__init__(self, like, span, rows, columns)
        LinearAttentionLayer.__init__(self, like.number_of_states)

    def append(self, prefilled: LinearAttentionAndFullAttentionLayer, sources: Tensor) -> None:
        _AttentionRows.append(self, prefilled, sources)
        _append_states(self, prefilled, sources)

    def keep(self, order: Tensor) -> None:
        _AttentionRows.keep(self, order)
        LinearAttentionLayer.reorder_cache(self, order)


_LAYERS = {
    DynamicLayer: _AttentionRows,
    DynamicSlidingWindowLayer: _AttentionRows,
    LinearAttentionLayer: _StateRows,
    LinearAttentionAndFullAttentionLayer: _HybridRows,
}


def can_move_rows(config: PretrainedConfig) -> bool:
    """Whether a model of this config keeps nothing but what `MovingRows` can take apart by row."""
    return _has_only(config, set(_LAYERS))


def can_stand_still(model: PreTrainedModel) -> bool:
    """Whether a model decodes with `StillRows`: all layers attend, and none takes its cache to end at the new token.

    transformers says the second of a class: GPT-Neo, for one, reads its own mask at the cache's last columns.
    """
    return model._can_compile_fullgraph and _has_only(model.config, {DynamicLayer, DynamicSlidingWindowLayer})


def _has_only(config: PretrainedConfig, kinds: set[type]) -> bool:
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in kinds for layer in layers)


class MovingRows:
    """The cache of the rows that decode at the moment.

    Args:
        rows: most rows at a time.
        prompt_columns: the longest prompt's length.
        columns: most columns; more than prompt and response of any row together. Where rows are taken in as others go,
            each spare one, up to `BLOCK`, puts a move off by a token.
        whole: attention may be shown columns that are not written yet: see `can_stand_still`.
    """

    layers = _LAYERS

    def __init__(self, rows: int, prompt_columns: int, columns: int, whole: bool):
        self.cache = Cache(layers=[])
        self._sizes = (rows, columns)
        self._prompt_columns = prompt_columns
        self._starts: Tensor  # [rows] int64, each row's first column
        self.span = _Span(columns=self._columns(prompt_columns), whole=whole, end=prompt_columns)

    def _columns(self, end: int) -> int:
        """How many there are after a move to `end`."""
        return min(end + BLOCK, self._sizes[1])

    def append(self, prefilled: DynamicCache, lengths: Tensor, sources: Tensor) -> None:
        """Take in rows `sources` of a prefill, each as often as it is named.

        Args:
            prefilled: the cache of prompts that were padded on the left.
            lengths: `[rows of the prefill]` real tokens of each.
            sources: `[new rows]` int64, on the cache's device.
        """
        span = self.span
        if not self.cache.layers:
            self.cache.layers += [self.layers[type(layer)](layer, span, *self._sizes) for layer in prefilled.layers]
            self._starts = lengths[:0]
        elif span.rows == 0:
            self._move()
        for layer, new in zip(self.cache.layers, prefilled.layers, strict=True):
            layer.append(new, sources)
        self._starts = torch.cat([self._starts, span.end - lengths[sources]])
        self._live(span.rows + len(sources))

    def keep(self, order: Tensor) -> None:
        """Go on with rows `order` alone (int64, on the cache's device), in this order; each that moves is copied."""
        for layer in self.cache.layers:
            layer.keep(order)
        self._starts = self._starts[order]
        self._live(len(order))

    def _live(self, rows: int) -> None:
        self.span.rows = rows
        self.span.start = int(self._starts.min()) if rows else self.span.end

    def _move(self) -> None:
        """Bring the live columns to the front, with room behind them; and a prompt of any length fits before `end`."""
        live = slice(self.span.start, self.span.end)
        self.span.end = max(live.stop - live.start, self._prompt_columns)
        self.span.columns = self._columns(self.span.end)
        for layer in self.cache.layers:
            layer.move(live)
        self._starts -= live.stop - self.span.end
        self._live(self.span.rows)

    def next_mask(self) -> Tensor:
        """`[rows, columns]` bool, True on real tokens, the next one included; from start to end where not `whole`."""
        first, last = (0, self.span.columns) if self.span.whole else (self.span.start, self.span.end + 1)
        places = torch.arange(first, last, device=self._starts.device)
        return (places >= self._starts[:, None]) & (places <= self.span.end)

    def advance(self) -> None:
        """The token of this column has been written in every layer."""
        self.span.end += 1
        if self.span.end == self.span.columns:
            self._move()


class StillRows(MovingRows):
    """The same with all slots and all columns in every step, whose shapes then never change: for `torch.compile`.

    A free slot decodes a token that nobody reads and sees itself alone.
    """

    layers = dict.fromkeys((DynamicLayer, DynamicSlidingWindowLayer), _StillRows)

    def _columns(self, end: int) -> int:
        return self._sizes[1]

    def next_mask(self) -> Tensor:
        """`[slots, columns]` bool."""
        self.span.column.fill_(self.span.end)
        free = (0, 0, 0, self._sizes[0] - len(self._starts))
        mask = torch.nn.functional.pad(super().next_mask(), free)
        mask[len(self._starts) :, self.span.end] = True
        return mask


class FixedRows:
    """The same for a model whose cache can't be taken apart: the rows of one prefill, which come and go together."""

    def append(self, prefilled: DynamicCache, lengths: Tensor, sources: Tensor) -> None:
        assert torch.equal(sources, torch.arange(len(lengths), device=sources.device))
        self.cache, self._lengths = prefilled, lengths
        self._columns = int(lengths.max()) + 1

    def keep(self, order: Tensor) -> None:
        assert len(order) == 0
        del self.cache

    def next_mask(self) -> Tensor:
        columns = torch.arange(self._columns, device=self._lengths.device)
        return columns >= (self._columns - 1 - self._lengths)[:, None]

    def advance(self) -> None:
        self._columns += 1
        self._lengths = self._lengths + 1
