"""DeepSpeed's JSON: what is read, refused and filled in."""

import copy
import json

import pytest

from engine.config import REPOSITORY
from engine.ds_checks import OWNED_KEYS, QUANTIZED, TOP_LEVEL_KEYS, ZERO_KEYS, check_ds_config, machine_problems
from engine.ds_config import read_ds_config, resolve_ds_config, resolve_frozen_ds_config
from engine.errors import RecipeError

FROZEN = REPOSITORY / "ds_configs" / "inference.json"
FILES = sorted(set((REPOSITORY / "ds_configs").glob("*.json")) - {FROZEN})
PLACES = {
    "zero3_cpu_optimizer": ("cpu", "none"),
    "zero3_cpu_offload": ("cpu", "cpu"),
    "zero3_nvme": ("nvme", "cpu"),
}
"""Of optimizer and weights, where it isn't the device for both."""


def resolve(raw, **changes):
    known = {"dtype": "float32", "world_size": 2, "micro_batch": 4, "trainable_parameters": 1000, "on_cuda": False}
    return resolve_ds_config(raw, **(known | changes))


def problems_of(raw, **changes) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(raw, **changes)
    return str(caught.value)


def write(tmp_path, text):
    file = tmp_path / "ds.json"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_file_resolves_to_what_deepspeed_accepts(file, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig

    # DeepSpeed sees one rank here, where no process group is up.
    config = resolve(read_ds_config(file), dtype=dtype, world_size=1, on_cuda=True)
    parsed = DeepSpeedConfig(config)
    assert parsed.gradient_clipping == 0.0
    assert parsed.train_micro_batch_size_per_gpu == parsed.train_batch_size == 4
    assert parsed.gradient_accumulation_steps == 1
    assert parsed.bfloat16_config.enabled == (dtype == "bfloat16")
    assert parsed.float16_config.enabled == (dtype == "float16")
    zero = parsed.zero_config
    assert f"zero{zero.stage}" in file.stem
    places = tuple(
        "none" if section is None else section.device for section in (zero.offload_optimizer, zero.offload_param)
    )
    assert places == PLACES.get(file.stem, ("none", "none"))
    quantized = {zero.zero_quantized_weights, zero.zero_quantized_gradients}
    assert quantized == {file.stem == "zero3_plus_plus"}
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize("offload_param", ["none", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_file_for_frozen_models_resolves_to_what_deepspeed_accepts(dtype, offload_param):
    from deepspeed.runtime.config import DeepSpeedConfig

    known = {"dtype": dtype, "offload_param": offload_param, "prefetch_elements": 77}
    config = resolve_frozen_ds_config(read_ds_config(FROZEN, frozen=True), **known, on_cuda=True)
    assert "auto" not in json.dumps(config)
    parsed = DeepSpeedConfig(config)
    zero = parsed.zero_config
    assert (zero.stage, zero.param_persistence_threshold, zero.prefetch_bucket_size) == (3, 0, 77)
    assert parsed.gradient_clipping == 0.0 and parsed.bfloat16_config.enabled == (dtype == "bfloat16")
    assert parsed.float16_config.enabled == (dtype == "float16")
    assert (zero.offload_param is None) if offload_param == "none" else (zero.offload_param.device == "cpu")


@pytest.mark.parametrize(
    ("zero", "parts"),
    [
        ({"stage": 2}, ["stage must be 3", "got 2"]),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, ["offload_param.device", "got 'cpu'", 'write "auto"']),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, ["offload_optimizer", "frozen", "remove it"]),
        ({"stage": 3, "stage3_prefetch_bucket_sise": 1}, ["unknown key", "stage3_prefetch_bucket_size"]),
    ],
)
def test_a_file_that_is_not_for_frozen_models(tmp_path, zero, parts):
    with pytest.raises(RecipeError) as caught:
        read_ds_config(write(tmp_path, json.dumps({"zero_optimization": zero})), frozen=True)
    assert all(part in str(caught.value) for part in parts)


def test_the_files_are_all_there():
    names = {file.name for file in [*FILES, FROZEN]}
    assert {"zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero3_plus_plus.json", "inference.json"} <= names
    assert {f"{stem}.json" for stem in PLACES} <= names
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text()
    assert all(name in readme for name in names)


def test_builtin_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("ds_configs/zero2.json")["zero_optimization"]["stage"] == 2


class _Recorder(dict):
    """A configuration that remembers which of its keys were asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # `key in config.keys()` then asks __contains__; iterating gives the keys too

    def __copy__(self):
        return self  # DeepSpeed reads a copy


def test_known_keys_are_those_of_the_installed_deepspeed():
    """Watches what DeepSpeed's own parser asks a configuration for."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    watched = _Recorder(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(watched)
    asked = watched.asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert len(asked) > 40, "the recorder saw too little"
    assert asked <= TOP_LEVEL_KEYS
    # These are read elsewhere: deepspeed.initialize, and the optional configuration sections' own readers.
    assert TOP_LEVEL_KEYS - asked <= {"data_parallel_size", "sequence_parallel_size", "gradient_clipping"}
    fields = DeepSpeedZeroConfig.model_fields
    assert set(fields) | {field.alias for field in fields.values() if field.alias} == ZERO_KEYS


def test_unknown_keys_name_the_nearest_one(tmp_path):
    file = write(tmp_path, '{"gradient_cliping": 1.0, "zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}}')
    with pytest.raises(RecipeError) as caught:
        read_ds_config(file)
    first, second = caught.value.problems
    assert str(file) in first and "gradient_cliping: unknown key; the nearest is gradient_clipping" in first
    assert "zero_optimization.reduce_bucket_sise" in second and "zero_optimization.reduce_bucket_size" in second


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"a": 1,\n "b" 2}', ["ds.json:2", "not valid JSON"]),
        ('{"steps_per_print": 1, "steps_per_print": 2}', ["steps_per_print given twice"]),
        ("[1]", ["JSON object", "list"]),
    ],
)
def test_malformed_files(tmp_path, text, parts):
    with pytest.raises(RecipeError) as caught:
        read_ds_config(write(tmp_path, text))
    assert all(part in str(caught.value) for part in parts)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="none.json"):
        read_ds_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "got 1.0", "actor.optimizer.gradient_clipping"]),
        ({"gradient_accumulation_steps": 4}, ["got 4", "ppo.micro_batch_sequences"]),
        ({"gradient_allreduce_op": "sum"}, ["mean", "got 'sum'"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "actor.optimizer"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "schedule"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "model.dtype"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine"]),
        ({"zero_optimization": True}, ["zero_optimization must be an object"]),
        ({"zero_optimization": {"stage": 4}}, ["0, 1, 2 or 3", "got 4"]),
        ({"zero_optimization": {"reduce_bucket_size": "1e9"}}, ["must be a number of elements", "got '1e9'"]),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param", "stage 3", "got 2"],
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "got 0"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "x"}}},
            ["offload_optimizer needs stage 3", "got 2"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            ["a folder on a local disk", "no nvme_path", '"nvme_path": "auto"'],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "x"}}},
            ["offload_param.device must be none or cpu", "got 'nvme'", "write cpu"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            ["none, cpu or nvme", "got 'disk'"],
        ),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, ["ZeRO++ needs stage 3", "got 2"]),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": "auto"}}, ["hpz", "ZeRO++", "got 2"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}, ["the ranks of a host", "got 0"]),
    ],
)
def test_what_another_part_owns_is_refused(raw, parts):
    (problem,) = check_ds_config(raw)
    assert all(part in problem for part in parts)


def test_every_owned_key_is_refused():
    assert len(check_ds_config({key: {} for key in OWNED_KEYS})) == len(OWNED_KEYS)


@pytest.mark.parametrize("value", ["auto", 0, 0.0])
def test_clipping_is_always_written_as_zero(value):
    assert resolve({"gradient_clipping": value})["gradient_clipping"] == 0.0
    assert resolve({})["gradient_clipping"] == 0.0


def test_batch_sizes():
    resolved = resolve({"train_batch_size": "auto"}, world_size=3, micro_batch=5)
    assert resolved["train_micro_batch_size_per_gpu"] == 5
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["train_batch_size"] == 15
    assert resolve({"train_batch_size": 8})["train_batch_size"] == 8
    assert "train_batch_size must be 8" in problems_of({"train_batch_size": 64})


def test_dtype_follows_the_recipe():
    assert resolve({"bf16": {"enabled": "auto"}}, dtype="bfloat16")["bf16"]["enabled"] is True
    assert resolve({}, dtype="float32")["bf16"]["enabled"] is False
    old = resolve({"bfloat16": {"enabled": "auto"}}, dtype="bfloat16")
    assert old["bfloat16"]["enabled"] is True and "bf16" not in old
    said = problems_of({"bf16": {"enabled": True}}, dtype="float32")
    assert "bf16.enabled must be false" in said and "model.dtype float32" in said
    assert "bf16 must be an object" in problems_of({"bf16": True})
    kept = resolve({"fp16": {"loss_scale_window": 5}}, dtype="float16")
    assert kept["fp16"] == {"loss_scale_window": 5, "enabled": True} and kept["bf16"]["enabled"] is False
    said = problems_of({"fp16": {"enabled": True}}, dtype="bfloat16")
    assert "fp16.enabled must be false" in said and "model.dtype bfloat16" in said


@pytest.mark.parametrize(
    ("trained", "on_cuda", "bucket"),
    [
        (1000, None, 1000),
        (49_999_999, True, 49_999_999),
        (7_000_000_000, True, 50_000_000),
        (7_999_999, False, 7_999_999),
        (7_000_000_000, False, 8_000_000),
    ],
)
def test_buckets_follow_what_trains(trained, on_cuda, bucket):
    raw = {"zero_optimization": {"stage": 2}}
    zero = resolve(raw, trainable_parameters=trained, on_cuda=on_cuda)["zero_optimization"]
    assert zero["reduce_bucket_size"] == bucket
    assert zero["allgather_bucket_size"] == bucket + bucket % 2, "DeepSpeed's stages 1 and 2 insist that it is even"
    given = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": 77}})["zero_optimization"]
    assert given["reduce_bucket_size"] == 77


def test_a_role_is_one_sub_group():
    raw = {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}
    assert resolve(raw, trainable_parameters=3_000_000_000)["zero_optimization"]["sub_group_size"] >= 3_000_000_000
    raw["zero_optimization"]["sub_group_size"] = 1000
    assert resolve(raw, trainable_parameters=1000)["zero_optimization"]["sub_group_size"] == 1000
    said = problems_of(raw, trainable_parameters=1001)
    assert "sub_group_size" in said and "1001" in said and "got 1000" in said


@pytest.mark.parametrize("on_cuda", [False, True])
def test_offload_takes_our_optimizer_and_pins_only_for_a_device(on_cuda):
    config = resolve(read_ds_config("ds_configs/zero3_cpu_offload.json"), on_cuda=on_cuda)
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"]["offload_param"]["pin_memory"] is on_cuda


@pytest.mark.parametrize(
    ("ranks", "of_a_host", "given", "size"),
    [(16, 8, "auto", 8), (8, 8, "auto", 1), (8, None, "auto", 1), (16, 8, 4, 4), (16, 8, 1, 1)],
)
def test_second_shards_lie_within_a_host(ranks, of_a_host, given, size):
    raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": given}}
    zero = resolve(raw, world_size=ranks, local_ranks=of_a_host)["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == size
    raw["zero_optimization"]["zero_hpz_partition_size"] = 3
    assert "must divide the 16 ranks, got 3" in problems_of(raw, world_size=16, local_ranks=8)


@pytest.mark.parametrize("key", QUANTIZED)
def test_quantized_traffic_needs_a_cuda_device(key):
    raw = {"zero_optimization": {"stage": 3, key: True}}
    assert machine_problems(raw, on_cuda=True) == []
    (problem,) = machine_problems(raw, on_cuda=False)
    assert key in problem and "CUDA device, got none" in problem and "ds_configs/zero3.json" in problem
    assert problem in problems_of(raw)
    raw["zero_optimization"][key] = False
    assert machine_problems(raw, on_cuda=False) == [] and resolve(raw)


def test_what_goes_to_nvme_goes_where_the_recipe_says():
    raw = read_ds_config("ds_configs/zero3_nvme.json")
    assert resolve(raw, nvme_path="/disk")["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/disk"
    raw["zero_optimization"]["offload_optimizer"]["nvme_path"] = "/mine"
    assert resolve(raw, nvme_path="/disk")["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/mine"


def test_unfillable_auto_is_refused():
    said = problems_of({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}})
    assert "zero_optimization.stage3_max_live_parameters" in said


def test_the_argument_is_left_alone_and_all_problems_come_at_once():
    raw = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
    before = copy.deepcopy(raw)
    resolve(raw)
    assert raw == before
    with pytest.raises(RecipeError) as caught:
        resolve({"optimizer": {}, "gradient_clipping": 1, "stepsperprint": 1})
    assert len(caught.value.problems) == 3
