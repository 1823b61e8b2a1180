"""Loading real folders: several files, types and packings; in shards no rank holds the model, and nothing differs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from engine import models, planner, shapes, zero
from engine.config import Recipe
from engine.ds_config import frozen_ds_config, read_ds_config
from engine.errors import RecipeError
from engine.hybrid_engine import HybridEngine
from engine.role_config import ModelConfig
from engine.roles import ACTOR, CRITIC, Layout, RolesModel
from engine.sharded_loading import sharded_loading
from tests import checkpoints, tiny
from tests.distributed import Pool

MIB = 2**20
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy whose weights are spread over several files."""
    found = checkpoints.save_policy(tmp_path_factory.mktemp("base") / "policy", shard_bytes=40_000, **SIZES)
    assert len(list(found.glob("*.safetensors"))) >= 4
    return found


def settings(folder: Path, **changes) -> ModelConfig:
    return ModelConfig(path=str(folder), **changes)


def same_weights(model, folder: Path) -> bool:
    """Whether a model holds what the folder's files hold, read here without transformers."""
    saved = {}
    for file in folder.glob("*.safetensors"):
        saved |= load_file(file)
    for file in folder.glob("*.bin"):
        saved |= torch.load(file, weights_only=True)
    found = model.state_dict()
    return saved.keys() <= found.keys() and all(torch.equal(found[name].float(), saved[name]) for name in saved)


class TestFolders:
    def test_several_safetensors_files(self, folder):
        model = models.load_causal(settings(folder))
        assert same_weights(model, folder)
        assert model.training and not any(p.requires_grad for p in model.parameters())

    def test_several_torch_files(self, tmp_path):
        checkpoints.save_policy_in_torch_files(tmp_path)
        assert not list(tmp_path.glob("*.safetensors")) and len(list(tmp_path.glob("*.bin"))) == 2
        assert same_weights(models.load_causal(settings(tmp_path)), tmp_path)

    def test_a_vocabulary_that_the_user_resized(self, tmp_path):
        model = LlamaForCausalLM(checkpoints.config())
        model.resize_token_embeddings(40)
        model.save_pretrained(tmp_path)
        loaded = models.load_causal(settings(tmp_path))
        assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_output_embeddings().weight.shape[0] == 40
        assert same_weights(loaded, tmp_path)

    @pytest.mark.parametrize("name", models.DTYPES)
    def test_types(self, folder, name):
        model = models.load_causal(settings(folder, dtype=name))
        assert {p.dtype for p in model.parameters()} == {models.DTYPES[name]}
        assert {b.dtype for b in model.buffers()} == {torch.float32}, "rotary frequencies in 16 bit move far positions"

    def test_the_attention_kernel_asked_for(self, folder):
        ids = torch.arange(12)[None] + 3
        logits = {}
        for kernel in ("eager", "sdpa"):
            model = models.load_causal(settings(folder, attn_implementation=kernel))
            assert model.config._attn_implementation == kernel
            logits[kernel] = model(input_ids=ids).logits
        assert torch.allclose(logits["eager"], logits["sdpa"], atol=1e-5)

    def test_a_broken_file(self, tmp_path):
        checkpoints.save_policy(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"half a download")
        with pytest.raises(RecipeError, match="can't be loaded"):
            models.load_causal(settings(tmp_path))

    def test_weights_that_are_missing(self, tmp_path):
        with pytest.raises(RecipeError, match="no weights for lm_head.weight, which a LlamaForCausalLM needs"):
            models.load_causal(settings(without_head(tmp_path)))

    def test_weights_of_another_size(self, tmp_path):
        with pytest.raises(RecipeError, match=r"its own config.json: lm_head.weight is \[32, 32\], not \[48, 32\]"):
            models.load_causal(settings(of_another_size(tmp_path)))


def without_head(folder: Path) -> Path:
    file = checkpoints.save_policy(folder) / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def of_another_size(folder: Path) -> Path:
    """The config names more tokens than the weights have rows."""
    file = checkpoints.save_policy(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 48}))
    return folder


class TestQuantized:
    @pytest.mark.parametrize("name", models.DTYPES)
    def test_nf4_packs_every_linear_layer_but_the_head(self, folder, name):
        model = models.load_causal(settings(folder, dtype=name, quantization="nf4"))
        packed = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert linear - packed == {"lm_head"} and len(packed) == 14
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        state = layer.weight.quant_state
        assert layer.weight.dtype == layer.compute_dtype == models.DTYPES[name], "ZeRO-3 partitions one type"
        assert layer.weight.numel() * layer.weight.element_size() == 64 * 128 // 2, "two weights in a byte"
        assert state.quant_type == "nf4" and state.nested, "double quantization: the scales are quantized too"

    def test_what_packing_loses(self, folder):
        """Relative error of a weight: 4 bits of a normal distribution lose about 9%, 8 bits about 0.7% of it."""
        name = "model.layers.0.mlp.up_proj"
        plain = models.load_causal(settings(folder)).get_submodule(name).weight
        for quantization, least, most in (("nf4", 0.05, 0.12), ("int8", 0.003, 0.012)):
            layer = models.load_causal(settings(folder, quantization=quantization)).get_submodule(name)
            unpacked = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
            assert least < (unpacked - plain).norm() / plain.norm() < most

    def test_int8_packs_the_same_layers(self, folder):
        model = models.load_causal(settings(folder, dtype="bfloat16", quantization="int8"))
        packed = [m for m in model.modules() if isinstance(m, Linear8bitLt)]
        assert len(packed) == 14 and all(m.weight.dtype == torch.int8 for m in packed)
        assert all(m.state.threshold == 0 for m in packed), "outlier columns would tie a row to its company"

    @pytest.mark.parametrize("training", [True, False])
    def test_an_int8_row_does_not_depend_on_its_company(self, folder, training):
        model = models.load_causal(settings(folder, quantization="int8")).train(training)
        # A company whose activations are large: with a threshold, its outlier columns would be computed otherwise.
        states = (
            torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
            * torch.tensor([1.0, 30.0, 1.0])[:, None, None]
        )
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        assert torch.equal(layer(states)[:1], layer(states[:1]))


# --- two processes


def base_in_shards(folder: Path, ds_config: str, **changes):
    asked = settings(folder, **changes)
    with sharded_loading(read_ds_config(ds_config), models.DTYPES[asked.dtype]):
        return models.load_causal(asked)


def roles_on(base, recipe: Recipe) -> RolesModel:
    """Adapters and value head away from their start, so that every gradient is non-zero."""
    roles = RolesModel(base, recipe)
    generator = torch.Generator().manual_seed(2)
    for role in (ACTOR, CRITIC):
        for parameter in roles.role_parameters(role).values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return roles


def outputs_of(engine: HybridEngine) -> torch.Tensor:
    """Log-probs of actor and reference, and values, of the tokens that are real."""
    rollout = tiny.rollout()
    output = engine.forward(rollout, torch.arange(len(rollout)), values=True, ref_logprobs=True)
    found = torch.stack([output.logprobs, output.ref_logprobs, output.values])
    return torch.where(rollout.response_mask, found, 0.0)


def two_steps(base, recipe: Recipe) -> dict:
    """Outputs before and after an optimizer step, its gradient norms, and the bytes of the frozen shards."""
    roles = roles_on(base, recipe)
    engine = HybridEngine(roles, recipe)
    found = {"outputs": []}
    for _ in range(2):
        output = outputs_of(engine)
        engine.backward(output[0].mean(), output[2].square().mean(), last=True)
        found["norms"] = engine.step()
        found["outputs"].append(output.detach())
    frozen = roles.frozen_parameters().values()
    found["shard_bytes"] = sum(zero.local_shard(p).nbytes for p in frozen)
    found["whole_bytes"] = sum(zero.elements(p) * p.element_size() for p in frozen)
    found["parameters"] = len(frozen)
    found["buffers"] = {str(b.dtype) for b in roles.buffers()}
    engine.close()
    return found


def trained(folder: Path, ds_config: str, sharded: bool, model: dict, checkpointing: bool = False) -> dict:
    section = {"path": str(folder), **model}
    on = {"ds_config": ds_config, "activation_checkpointing": checkpointing}
    recipe = tiny.recipe(model=section, zero=on)
    if not sharded:
        return two_steps(models.load_causal(recipe.model), recipe)
    base = base_in_shards(folder, ds_config, **model)
    assert recipe.model.quantization != "none" or not any(zero.is_gathered(p) for p in base.parameters())
    return two_steps(base, recipe)


def assert_same(found: dict, expected: dict, atol: float = 0.0) -> None:
    for one, other in zip(found["outputs"], expected["outputs"], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=atol)
    assert found["norms"] == pytest.approx(expected["norms"], rel=atol)


@pytest.mark.dist
@pytest.mark.parametrize("ds_config", ["zero3", "zero3_cpu_offload"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_base_loaded_in_shards_trains_to_the_same_bits(pool, tmp_path, ds_config, dtype, tied):
    checkpoints.save_policy(tmp_path, shard_bytes=40_000, tie_word_embeddings=tied, **SIZES)
    ds_config, model = f"ds_configs/{ds_config}.json", {"dtype": dtype}
    expected = pool.run(trained, tmp_path, ds_config, False, model)
    for found, other in zip(pool.run(trained, tmp_path, ds_config, True, model), expected, strict=True):
        assert_same(found, other)
        assert found["shard_bytes"] == other["shard_bytes"] and found["buffers"] == {"torch.float32"}


def scores(folder: Path, sharded: bool) -> torch.Tensor:
    config = frozen_ds_config(tiny.recipe(), "none")
    with sharded_loading(config if sharded else None, torch.float32):
        model = models.load_scorer(str(folder), "float32")
    assert all(zero.is_gathered(p) != sharded for p in model.parameters())
    engine = zero.FrozenEngine(model, config)
    found = engine(input_ids=torch.arange(12)[None] + 3).logits
    engine.close()
    return found


@pytest.mark.dist
def test_a_reward_model_loaded_in_shards_scores_the_same(pool, tmp_path):
    checkpoints.save_reward_model(tmp_path)
    for whole, sharded in zip(pool.run(scores, tmp_path, False), pool.run(scores, tmp_path, True), strict=True):
        assert torch.equal(whole, sharded)


def refused(folder: Path) -> tuple[str, bool]:
    """The message, and whether a model built afterwards is an ordinary one (a traceback keeps what it passed alive)."""
    try:
        base_in_shards(folder, "ds_configs/zero3.json")
    except RecipeError as error:
        return str(error), builds_ordinary_models()
    return "nothing was raised", builds_ordinary_models()


def builds_ordinary_models() -> bool:
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(checkpoints.config())
    return not any(hasattr(p, "ds_id") for p in model.parameters())


@pytest.mark.dist
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_head, "no weights for lm_head.weight"),
        (of_another_size, "size mismatch for lm_head.weight"),  # which rank 0 alone sees
        (checkpoints.save_policy, "nothing was raised"),
    ],
)
def test_every_rank_is_told_and_nothing_stays_switched(pool, tmp_path, spoil, message):
    for told, ordinary in pool.run(refused, spoil(tmp_path)):
        assert message in told
        assert ordinary, "a model built after the loading came out partitioned"


NF4 = [("zero0", False), ("zero1", False), ("zero2", True), ("zero3", False), ("zero3", True)]


@pytest.mark.dist
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_trains_alike_at_every_stage_and_its_packed_bytes_are_sharded(pool, single, folder, dtype):
    """The bound in bfloat16 is its rounding, 2^-8, of log-probs near 4: gradients are summed in another order."""
    model = {"dtype": dtype, "quantization": "nf4"}
    plain = single.run(plain_outputs, folder, model)[0]
    expected = pool.run(trained, folder, "ds_configs/zero1.json", False, model)
    for stage, checkpointing in NF4:
        ranks = pool.run(trained, folder, f"ds_configs/{stage}.json", True, model, checkpointing)
        for found, other in zip(ranks, expected, strict=True):
            assert torch.allclose(found["outputs"][0], plain, rtol=0, atol=1e-5 if dtype == "float32" else 0.04)
            assert_same(found, other, atol=2e-5 if dtype == "float32" else 0.1)
        held, whole = sum(found["shard_bytes"] for found in ranks), ranks[0]["whole_bytes"]
        if stage == "zero3":
            padding = 2 * 4 * ranks[0]["parameters"]
            assert whole <= held <= whole + padding, "every packed byte lies on one rank"
        else:
            assert held == 2 * whole


def plain_outputs(folder: Path, model: dict) -> torch.Tensor:
    """What the roles compute without DeepSpeed."""
    recipe = tiny.recipe(model={"path": str(folder), **model})
    roles = roles_on(models.load_causal(recipe.model), recipe)
    rollout = tiny.rollout()
    layout = Layout.of(rollout)
    with torch.no_grad():
        output = roles.outputs(layout, values=True, ref_logprobs=True)
    found = torch.stack([output.logprobs, output.ref_logprobs, output.values])
    return torch.where(rollout.response_mask, found, 0.0)


@pytest.mark.dist
def test_int8_trains_alike_at_the_stages_that_leave_weights_whole(pool, single, folder):
    model = {"quantization": "int8"}
    plain = single.run(plain_outputs, folder, model)[0]
    expected = pool.run(trained, folder, "ds_configs/zero1.json", False, model)
    for stage, checkpointing in (("zero0", False), ("zero1", True), ("zero2", False)):
        for found, other in zip(
            pool.run(trained, folder, f"ds_configs/{stage}.json", False, model, checkpointing), expected, strict=True
        ):
            assert torch.allclose(found["outputs"][0], plain, rtol=0, atol=1e-5)
            assert_same(found, other, atol=2e-5)


# --- memory


def private_mib() -> float:
    """Memory that is this process's own; pages of a mapped file are the system's to take back."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


@contextlib.contextmanager
def high_water(found: dict):
    """The largest rise of private memory inside."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or free memory that the process keeps would hide what is taken now
    start, stop = private_mib(), threading.Event()
    found["mib"] = 0.0

    def watch() -> None:
        while not stop.is_set():
            found["mib"] = max(found["mib"], private_mib() - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def peak_while_loading(folder: Path, ds_config: str, quantization: str) -> tuple[float, float]:
    """MiB at the worst moment, and of the whole model in bfloat16."""
    models.load_causal(settings(folder.parent / "warm", dtype="bfloat16", quantization=quantization))  # imports
    found = {}
    with high_water(found):
        model = base_in_shards(folder, ds_config, dtype="bfloat16", quantization=quantization)
    return found["mib"], sum(p.numel() for p in LlamaForCausalLM._from_config(model.config).parameters()) * 2 / MIB


@pytest.fixture(scope="module")
def fresh_pool():
    """Ranks that load first, as in a run: free blocks that other tests left in the heap would be taken and cut up."""
    workers = Pool(world_size=2)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """64 MiB in bfloat16, in six files of float32: reading it in bfloat16 makes memory of its own."""
    folder = tmp_path_factory.mktemp("large")
    checkpoints.save_policy(folder / "warm", **SIZES)
    # Many small layers: to pack a weight, bitsandbytes takes about 20 bytes for each of its numbers, for a moment.
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 19, "vocab_size": 512}
    return checkpoints.save_policy(folder / "policy", shard_bytes=24 * MIB, **sizes)


@pytest.mark.dist
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="reads memory as Linux and glibc tell it")
@pytest.mark.parametrize(
    ("ds_config", "quantization", "least", "most"),
    [
        ("zero2", "none", 0.95, 1.5),  # each rank holds the model: what the next line must not do
        ("zero3", "none", 0.45, 0.75),  # its half, and the tensor that is being cut
        ("zero3", "nf4", 0.25, 0.9),  # all of the packed model, and the tensor that is being packed
    ],
)
def test_no_rank_ever_holds_the_whole_model(fresh_pool, large, ds_config, quantization, least, most):
    assert len(list(large.glob("*.safetensors"))) >= 4
    model = {"path": str(large), "dtype": "bfloat16", "quantization": quantization}
    recipe = tiny.recipe(model=model, zero={"ds_config": f"ds_configs/{ds_config}.json"})
    raw = read_ds_config(recipe.zero.ds_config)
    loading = planner.phases(recipe, raw, 2, on_cuda=False)["loading"][shapes.SHARED].device
    planned = sum(loading.values()) / MIB
    for peak, whole in fresh_pool.run(peak_while_loading, large, f"ds_configs/{ds_config}.json", quantization):
        assert least * whole < peak < most * whole, f"{peak:.0f} MiB of {whole:.0f}"
        assert 0.6 * peak < planned < 1.5 * peak, f"{peak:.0f} MiB, planned {planned:.0f}"
