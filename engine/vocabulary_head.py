"""Log-probs, entropy and full KL of N tokens from the hidden states before them, a chunk of tokens at a time.

`[B, T, V]` logits are the largest tensor of RLHF: 4 GB in float32 for 8 x 1000 tokens of a vocabulary of 128k, and an
autograd graph keeps several. Here at most three `[chunk, V]` float32 buffers live at once, in training too (a family
that caps its logits keeps one more). Each token's outputs depend on its own hidden state alone, which gives two ways:

- A frozen head (LoRA, the normal case) finds the gradient of each output with respect to its hidden state, `[N, H]`, in
  the forward already. The backward multiplies by it and needs neither logits nor weights: ZeRO-3 fetches none again.
- A head that trains computes its logits again in the backward.

With p = softmax(z / T): d log p(chosen) / dz = (onehot - p) / T, d entropy / dz = -p (log p + entropy) / T, and
d KL(p||q) / dz = p (log p - log q - KL) / T.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from transformers import PreTrainedModel

from engine import causal, onednn

LOGITS_BYTES = 64 * 2**20
"""Size of a chunk's float32 logits."""

Logits = Callable[[Tensor], Tensor]
"""`[n, H]` hidden states -> `[n, V]` logits in the model's own type."""


@dataclass(frozen=True)
class Asked:
    """What is wanted of N tokens beside their log-probs, and by which logits."""

    ids: Tensor  # [N] the tokens
    logits: Logits
    entropy: bool = False
    entropy_grad: bool = False  # whether a gradient flows through it; with `entropy` alone
    full_kl: bool = False  # to the reference, over the whole vocabulary
    ref_hidden: Tensor | None = None  # [N, H] of the reference; None: not asked for. No gradient flows there
    ref_logits: Logits | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values that are measured."""
        extra = {"entropy": self.entropy, "ref_logprobs": self.ref_hidden is not None, "full_kl": self.full_kl}
        return ("logprobs", *(name for name, wanted in extra.items() if wanted))

    @property
    def learning(self) -> set[str]:
        """Names of the values that gradients flow through."""
        return {"logprobs", "full_kl", "entropy"} if self.entropy_grad else {"logprobs", "full_kl"}

    def part(self, where: slice) -> Asked:
        """The same of some of the tokens."""
        ref_hidden = None if self.ref_hidden is None else self.ref_hidden[where]
        return replace(self, ids=self.ids[where], ref_hidden=ref_hidden)


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens are measured at once."""
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def buffer_bytes(
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    temperature: float,
    *,
    learning: bool,
    entropy: bool,
    full_kl: bool,
    referred: bool,
) -> int:
    """The most that the `[n, V]` buffers of a chunk of so many tokens take at once, in a head that doesn't train.

    Args:
        learning: gradients flow.
        referred: the reference's log-probs are measured beside the policy's.
    """
    own, wide = dtype.itemsize, 4
    scaled = own + wide * (own < wide) + wide * (temperature != 1)
    most = max(scaled, 2 * wide)  # before, and behind the softmax
    if referred or full_kl:
        most += wide
    held = wide * (1 + entropy + full_kl)
    if full_kl:
        most = max(most, held + 1)  # where p is 0
    if learning:
        most = max(most, held + own * (own < wide))
    return min(tokens, chunk_tokens(vocabulary)) * vocabulary * most


class VocabularyHead(nn.Module):
    """All that a causal model does after its backbone (head, bias, scaling, capping), on hidden states that are given.

    It is a copy of the model whose backbone hands on what it gets, and holds the model's own parameters under names of
    its own: ZeRO-3 fetches them once for all chunks of a forward. The model is left as it is.

    Args:
        model: with its adapters injected, before DeepSpeed takes it: the copy then has no hook.
        temperature: of the softmax.
    """

    def __init__(self, model: PreTrainedModel, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.vocabulary = model.get_output_embeddings().out_features
        shared = {id(p): p for p in model.parameters()}
        backbone = causal.backbone(model)
        # Set past nn.Module, which would list the copy as a child: then DeepSpeed would hang its hooks into it.
        self.__dict__["copy"] = copy.deepcopy(model, shared | {id(backbone): _HandsOn(backbone)})
        onednn.take_over(self.copy)
        for name, part in self.copy.named_modules():
            if not isinstance(part, _HandsOn):
                # The same dictionary: wherever DeepSpeed moves the buffers, the copy finds them.
                part._buffers = model.get_submodule(name)._buffers
        for name, parameter in self.copy.named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, V]` as the model gives them for hidden states `[n, H]`; its weights must be at hand."""
        return _logits(self.copy, hidden)

    def whole_copy(self) -> Logits:
        """The same from frozen weights of its own: they must be at hand now, and then always are."""
        own = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.parameters()}
        return partial(_logits, copy.deepcopy(self.copy, own))

    def measure(self, hidden: Tensor, asked: Asked) -> dict[str, Tensor]:
        """`[N]` float32 each: `logprobs`, and what is asked for of `entropy`, `full_kl` and `ref_logprobs`.

        Args:
            hidden: `[N, H]`, from one position before each token.
        """
        learning = torch.is_grad_enabled()
        trains = learning and any(p.requires_grad for p in self.parameters())
        # Outputs with a graph would make ZeRO-3 fetch the weights in the backward: a frozen head gives none.
        with torch.set_grad_enabled(trains):
            values, slopes = self(hidden, asked=asked, with_slopes=learning and hidden.requires_grad and not trains)
        return values | {name: _Sloped.apply(hidden, values[name], slope) for name, slope in slopes.items()}

    def forward(self, hidden: Tensor, *, asked: Asked, with_slopes: bool) -> tuple[dict[str, Tensor], ...]:
        """Values by name, `[N]` each; `with_slopes` their gradients with respect to `hidden` too, `[N, H]` each."""
        if torch.is_grad_enabled():
            trained = [p for p in self.parameters() if p.requires_grad]
            return dict(zip(asked.names, _Trained.apply(self, asked, hidden, *trained), strict=True)), {}
        found = [self._chunk(hidden, asked, where, with_slopes) for where in self.chunks(len(hidden))]
        values, slopes = zip(*found, strict=True)
        return _joined(values), _joined(slopes)

    def chunks(self, tokens: int) -> list[slice]:
        """Where the chunks of so many tokens lie: at least one."""
        size = chunk_tokens(self.vocabulary)
        return [slice(start, start + size) for start in range(0, max(1, tokens), size)]

    def _chunk(self, hidden: Tensor, asked: Asked, where: slice, with_slopes: bool) -> tuple[dict[str, Tensor], ...]:
        chunk = _Chunk(hidden[where], asked.part(where), self.temperature, graph=with_slopes)
        return chunk.values, chunk.slopes() if with_slopes else {}

    def _save_to_state_dict(self, *ignored) -> None:
        """Nothing: the parameters are the model's, which saves them under their own names."""

    def _load_from_state_dict(self, *ignored) -> None:
        """Nothing to load."""


class _HandsOn(nn.Module):
    """Stands where the backbone was: it hands on what it is given. Plain attributes are read from the backbone.

    So do the backbone's parts: OPT's model calls its backbone's decoder, for one.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.__dict__["backbone"] = backbone  # no child

    def __getattr__(self, name: str):
        found = getattr(self.backbone, name)
        return self if isinstance(found, nn.Module) else found

    def __deepcopy__(self, memo: dict) -> _HandsOn:
        return self

    def forward(self, *ignored, inputs_embeds: Tensor, **also_ignored) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """A backbone's output in which all but the hidden states is None, whatever it is called."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice):
        return (self.last_hidden_state,)[index]


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    # Not [0]: its backward would copy the gradient into a buffer of zeros.
    return model(inputs_embeds=hidden[None], use_cache=False).logits.squeeze(0)


class _Chunk:
    """The distributions of some tokens, measured.

    A `[n, V]` buffer is overwritten as soon as it has served: each method works once.
    """

    def __init__(self, hidden: Tensor, asked: Asked, temperature: float, graph: bool):
        self.asked, self.temperature = asked, temperature
        self.hidden = hidden.detach().requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            logits = asked.logits(self.hidden)
        self.dtype = logits.dtype
        self.edge = get_gradient_edge(logits) if graph else None  # the way into the graph, without the logits
        logits = _scaled(logits, temperature)
        logp = logits.log_softmax(-1)
        del logits
        self.values = {"logprobs": _chosen(logp, asked.ids)}
        difference = None
        if asked.ref_hidden is not None:
            logits = _scaled(asked.ref_logits(asked.ref_hidden), temperature)
            logq = logits.log_softmax(-1)
            del logits
            self.values["ref_logprobs"] = _chosen(logq, asked.ids)
            difference = torch.sub(logp, logq, out=logq) if asked.full_kl else None
            del logq
        if graph or asked.full_kl or asked.entropy:
            self._sum_up(logp, difference)

    def _sum_up(self, logp: Tensor, difference: Tensor | None) -> None:
        """Sums over the vocabulary; a token of probability 0 adds nothing."""
        asked = self.asked
        self.p = logp.exp() if asked.entropy else logp.exp_()
        if asked.full_kl:
            self.p_difference = difference.masked_fill_(self.p == 0, 0).mul_(self.p)
            self.values["full_kl"] = self.p_difference.sum(-1)
        if asked.entropy:
            # -inf would make 0 * -inf; nan stays nan.
            self.p_logp = logp.clamp_(min=torch.finfo(logp.dtype).min).mul_(self.p)
            self.values["entropy"] = -self.p_logp.sum(-1)

    def slopes(self) -> dict[str, Tensor]:
        """`[n, H]` each: the gradient of a token's values with respect to its hidden state."""
        found = {}
        for name, slope in self._slopes_of_logits():
            (to_hidden,) = torch.autograd.grad(self.edge, self.hidden, slope.to(self.dtype), retain_graph=True)
            found[name] = to_hidden / self.temperature
        return found

    def backward(self, upstream: dict[str, Tensor], parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """Gradients with respect to the hidden states and to parameters, of the values weighed by `upstream` `[n]`."""
        total = None
        for name, slope in self._slopes_of_logits():
            slope.mul_(upstream[name][:, None] / self.temperature)
            total = slope if total is None else total.add_(slope)
        return torch.autograd.grad(self.edge, (self.hidden, *parameters), total.to(self.dtype), allow_unused=True)

    def _slopes_of_logits(self) -> Iterator[tuple[str, Tensor]]:
        """`[n, V]` d value / d (logits / temperature), one value after the other; the caller may overwrite it."""
        p, values = self.p, self.values
        if self.asked.full_kl:
            yield "full_kl", self.p_difference.addcmul_(p, values["full_kl"][:, None], value=-1)
        if self.asked.entropy_grad:
            yield "entropy", self.p_logp.addcmul_(p, values["entropy"][:, None]).neg_()
        yield "logprobs", p.neg_().scatter_add_(1, self.asked.ids[:, None], torch.ones_like(p[:, :1]))


class _Sloped(Function):
    """Values `[N]` whose gradient with respect to hidden states `[N, H]` is known: each token's to its own."""

    @staticmethod
    def forward(ctx, hidden: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (upstream[:, None] * slope).to(slope.dtype), None, None


class _Trained(Function):
    """The values of a head whose weights learn: the logits are computed again in the backward, chunk by chunk.

    Nothing here communicates: ranks have different numbers of tokens. The head's own hooks fetch its weights.
    """

    @staticmethod
    def forward(ctx, head: VocabularyHead, asked: Asked, hidden: Tensor, *parameters: nn.Parameter):
        ctx.head, ctx.asked, ctx.parameters = head, asked, parameters
        ctx.save_for_backward(hidden)
        values, _ = head.forward(hidden, asked=asked, with_slopes=False)  # without a graph in here
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in asked.learning))
        return tuple(values[name] for name in asked.names)

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        (hidden,), head = ctx.saved_tensors, ctx.head
        asked = replace(ctx.asked, entropy=ctx.asked.entropy_grad)
        to_hidden, to_parameters = [], [torch.zeros_like(p) for p in ctx.parameters]
        for where in head.chunks(len(hidden)):
            weights = {name: values[where] for name, values in zip(ctx.asked.names, upstream, strict=True)}
            chunk = _Chunk(hidden[where], asked.part(where), head.temperature, graph=True)
            of_hidden, *found = chunk.backward(weights, ctx.parameters)
            del chunk
            to_hidden.append(of_hidden)
            for total, gradient in zip(to_parameters, found, strict=True):
                if gradient is not None:
                    total += gradient
        return None, None, torch.cat(to_hidden), *to_parameters


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """In at least float32, without a graph, divided by the temperature."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


def _chosen(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(1, ids[:, None]).squeeze(1)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
