"""Models that load straight into ZeRO-3 shards, and errors of loading that all ranks raise together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from engine import dist
from engine.errors import RecipeError


@contextmanager
def sharded_loading(ds_config: dict | None, dtype: torch.dtype) -> Iterator[None]:
    """Inside, transformers models load straight into ZeRO-3 shards: no rank ever holds one whole (a collective).

    Rank 0 reads the files tensor by tensor and sends each rank its part. Quantized models load whole: bitsandbytes
    can't quantize a shard. Below stage 3 nothing changes.

    Args:
        ds_config: as read or as resolved; its stage and offload_param count here.

    Raises:
        RecipeError: the model can't be loaded; what one rank alone notices, such as a tensor of the wrong size, is
            raised on every rank.
    """
    zero = (ds_config or {}).get("zero_optimization", {})
    with refused_together():
        if zero.get("stage", 0) != 3:
            yield
            return
        # transformers keeps a weak reference that changes every model it builds; a later one must not come out sharded.
        state = HfDeepSpeedConfig(_loading_config(zero, dtype))
        try:
            yield
        finally:
            del state


@contextmanager
def refused_together() -> Iterator[None]:
    """A RecipeError of any rank inside is raised on every rank at the end: the others would wait for it for ever."""
    problems: tuple[str, ...] = ()
    try:
        yield
    except RecipeError as error:
        problems = error.problems
    found = [problem for rank_problems in dist.all_gather_objects(problems) for problem in rank_problems]
    if found:
        raise RecipeError(*dict.fromkeys(found))


def _loading_config(zero: dict, dtype: torch.dtype) -> dict:
    """What decides how a parameter is cut and where its shards lie, before anything else is known."""
    # What is "auto" still is resolved for the engine later, and none of it cuts a parameter.
    kept = {key: value for key, value in zero.items() if value != "auto"}
    if isinstance(kept.get("offload_param"), dict) and kept["offload_param"].get("pin_memory") == "auto":
        kept["offload_param"] = {**kept["offload_param"], "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": kept,
    }
