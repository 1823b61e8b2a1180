"""DeepSpeed's JSON: read, checked and completed before any model loads. Imports no deepspeed.

DeepSpeed accepts a misspelt top-level key silently and goes on with its default; here it is an error.
"""

from __future__ import annotations

import copy
import json
from difflib import get_close_matches
from pathlib import Path

from engine.config import locate
from engine.errors import RecipeError

# What DeepSpeed 0.19.8 reads at the top level (a test asks the installed one).
_TOP_LEVEL = """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
TOP_LEVEL_KEYS = frozenset(_TOP_LEVEL.split())

# What it reads under zero_optimization; it refuses others itself, but after the model is built.
_ZERO = """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
    cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear model_persistence_threshold
    module_granularity_threshold offload_optimizer offload_param overlap_comm override_module_apply
    param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size
    reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
    stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
    sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
    zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
"""
ZERO_KEYS = frozenset(_ZERO.split())

# Sections that the recipe or the engine owns: a second owner would win or lose silently.
OWNED_KEYS = {
    "optimizer": "set actor.optimizer and critic.optimizer in the recipe",
    "scheduler": "set actor.optimizer.schedule and critic.optimizer.schedule in the recipe",
    "sequence_parallel_size": "remove it: Alternator doesn't split sequences over ranks",
    "data_parallel_size": "remove it: every rank is a data-parallel one",
    "tensor_parallel": "remove it: ZeRO is what shards the model here",
    "expert_parallel": "remove it: ZeRO is what shards the model here",
    "activation_checkpointing": "set zero.activation_checkpointing in the recipe",
    "prescale_gradients": "remove it: losses are scaled for DeepSpeed's plain average over ranks",
    "gradient_predivide_factor": "remove it: losses are scaled for DeepSpeed's plain average over ranks",
    "flops_profiler": "remove it: it crashes where a minibatch is cut by hand; the metrics have seconds",
    "wall_clock_breakdown": "remove it: it crashes where a minibatch is cut by hand; the metrics have seconds",
}

# Buckets are allocated whole however little trains (DeepSpeed's default is 5e8 elements, 2 GB in float32), so "auto"
# follows the trained elements, up to 200 MB in float32: a full model still overlaps reduction and backward. On a CPU up
# to 32 MB: a larger piece is new memory each time, whose pages cost more to get than to fill.
LARGEST_AUTO_BUCKET = {"cuda": 50_000_000, "cpu": 8_000_000}
DEFAULT_SUB_GROUP = 1_000_000_000
# Elements up to which a parameter stays whole on every rank whatever else is: norms and biases, but no matrix.
SMALL_PARAMETER = 10_000


def read_ds_config(path: str | Path) -> dict:
    """The checked, not yet resolved content of a DeepSpeed JSON file.

    Raises:
        RecipeError: all that is wrong with the file, each problem with its key.
    """
    file = locate(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise RecipeError(
            f"zero.ds_config: can't read {path} ({error.strerror}); name a JSON file, such as ds_configs/zero3.json"
        ) from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; mend this line") from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a DeepSpeed configuration is a JSON object, got {type(raw).__name__}")
    problems = check_ds_config(raw)
    if problems:
        raise RecipeError(*(f"{path}: {problem}" for problem in problems))
    return raw


def check_ds_config(raw: dict) -> list[str]:
    """What is wrong with a DeepSpeed configuration, whatever the model and the number of ranks."""
    problems = _unknown(raw, TOP_LEVEL_KEYS, "")
    problems += [f"{key} is not for the ds_config; {remedy}" for key, remedy in OWNED_KEYS.items() if key in raw]
    if raw.get("gradient_clipping", "auto") not in ("auto", 0):
        problems.append(
            f"gradient_clipping must be 0 or absent, got {raw['gradient_clipping']!r}: one common norm would let the "
            "critic throttle the actor; set actor.optimizer.gradient_clipping and critic.optimizer.gradient_clipping"
        )
    if raw.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
        problems.append(
            f"gradient_accumulation_steps must be 1, got {raw['gradient_accumulation_steps']!r}: the trainer cuts a "
            "minibatch itself; set ppo.micro_batch_sequences"
        )
    if raw.get("gradient_allreduce_op", "mean") != "mean":
        problems.append(
            f"gradient_allreduce_op must be mean, got {raw['gradient_allreduce_op']!r}: losses are scaled for the "
            "average over ranks; remove it"
        )
    for key in ("torch_autocast", "hybrid_engine"):
        if _enabled(raw, key):
            problems.append(
                f"{key}.enabled must be false, got true; remove it (the recipe's model.dtype sets the type)"
            )
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*problems, f"zero_optimization must be an object, got {zero!r}; write {{'stage': 3}}"]
    problems += _unknown(zero, ZERO_KEYS, "zero_optimization.")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            problems.append(f"zero_optimization.{key}.device nvme is not supported yet; write cpu or none")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}; see ds_configs/README.md")
    elif _offloads(zero, "offload_param") and stage != 3:
        problems.append(f"zero_optimization.offload_param needs stage 3, got {stage}; remove it or raise the stage")
    elif _offloads(zero, "offload_optimizer") and stage == 0:
        problems.append("zero_optimization.offload_optimizer needs stage 1 to 3, got 0; remove it or raise the stage")
    return problems


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

    Raises:
        RecipeError: everything in `raw` that contradicts these.
    """
    problems = check_ds_config(raw)
    config = copy.deepcopy(raw)
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
    if isinstance(config.get("zero_optimization", {}), dict):
        on_cuda = _has_cuda() if on_cuda is None else on_cuda
        problems += _resolve_zero(config, trainable_parameters, largest_adapter, prefetch_elements, on_cuda)
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
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    bucket = max(1, min(trainable_parameters, LARGEST_AUTO_BUCKET["cuda" if on_cuda else "cpu"]))
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") == "auto":
            zero[key] = bucket
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
    for key in ("offload_optimizer", "offload_param"):
        if _offloads(zero, key) and zero[key].get("pin_memory") == "auto":
            zero[key]["pin_memory"] = on_cuda
    if _offloads(zero, "offload_optimizer"):
        # DeepSpeed otherwise insists on making the optimizer itself, with one learning rate for all roles.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return problems


def _has_cuda() -> bool:
    import torch  # here: the rest of this module answers before torch is imported

    return torch.cuda.is_available()


def _unknown(section: dict, known: frozenset, prefix: str) -> list[str]:
    return [
        f"{prefix}{key}: unknown key; the nearest is {prefix}{get_close_matches(key, sorted(known), 1, 0)[0]}"
        for key in section
        if key not in known
    ]


def _enabled(raw: dict, key: str) -> bool:
    section = raw.get(key)
    return isinstance(section, dict) and section.get("enabled", False) is True


def _offloads(zero: dict, key: str) -> bool:
    section = zero.get(key)
    return isinstance(section, dict) and section.get("device", "none") not in ("none", None)


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
