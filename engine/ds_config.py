"""DeepSpeed's JSON: read, checked (`ds_checks.py`) and completed before any model loads. Imports no deepspeed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from engine.config import Recipe, locate
from engine.ds_checks import OFFLOADS, check_ds_config, check_frozen, has_cuda, machine_problems, offloads, to_nvme
from engine.errors import RecipeError

# Buckets are allocated whole however little trains (DeepSpeed's default is 5e8 elements, 2 GB in float32), so "auto"
# follows the trained elements, up to 200 MB in float32: a full model still overlaps reduction and backward. On a CPU up
# to 32 MB: a larger piece is new memory each time, whose pages cost more to get than to fill.
LARGEST_AUTO_BUCKET = {"cuda": 50_000_000, "cpu": 8_000_000}
DEFAULT_SUB_GROUP = 1_000_000_000
# Elements up to which a parameter stays whole on every rank whatever else is: norms and biases, but no matrix.
SMALL_PARAMETER = 10_000


def read_ds_config(path: str | Path, frozen: bool = False) -> dict:
    """The checked, not yet resolved content of a DeepSpeed JSON file.

    Args:
        frozen: it is for models that never train.

    Raises:
        RecipeError: all that is wrong with the file, each problem with its key.
    """
    key = "zero.frozen_ds_config" if frozen else "zero.ds_config"
    file = locate(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise RecipeError(
            f"{key}: can't read {path} ({error.strerror}); name a JSON file, such as ds_configs/zero3.json"
        ) from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; mend this line") from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a DeepSpeed configuration is a JSON object, got {type(raw).__name__}")
    problems = check_ds_config(raw) + (check_frozen(raw) if frozen else [])
    if problems:
        raise RecipeError(*(f"{path}: {problem}" for problem in problems))
    return raw


def resolve_ds_config(
    raw: dict,
    *,
    dtype: str,
    world_size: int,
    micro_batch: int,
    trainable_parameters: int,
    largest_adapter: int = 0,
    prefetch_elements: int = 50_000_000,
    on_cuda: bool | None = None,
    local_ranks: int | None = None,
    nvme_path: str = "runs/nvme",
) -> dict:
    """`raw` with every "auto" and every omission that matters here filled in.

    Args:
        raw: a DeepSpeed configuration as read; left as it is.
        dtype: the recipe's model.dtype: float32, bfloat16 or float16.
        world_size: ranks.
        micro_batch: most sequences of one forward of one rank. DeepSpeed reports with it, no result depends on it.
        trainable_parameters: elements that train, over all roles and ranks.
        largest_adapter: elements of the largest matrix of an adapter; 0: there is none.
        prefetch_elements: how much ZeRO-3 fetches ahead.
        on_cuda: whether the job's devices are CUDA's; None: whether this machine has one.
        local_ranks: of one host; None: all are on one.
        nvme_path: the recipe's zero.nvme_path.

    Raises:
        RecipeError: everything in `raw` that contradicts these.
    """
    problems = check_ds_config(raw)
    config, on_cuda = copy.deepcopy(raw), has_cuda() if on_cuda is None else on_cuda
    exact = {
        "train_micro_batch_size_per_gpu": (micro_batch, "ppo.micro_batch_sequences"),
        "train_batch_size": (micro_batch * world_size, "ppo.micro_batch_sequences * ranks"),
        "gradient_accumulation_steps": (1, "1"),
    }
    for key, (value, source) in exact.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            problems.append(f'{key} must be {value} = {source}, got {given!r}; write "auto"')
        config[key] = value
    # Always written: DeepSpeed clips at 1.0 where it is missing. The engine clips each role by its own norm.
    config["gradient_clipping"] = 0.0
    problems += _resolve_dtype(config, dtype)
    if isinstance(config.setdefault("zero_optimization", {}), dict):
        config = with_second_shards(config, world_size, local_ranks or world_size)
        zero = config["zero_optimization"]
        problems += machine_problems(config, on_cuda)
        problems += _resolve_zero(config, trainable_parameters, largest_adapter, prefetch_elements, on_cuda)
        problems += _second_shards(zero, world_size)
        if to_nvme(zero) and zero["offload_optimizer"].get("nvme_path") == "auto":
            zero["offload_optimizer"]["nvme_path"] = nvme_path
    return _without_autos(config, problems)


def resolve_frozen_ds_config(
    raw: dict, *, dtype: str, offload_param: str, prefetch_elements: int = 50_000_000, on_cuda: bool | None = None
) -> dict:
    """The configuration of a model that never trains, every "auto" filled in.

    Args:
        raw: as `read_ds_config(path, frozen=True)` gave it; left as it is.
        dtype: the recipe's model.dtype.
        offload_param: the recipe's, of this model: none or cpu.
        prefetch_elements: how much ZeRO-3 fetches ahead.
        on_cuda: as for `resolve_ds_config`.

    Raises:
        RecipeError: everything in `raw` that contradicts these.
    """
    raw, on_cuda = copy.deepcopy(raw), has_cuda() if on_cuda is None else on_cuda
    problems = check_frozen(raw)
    if isinstance(raw.get("zero_optimization"), dict):
        section = raw["zero_optimization"].pop("offload_param", None) or {"pin_memory": "auto"}
        if offload_param != "none":
            raw["zero_optimization"]["offload_param"] = section | {"device": offload_param}
    sizes = {"micro_batch": 1, "world_size": 1, "trainable_parameters": 0}
    config = resolve_ds_config(raw, dtype=dtype, prefetch_elements=prefetch_elements, on_cuda=on_cuda, **sizes)
    del config["train_batch_size"]  # of a world of one, and DeepSpeed knows how many there are
    return _without_autos(config, problems)


def frozen_ds_config(recipe: Recipe, offload_param: str, **known) -> dict:
    """What one of a recipe's frozen models runs with; `known` as for `resolve_frozen_ds_config`."""
    raw = read_ds_config(recipe.zero.frozen_ds_config, frozen=True)
    return resolve_frozen_ds_config(raw, dtype=recipe.model.dtype, offload_param=offload_param, **known)


def _without_autos(config: dict, problems: list[str]) -> dict:
    left = _autos(config)
    if left:
        problems.append(f'no value is known for "auto" at {", ".join(left)}; write a number or leave the key out')
    if problems:
        raise RecipeError(*(f"ds_config: {problem}" for problem in dict.fromkeys(problems)))
    return config


def _resolve_dtype(config: dict, dtype: str) -> list[str]:
    problems = []
    for name, wanted in (
        ("bfloat16" if "bfloat16" in config else "bf16", dtype == "bfloat16"),
        ("fp16", dtype == "float16"),
    ):
        section = config.setdefault(name, {})
        if not isinstance(section, dict):
            problems.append(f'{name} must be an object, got {section!r}; write {{"enabled": "auto"}}')
            continue
        given = section.get("enabled", "auto")
        if given not in ("auto", wanted):
            problems.append(
                f'{name}.enabled must be {str(wanted).lower()} = model.dtype {dtype}, got {given!r}; write "auto"'
            )
        section["enabled"] = wanted
    return problems


def _resolve_zero(
    config: dict, trainable_parameters: int, largest_adapter: int, prefetch: int, on_cuda: bool
) -> list[str]:
    zero = config["zero_optimization"]
    stage = zero.setdefault("stage", 0)
    bucket = max(1, min(trainable_parameters, LARGEST_AUTO_BUCKET["cuda" if on_cuda else "cpu"]))
    # DeepSpeed insists that the second is even.
    for key, size in (("reduce_bucket_size", bucket), ("allgather_bucket_size", bucket + bucket % 2)):
        if zero.get(key, "auto") == "auto":
            zero[key] = size
    # These walk over frozen weights too, and are limits, not allocations.
    # An adapter that is whole on every rank isn't gathered in each forward, and its layer can be fused (fused_lora).
    whole = max(SMALL_PARAMETER, largest_adapter)
    for key, value in (
        ("prefetch_bucket_size", prefetch),
        ("param_persistence_threshold", whole),
    ):
        for name in (key, f"stage3_{key}"):
            if zero.get(name) == "auto":
                zero[name] = value
    problems = []
    if stage == 3:
        given = zero.get("sub_group_size", "auto")
        if given != "auto" and not (isinstance(given, int | float) and given >= trainable_parameters):
            problems.append(
                f"zero_optimization.sub_group_size must hold all {trainable_parameters} trained elements, got "
                f'{given!r}: a role cut in two would be clipped by half its norm; write "auto"'
            )
        zero["sub_group_size"] = max(DEFAULT_SUB_GROUP, trainable_parameters) if given == "auto" else given
    for key in OFFLOADS:
        if isinstance(zero.get(key), dict) and zero[key].get("pin_memory") == "auto":
            zero[key]["pin_memory"] = on_cuda
    if offloads(zero, "offload_optimizer"):
        # DeepSpeed otherwise insists on making the optimizer itself, with one learning rate for all roles.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return problems


def with_second_shards(raw: dict, world_size: int, local_ranks: int) -> dict:
    """`raw` with hpZ's "auto" filled in, which counts from the moment that a model is loaded in shards.

    hpZ keeps a second set of shards among the ranks of a host: on a single one it has nothing to spare.
    """
    zero = raw.get("zero_optimization", {})
    if zero.get("zero_hpz_partition_size") != "auto":
        return raw
    size = local_ranks if world_size > local_ranks else 1
    return raw | {"zero_optimization": zero | {"zero_hpz_partition_size": size}}


def _second_shards(zero: dict, world_size: int) -> list[str]:
    size = zero.get("zero_hpz_partition_size", 1)
    if not isinstance(size, int) or size < 1 or world_size % size == 0:
        return []
    return [
        f"zero_optimization.zero_hpz_partition_size must divide the {world_size} ranks, got {size}; start as many "
        "ranks on every host, or set it to 1"
    ]


def _autos(value, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, below in value.items() for found in _autos(below, f"{path}.{key}".lstrip("."))]
    # This one is a real value of DeepSpeed's, not a blank to fill.
    return [path] if value == "auto" and path != "data_types.keep_in_fp32_modules" else []


def _unique_keys(pairs: list[tuple]) -> dict:
    twice = {key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} given twice; keep one")
    return dict(pairs)
