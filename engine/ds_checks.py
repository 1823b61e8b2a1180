"""What may stand in DeepSpeed's JSON here, and what is refused before any model loads. Imports nothing.

DeepSpeed accepts a misspelt top-level key silently and goes on with its default; here it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

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

# Of ZeRO++. DeepSpeed quantizes in a CUDA kernel alone, and says so with a traceback once the models are loaded.
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
OFFLOADS = ("offload_optimizer", "offload_param")
SIZES = ("_size", "_threshold", "_live_parameters", "_reuse_distance")
"""How keys end that take a number of elements."""


def stage_of(raw: dict) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return raw.get("zero_optimization", {}).get("stage", 0)


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
    return problems + _unknown(zero, ZERO_KEYS, "zero_optimization.") + list(_check_zero(zero))


def _check_zero(zero: dict) -> Iterator[str]:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}; see ds_configs/README.md"
        return
    for key in (key for key in zero if key.endswith(SIZES) and key != "zero_hpz_partition_size"):
        if zero[key] != "auto" and (type(zero[key]) not in (int, float) or zero[key] < 0):
            yield f'zero_optimization.{key} must be a number of elements, got {zero[key]!r}; write one, or "auto"'
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        section = f"zero_optimization.{key}"
        lowest = 3 if to_nvme(zero) else lowest
        if offloads(zero, key) and stage < lowest:
            wanted = "stage 3" if lowest == 3 else "stage 1 to 3"
            yield f"{section} needs {wanted}, got {stage}; remove it or raise the stage"
        if device_of(zero, key) not in ("none", "cpu", "nvme", "auto"):
            yield f"{section}.device must be none, cpu or nvme, got {device_of(zero, key)!r}; write one of them"
    if device_of(zero, "offload_param") == "nvme":
        yield (
            "zero_optimization.offload_param.device must be none or cpu, got 'nvme': the sampler takes weights out of "
            "DeepSpeed's buffers, which would be filled anew under it; write cpu (the optimizer can go to nvme)"
        )
    if to_nvme(zero) and not zero["offload_optimizer"].get("nvme_path"):
        yield (
            "zero_optimization.offload_optimizer.device nvme needs a folder on a local disk, got no nvme_path; write "
            '"nvme_path": "auto" for the recipe\'s zero.nvme_path'
        )
    size = zero.get("zero_hpz_partition_size", 1)
    asked = [key for key in QUANTIZED if zero.get(key)] + ["zero_hpz_partition_size"] * (size != 1)
    if asked and stage != 3:
        yield f"zero_optimization.{', '.join(asked)}: ZeRO++ needs stage 3, got {stage}; remove it or raise the stage"
    if size != "auto" and not (type(size) is int and size >= 1):
        yield f'zero_optimization.zero_hpz_partition_size must be the ranks of a host, got {size!r}; write "auto"'


def check_frozen(raw: dict) -> list[str]:
    """What can't be for a model without an optimizer, which lives in a ZeRO-3 engine of its own."""
    zero, problems = raw.get("zero_optimization", {}), []
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("stage", 0) != 3:
        problems.append(
            f"zero_optimization.stage must be 3 for frozen models, got {zero.get('stage', 0)!r}: DeepSpeed shards a "
            "model without an optimizer at no other stage; write 3"
        )
    if offloads(zero, "offload_optimizer"):
        problems.append("zero_optimization.offload_optimizer has nothing to offload in a frozen model; remove it")
    if offloads(zero, "offload_param") and device_of(zero, "offload_param") != "auto":
        problems.append(
            "zero_optimization.offload_param.device is each frozen model's own, got "
            f'{device_of(zero, "offload_param")!r}; write "auto", and offload_param beside the reward or the reference'
        )
    return problems


def machine_problems(raw: dict, on_cuda: bool | None = None) -> list[str]:
    """What a checked configuration asks for that the devices don't have.

    Args:
        on_cuda: whether they are CUDA's; None: whether this machine has one.
    """
    asked = [key for key in QUANTIZED if raw.get("zero_optimization", {}).get(key)]
    if not asked or (has_cuda() if on_cuda is None else on_cuda):
        return []
    return [
        f"zero_optimization.{key} needs a CUDA device, got none: DeepSpeed quantizes there alone; set it to false, or "
        "choose ds_configs/zero3.json"
        for key in asked
    ]


def has_cuda() -> bool:
    import torch  # here: the rest answers before torch is imported

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


def device_of(zero: dict, key: str) -> str:
    """Where a section of `OFFLOADS` keeps its tensors: none (the device), cpu or nvme."""
    section = zero.get(key)
    return (section.get("device") or "none") if isinstance(section, dict) else "none"


def offloads(zero: dict, key: str) -> bool:
    """Whether a section of `OFFLOADS` moves anything off the device."""
    return device_of(zero, key) != "none"


def to_nvme(zero: dict) -> bool:
    """Whether the optimizer's states go to a disk."""
    return device_of(zero, "offload_optimizer") == "nvme"
