"""Predicts the bytes of a rank by phase and part, before anything is launched.

What DeepSpeed 0.19.8 keeps of weights, gradients and optimizer at each stage is counted to the byte, alignment, padding
and buffers included; so are the sampler's copy, a full KV cache and the buffers of log-probs. What a micro-batch of the
longest sequences keeps for its backward is counted by `engine/activations.py`; of weights that ZeRO-3 gathers, the most
that there can be. Not counted: what a layer needs while it computes, and what the allocator can't use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from engine import activations, dist, loading_bytes, models, shapes, vocabulary_head
from engine.config import Recipe
from engine.device_memory import kv_cache_bytes
from engine.ds_checks import device_of, offloads, stage_of, to_nvme
from engine.ds_config import frozen_ds_config, read_ds_config, resolve_ds_config
from engine.kv_cache import BLOCK
from engine.loading_bytes import QUANTIZATION, WEIGHTS
from engine.shapes import Bytes, Home, Weight

logger = dist.get_logger(__name__)

MASTERS, MOMENTS, GRADIENTS, BUCKETS = "masters", "moments", "gradients", "buckets"
COPY, CACHE, LOGITS = "sampler's copy", "KV cache", "log-probs"
ACTIVATIONS, GATHERED = "activations", "gathered weights"
DEFAULT_LIMIT = 10**9
"""DeepSpeed's, in elements: how many are fetched ahead at most, and within how many weights that come again stay."""
SCALAR = 4
"""torch's AdamW counts the steps of each of its tensors in a float32, DeepSpeed's for offloaded ones in Python."""
SWAPPED_BYTES = 2**20
"""DeepSpeed leaves what is smaller in host memory, whatever the ds_config says of NVMe."""
ALIGNED = 256
"""Float32 numbers that it reads and writes at a time: 1 KiB."""


def phases(
    recipe: Recipe, raw: dict, ranks: int, on_cuda: bool, device_memory: int | None = None
) -> dict[str, dict[str, Bytes]]:
    """Bytes of a rank by phase and home.

    Args:
        raw: the recipe's DeepSpeed configuration, as read.
        ranks: that share the work and, from stage 1 on, the model.
        on_cuda: the devices are CUDA's.
        device_memory: bytes of one device, which the sampler's copy is made to fit as the engine does it; None: all of
            the copy is resident, unless the recipe has a budget.

    Raises:
        RecipeError: a model's config can't be read, or contradicts the recipe.
    """
    homes = shapes.homes(recipe)
    training = {home.name: state(home, recipe, raw, ranks, on_cuda) for home in homes}
    resting = {home.name: _resting(training[home.name], home, raw) for home in homes}
    loading = {
        home.name: loading_bytes.of_home(home, resting[home.name], cut=home.frozen_engine or stage_of(raw) == 3)
        for home in homes
    }
    shared, room = homes[0], _room_beside(resting, device_memory)
    decoding = _generation(shared, recipe, resolve(shared, recipe, raw, ranks, on_cuda), ranks, room)
    inference = dict(resting)
    for home in homes:
        known = (home, recipe, raw, ranks, on_cuda, room)
        inference[home.name] += Bytes(Counter({GATHERED: gathered_bytes(*known, backward=False)}))
        if not home.frozen_engine:
            training[home.name] += Bytes(Counter({GATHERED: gathered_bytes(*known, backward=True)}))
    for name, size in _activations(recipe, on_cuda).items():
        kept = Counter({ACTIVATIONS: size})
        training[name] += Bytes(host=kept) if recipe.zero.offload_activations else Bytes(kept)
    for held, learning in ((inference, False), (training, True)):
        held[shared.name] += Bytes(Counter({LOGITS: logits_bytes(recipe, shared, learning)}))
    return {
        "loading": loading_bytes.one_after_another(loading),
        "generation": resting | {shared.name: resting[shared.name] + decoding},
        "inference": inference,
        "training": training,
    }


def logits_bytes(recipe: Recipe, home: Home, learning: bool) -> int:
    """The most that logits and what is made of them take at once, of the largest micro-batch; in training or before."""
    full_kl = recipe.kl.estimator == "full" and (recipe.kl.placement == "loss") == learning
    sizes = recipe if learning else recipe.model_copy(update={"ppo": recipe.ppo.for_inference})
    return vocabulary_head.buffer_bytes(
        activations.Shape.of(sizes).response_tokens(sizes),
        home.model.config.get_text_config().vocab_size,
        models.DTYPES[recipe.model.dtype],
        recipe.generation.temperature or 1.0,
        learning=learning,
        entropy=learning,
        full_kl=full_kl,
        referred=not learning and recipe.reference_home != "model",
    )


def _activations(recipe: Recipe, on_cuda: bool) -> dict[str, int]:
    """By home; nothing, with a warning, for a family of which they can't be counted."""
    try:
        return activations.of_training(recipe, on_cuda)
    except activations.Uncounted as error:
        logger.warning("activations are not counted: this model's layers don't run without numbers (%s)", error)
        return {}


def room_between_phases(
    homes: list[Home], recipe: Recipe, raw: dict, ranks: int, on_cuda: bool, device_memory: int | None
) -> int | None:
    """Bytes of a device that no home holds between phases; None: unlimited. Arguments as for `phases`."""
    resting = {home.name: _resting(state(home, recipe, raw, ranks, on_cuda), home, raw) for home in homes}
    return _room_beside(resting, device_memory)


def _room_beside(resting: dict[str, Bytes], device_memory: int | None) -> int | None:
    return None if device_memory is None else device_memory - sum(sum(of.device.values()) for of in resting.values())


def _resting(training: Bytes, home: Home, raw: dict) -> Bytes:
    """What is left of a home outside of training: from stage 3 on gradients and buckets are allocated once for all."""
    if home.frozen_engine or stage_of(raw) == 3:
        return training
    device = Counter({part: size for part, size in training.device.items() if part not in (GRADIENTS, BUCKETS)})
    return Bytes(device, training.host, training.disk)


def _generation(home: Home, recipe: Recipe, config: dict, ranks: int, room: int | None) -> Bytes:
    """The sampler's copy of the actor, and a KV cache of sequences as long as they may get.

    Args:
        room: free bytes of the device; None: unlimited.
    """
    settings, dtype = recipe.generation, models.DTYPES[recipe.model.dtype]
    sequences = math.ceil(recipe.data.sequences_per_iteration / ranks)
    rows = min(settings.max_concurrent_sequences, sequences)
    columns = recipe.longest_sequence + (BLOCK if rows < sequences else 0)
    found = Bytes(Counter({CACHE: kv_cache_bytes(home.model.config, rows, columns, dtype)}))
    copy, largest = copy_bytes(home, recipe, config)
    resident = resident_bytes(home, recipe, config, room)
    found.device[COPY] = copy if resident == copy else min(copy, resident + 2 * largest)
    return found


def resident_bytes(home: Home, recipe: Recipe, config: dict, room: int | None) -> int:
    """How much of the sampler's copy stays while decoding; the rest is fetched in every step.

    Args:
        config, room: as for `copy_bytes` and `gathered_bytes`.
    """
    settings, (copy, largest) = recipe.generation, copy_bytes(home, recipe, config)
    budget = settings.gather_budget_bytes
    if budget == "auto" and room is not None:  # as HybridEngine decides it
        rows, dtype = settings.max_concurrent_sequences, models.DTYPES[recipe.model.dtype]
        cache = kv_cache_bytes(home.model.config, rows, recipe.longest_sequence, dtype)
        budget = max(0, room * 9 // 10 - cache - 2 * largest)
    if config["zero_optimization"]["stage"] != 3 or budget == "auto":
        return copy
    return min(copy, budget)


def copy_bytes(home: Home, recipe: Recipe, config: dict) -> tuple[int, int]:
    """What the sampler's weights take beside those of the engine: all of them, and those that are gathered at once.

    Args:
        home: the shared one.
        config: DeepSpeed's, resolved.
    """
    zero, actors = config["zero_optimization"], [w for w in home.weights if w.role in (shapes.BASE, shapes.ACTOR)]
    plain = recipe.model.dtype == "float32" and recipe.model.quantization == "none" and recipe.actor.train == "lora"
    merged = set()
    if plain and not any("lora_magnitude_vector" in w.name for w in actors):
        merged = {w.name.partition(".lora_A.")[0] + ".weight" for w in actors if ".lora_A." in w.name}
    replaced = {w.name.replace(f".modules_to_save.{shapes.ACTOR}", "") for w in actors if ".modules_to_save." in w.name}
    actors = [w for w in actors if w.name not in replaced]
    apart = [w for w in actors if w.name in merged or (zero["stage"] == 3 and w.elements > _persistent(zero))]
    apart = [w for w in apart if not (merged and ".lora_" in w.name)]
    return whole_bytes(apart), _largest_layer(apart)


def gathered_bytes(
    home: Home, recipe: Recipe, raw: dict, ranks: int, on_cuda: bool, room: int | None, backward: bool
) -> int:
    """The most of a home's weights that are whole at a time, beside those that always are.

    Args:
        raw: the recipe's DeepSpeed configuration, as read.
        room: free bytes of the device; None: unlimited.
        backward: forwards have one, in which the same weights come again.
    """
    zero = raw.get("zero_optimization", {})
    if home.frozen_engine:
        zero = read_ds_config(recipe.zero.frozen_ds_config, frozen=True).get("zero_optimization", {})
    kept, rest = kept_and_rest(home, recipe, raw, ranks, on_cuda, room)
    itemsize = max((w.itemsize for w in rest), default=1)
    if backward and recipe.model.quantization == "nf4" and not recipe.zero.activation_checkpointing:
        return whole_bytes(kept) + whole_bytes(rest)  # bitsandbytes keeps them from forward to backward
    limits = ["max_live_parameters", *(["max_reuse_distance"] if backward else [])]  # fetched ahead; coming again soon
    in_use = sum(int(stage_3_value(zero, key, DEFAULT_LIMIT)) * itemsize for key in limits)
    in_use += _largest_layer(rest)
    return whole_bytes(kept) + min(whole_bytes(rest), in_use)


def kept_and_rest(
    home: Home, recipe: Recipe, raw: dict, ranks: int, on_cuda: bool, room: int | None
) -> tuple[list[Weight], list[Weight]]:
    """The weights that ZeRO-3 cuts: those that stay gathered for a phase once they are, and the others.

    Args:
        raw, ranks, on_cuda, room: as for `gathered_bytes`.
    """
    zero = raw.get("zero_optimization", {})
    if not home.frozen_engine and zero.get("stage", 0) != 3:
        return [], []
    small = 0 if home.frozen_engine else _persistent(resolve(home, recipe, raw, ranks, on_cuda)["zero_optimization"])
    rest, keep = [w for w in home.weights if w.elements > small], recipe.zero.keep_gathered_bytes
    if keep == "auto":
        offloaded = home.offloaded if home.frozen_engine else offloads(zero, "offload_param")
        keep = 0 if offloaded else math.inf if room is None else room // 10
    kept: list[Weight] = []
    for trains in (False, True):  # as fetching.PhaseWeights chooses
        group = [w for w in rest if w.trains == trains]
        if whole_bytes([*kept, *group]) > keep:
            break
        kept += group
        rest = [w for w in rest if w.trains != trains]
    return kept, rest


def state(home: Home, recipe: Recipe, raw: dict, ranks: int, on_cuda: bool) -> Bytes:
    """What a home holds between forward and backward passes from its first optimizer step on; gradients included.

    Args:
        raw: the recipe's DeepSpeed configuration, as read.
        ranks: that share the model.
        on_cuda: the devices are CUDA's.
    """
    constants = Counter({QUANTIZATION: size} if (size := sum(w.constants for w in home.weights)) else {})
    return _by_deepspeed(home, recipe, raw, ranks, on_cuda) + Bytes(constants)


def _by_deepspeed(home: Home, recipe: Recipe, raw: dict, ranks: int, on_cuda: bool) -> Bytes:
    """As `state`, but for what is none of DeepSpeed's."""
    if home.frozen_engine:
        config = frozen_ds_config(recipe, "cpu" if home.offloaded else "none", on_cuda=on_cuda)
        return _cut_weights(home, config["zero_optimization"], ranks)
    groups = home.trained()
    config = resolve(home, recipe, raw, ranks, on_cuda)
    stage = config["zero_optimization"]["stage"]
    if stage == 3:
        return _stage_3(home, groups, config, ranks)
    if stage:
        return _stage_1_2(home, groups, config, ranks)
    return _stage_0(home, groups)


def resolve(home: Home, recipe: Recipe, raw: dict, ranks: int, on_cuda: bool) -> dict:
    """DeepSpeed's configuration of a home's engine, every "auto" filled in; how much is fetched ahead is none of it."""
    trained = [w for w in home.weights if w.trains]
    adapters = [w.elements for w in home.weights if ".lora_A." in w.name or ".lora_B." in w.name]
    return resolve_ds_config(
        raw,
        dtype=recipe.model.dtype,
        world_size=ranks,
        micro_batch=recipe.ppo.micro_batch_sequences,
        trainable_parameters=sum(w.elements for w in trained),
        largest_adapter=max(adapters, default=0),
        on_cuda=on_cuda,
    )


def _shard(weight: Weight, ranks: int) -> int:
    """Elements of a rank's part of a weight: the last rank's is padded."""
    return math.ceil(weight.elements / ranks)


def _largest_layer(weights: Iterable[Weight]) -> int:
    """Bytes of the most that is gathered at once: a decoder layer, or a weight outside of them."""
    layers = Counter()
    for weight in weights:
        layers[weight.name if weight.layer is None else weight.layer] += weight.nbytes
    return max(layers.values(), default=0)


def whole_bytes(weights: Iterable[Weight]) -> int:
    return sum(w.nbytes for w in weights)


def _stage_0(home: Home, groups: dict[str, list[Weight]]) -> Bytes:
    found, trained = Bytes(), [w for group in groups.values() for w in group]
    elements = sum(w.elements for w in trained)
    found.device[WEIGHTS] = whole_bytes(home.weights)
    found.device[GRADIENTS] = whole_bytes(trained)
    found.device[MOMENTS] = 8 * elements + SCALAR * len(trained)
    if any(w.itemsize < 4 for w in trained):
        found.device[MASTERS] = 4 * elements
    return found


def _stage_1_2(home: Home, groups: dict[str, list[Weight]], config: dict, ranks: int) -> Bytes:
    """Each group's weights are one flat tensor, of which each rank steps a part."""
    zero, found = config["zero_optimization"], Bytes()
    found.device[WEIGHTS] = whole_bytes(w for w in home.weights if not w.trains)
    state = found.host if offloads(zero, "offload_optimizer") else found.device
    for group in groups.values():
        itemsize, flat = group[0].itemsize, _flat(group, ranks)
        part = flat // ranks
        found.device[WEIGHTS] += flat * itemsize
        state[MASTERS] += 4 * part
        if state is found.host:
            state[MOMENTS] += 8 * part
            state[GRADIENTS] += 4 * part
            state[BUCKETS] += itemsize * part  # what the new weights go back to the device in
        else:
            state[MOMENTS] += 8 * part + SCALAR
    if state is found.device:
        if zero["stage"] == 1:
            found.device[GRADIENTS] = whole_bytes(w for group in groups.values() for w in group)
        else:  # what has been added up, and the micro-batch's; the last rank has added up padding, too
            whole = [2 * _overlapping(groups.values(), ranks, rank) for rank in range(ranks)]
            whole[-1] += sum(
                (_flat(of, ranks) - sum(w.elements for w in of)) * of[0].itemsize for of in groups.values()
            )
            found.device[GRADIENTS] = max(whole)
    # In a backward at stage 2, between backwards at stage 1; a second one fills while the first one travels.
    buffers = 2 if zero.get("overlap_comm") else 1
    found.device[BUCKETS] += buffers * zero["reduce_bucket_size"] * next(iter(groups.values()))[0].itemsize
    return found


def _overlapping(groups: Iterable[list[Weight]], ranks: int, rank: int) -> int:
    """Bytes of the weights that lie in a rank's parts of the groups, if only with an end: their gradients are whole."""
    found = 0
    for group in groups:
        part, start = _flat(group, ranks) // ranks, 0
        for weight in group:
            end = start + weight.elements
            found += weight.nbytes if start < (rank + 1) * part and end > rank * part else 0
            start = end
    return found


def _flat(group: list[Weight], ranks: int) -> int:
    """Elements of a group's flat tensor: padded until a rank's part of it is a whole number of pairs."""
    return math.ceil(sum(w.elements for w in group) / (2 * ranks)) * 2 * ranks


def _stage_3(home: Home, groups: dict[str, list[Weight]], config: dict, ranks: int) -> Bytes:
    zero = config["zero_optimization"]
    found, on_host = _cut_weights(home, zero, ranks), offloads(zero, "offload_optimizer")
    state = found.host if on_host else found.device
    for group in groups.values():
        itemsize, shards = group[0].itemsize, [_shard(w, ranks) for w in group]
        part = sum(shards)
        state[GRADIENTS] += itemsize * part
        if to_nvme(zero) and 4 * part >= _swapped_from(config):
            written = [shard // ALIGNED * ALIGNED for shard in shards if 4 * shard >= _swapped_from(config)]
            found.disk[MASTERS] += 4 * _aligned(part)
            found.disk[MOMENTS] += 8 * _aligned(part)
            found.disk[GRADIENTS] += 4 * sum(written)
            # What isn't written waits in memory for the step, where it is no part of the buffer itself.
            state[GRADIENTS] += 4 * (part - sum(written)) if itemsize < 4 else 0
            continue
        state[MASTERS] += 4 * part  # a copy in float32, too
        state[MOMENTS] += 8 * part + (0 if on_host else SCALAR)
        state[GRADIENTS] += 4 * part if on_host else 0
    if groups:
        found.device[BUCKETS] += zero["reduce_bucket_size"] * next(iter(groups.values()))[0].itemsize
    if to_nvme(zero):
        largest = max((sum(_shard(w, ranks) for w in group) for group in groups.values()), default=0)
        found.host[BUCKETS] += zero["offload_optimizer"].get("buffer_count", 4) * 4 * _aligned(largest)
    return found


def _cut_weights(home: Home, zero: dict, ranks: int) -> Bytes:
    """Every weight is cut in equal parts; small ones are whole on every rank beside that."""
    found = Bytes()
    shards = found.host if device_of(zero, "offload_param") == "cpu" else found.device
    for weight in home.weights:
        shard = _shard(weight, ranks) * weight.itemsize
        if weight.elements <= _persistent(zero):  # whole beside it, put together from the padded parts
            found.device[WEIGHTS] += shard + shard * ranks
        else:
            shards[WEIGHTS] += shard
        if not weight.trains or weight.elements > _persistent(zero):  # a step drops the second shard of what trains
            second = zero.get("zero_hpz_partition_size", 1)
            shards[WEIGHTS] += _shard(weight, ranks) * ranks // second * weight.itemsize if second > 1 else 0
    return found


def _swapped_from(config: dict) -> int:
    return max(SWAPPED_BYTES, config.get("aio", {}).get("block_size", 2**20))


def _aligned(elements: int) -> int:
    return math.ceil(elements / ALIGNED) * ALIGNED


def _persistent(zero: dict) -> int:
    """Elements up to which a weight is whole on every rank at all times."""
    return stage_3_value(zero, "param_persistence_threshold", 100_000)


def stage_3_value(zero: dict, key: str, default: int) -> int | str:
    return zero.get(key, zero.get(f"stage3_{key}", default))
