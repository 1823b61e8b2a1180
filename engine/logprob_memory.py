"""How much memory log-probs and entropy take with their backward: the engine's way against the formula written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import causal, models
from engine.config import Recipe
from engine.roles import Layout, RolesModel


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that came into being and are still alive; `peak_bytes` is the most.

    Storages are counted, each once, so views cost nothing. Scratch space inside a kernel is not seen.

    Args:
        counts: which of the tensors.
    """

    def __init__(self, counts: Callable[[Tensor], bool] = lambda tensor: True):
        super().__init__()
        self.counts = counts
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for x in tree_leaves(result):
            # A view of what was there before is nothing new.
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given and self.counts(x):
                self.live[key] = (StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.live.values()))
        return result


def compare(recipe: Recipe, rows: int, prompt_tokens: int, response_tokens: int) -> dict[str, float]:
    """Peak bytes over the start of a forward and backward on one micro-batch, on an unsharded model.

    Both sides recompute the layers' activations in the backward, or these would hide what the head holds.
    """
    roles = RolesModel(models.load_causal(recipe.model), recipe)
    roles.checkpoint_activations()
    width = prompt_tokens + response_tokens
    ids = torch.arange(rows * width).reshape(rows, width) % roles.causal.config.vocab_size
    layout = Layout(ids, torch.ones_like(ids, dtype=torch.bool), torch.full((rows,), response_tokens))
    engine = peak_bytes(lambda: engine_outputs(roles, layout), roles)
    naive = peak_bytes(lambda: naive_outputs(roles, layout), roles)
    logits = 4 * rows * response_tokens * roles.causal.config.vocab_size
    return {"engine_bytes": engine, "naive_bytes": naive, "ratio": engine / naive, "float32_logits_bytes": logits}


def peak_bytes(outputs: Callable[[], tuple[Tensor, Tensor]], roles: RolesModel) -> int:
    """Most bytes that `outputs` and the backward of its sum hold at once, gradients included."""
    with LiveBytes() as counter:
        logprobs, entropy = outputs()
        (logprobs.sum() + entropy.sum()).backward()
    roles.zero_grad()
    return counter.peak_bytes


def engine_outputs(roles: RolesModel, layout: Layout) -> tuple[Tensor, Tensor]:
    """`[B, R]` log-probs and entropy as training gets them."""
    output = roles.outputs(layout, entropy=True, entropy_grad=True)
    return output.logprobs, output.entropy


def naive_outputs(roles: RolesModel, layout: Layout) -> tuple[Tensor, Tensor]:
    """The same from all logits at once: log p = log softmax(z / temperature), entropy = -sum_v p log p."""
    responses = int(layout.response_lengths.max())
    logits = causal.call(
        roles.causal, layout.sequences, layout.mask, use_cache=False, logits_to_keep=responses + 1
    ).logits
    logprobs = (logits[:, :-1].float() / roles.temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, layout.sequences[:, -responses:, None]).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)
