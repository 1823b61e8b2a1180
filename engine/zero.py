"""The engine's only door to DeepSpeed: start-up, the trained engine, frozen engines, gathering.

What DeepSpeed does surprisingly, and is dealt with here, is said where it bites.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from engine import causal, device_memory, dist, onednn, optimizer_state, pointwise, progress, swap_folder, traffic
from engine.ds_checks import device_of, offloads, to_nvme
from engine.errors import RecipeError
from engine.fetching import FetchOrders, PhaseWeights, decoder_layers, kind_of
from engine.launchers import free_port
from engine.role_config import OptimizerSettings
from engine.role_steps import RoleSteps

logger = dist.get_logger(__name__)


def start(watched: bool = False) -> None:
    """Join the process group that the launcher described, or make one of a single rank; quiet DeepSpeed's chatter.

    Args:
        watched: a watchdog tells a rank that hangs from one that takes long, so collectives may wait for either.
    """
    deepspeed_logger.setLevel("ERROR")
    if dist.is_distributed():
        return
    _share_cores()
    if torch.cuda.is_available():  # before the first collective: NCCL would put every rank on device 0
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:  # a plain `python launch/train.py`
        port = str(free_port())
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    logger.info("starting DeepSpeed (the first start on a machine compiles a small operator: a minute or two)")
    with _quiet():
        deepspeed.init_distributed(verbose=False)
    _unname_shared_memory()
    traffic.watch(deepspeed.comm.comm.cdb)
    if watched:
        deepspeed.comm.comm.cdb.new_group = dist.wait_without_limit()


def _unname_shared_memory() -> None:
    """DeepSpeed's CPU operator leaves a file of 69 MB a rank in memory after every run; all ranks hold it open now."""
    dist.barrier()
    for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_{dist.rank()}"):
        with contextlib.suppress(PermissionError):  # another user's
            file.unlink(missing_ok=True)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise a RecipeError, before anything is loaded, for float16 where DeepSpeed will not train in it."""
    if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
        raise RecipeError(
            f"model.dtype float16 needs a device that computes in it, and DeepSpeed finds none here "
            f"({get_accelerator().device_name()}); set model.dtype to bfloat16 or float32"
        )


def reaches_nvme() -> bool:
    """Whether DeepSpeed's operator for NVMe can be built here."""
    with _quiet():
        return AsyncIOBuilder().is_compatible(verbose=False)


def check_offload(ds_config: dict) -> None:
    """Raise a RecipeError, before anything is loaded, for NVMe where DeepSpeed's operator for it can't be built."""
    if not to_nvme(ds_config.get("zero_optimization", {})):
        return
    if not reaches_nvme():
        raise RecipeError(
            "zero_optimization.offload_optimizer.device nvme needs libaio with its headers and a C++ compiler, and "
            "DeepSpeed finds none here; install them (apt-get install libaio-dev g++), or write cpu"
        )
    logger.info("states go to NVMe (the first start on a machine compiles an operator for that: some minutes)")


def _share_cores() -> None:
    """Give each rank of this host its share of the cores: threads that outnumber them spin, 20 times slower here."""
    ranks = local_ranks()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // ranks))


def local_ranks() -> int:
    """How many ranks the launcher started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


@dataclass(frozen=True)
class ParameterGroup:
    """What one role trains and how."""

    role: str
    parameters: list[nn.Parameter]
    settings: OptimizerSettings


class TrainedEngine:
    """A module under DeepSpeed ZeRO with one AdamW group per role.

    Args:
        module: its trainable parameters are exactly those of `groups`.
        ds_config: a resolved DeepSpeed configuration (`engine.ds_config`).
        offload_activations: keep what a forward saves for its backward in host memory.
    """

    def __init__(
        self, module: nn.Module, groups: list[ParameterGroup], ds_config: dict, offload_activations: bool = False
    ):
        listed = {id(p) for group in groups for p in group.parameters}
        trainable = {id(p) for p in module.parameters() if p.requires_grad}
        assert listed == trainable, "a trainable parameter without a group, or a frozen one in a group"
        self.ds_config, zero = ds_config, ds_config.get("zero_optimization", {})
        self.stage: int = zero.get("stage", 0)
        self.optimizer = _adamw(groups, on_cpu=offloads(zero, "offload_optimizer"))
        self.steps = RoleSteps(partitioned=self.stage > 0)
        self.steps.attach(self.optimizer)
        # In bf16 at stage 0 DeepSpeed takes a step with zero gradients while it starts up. If that counted, Adam's bias
        # correction would be one step ahead.
        self.steps.skip = True
        for experts in causal.expert_modules(module):
            deepspeed.utils.set_z3_leaf_module(experts, True)
        private, self.swap_folder = swap_folder.redirected(ds_config)
        with _quiet():
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=private)
        self.steps.skip = False
        self.fetch_orders = self._fetch_layers_together(module) if self.stage == 3 else None
        self.module = module
        self.offload_activations = offload_activations
        self.scales_loss: bool = ds_config.get("fp16", {}).get("enabled", False)
        self._kept_whole = [p for p in module.parameters() if hasattr(p, "ds_id") and stays_whole(p)]

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def _fetch_layers_together(self, module: nn.Module) -> FetchOrders:
        # Marked before DeepSpeed hooked the gradients, a layer would reduce all of its own at once at the end of its
        # backward, and with two roles it has two.
        offload = self.engine.optimizer.parameter_offload
        offload.destroy()  # its hooks
        for layer in decoder_layers(module):
            deepspeed.utils.set_z3_leaf_module(layer, True)
        offload.setup_zero_stage3_hooks()
        return FetchOrders(offload)

    def __call__(self, *args, **kwargs):
        progress.moved()
        if self.fetch_orders is not None:
            self.fetch_orders.expect(kind_of(*args, **kwargs))
        # DeepSpeed gathers these where its hooks meet them, and after a step that wasn't passed over: fused layers need
        # them always.
        missing = [p for p in self._kept_whole if not is_gathered(p)]
        if missing:
            missing[0].all_gather(missing)
        if not self.offload_activations:
            return self.engine(*args, **kwargs)
        # A checkpointed layer hides from this all but its input, which is what then waits in host memory.
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; `last` reduces them over ranks (an average: DeepSpeed's way).

        Call it once per micro-batch with the joint loss of all roles: under ZeRO-3 the first backward after a step
        overwrites gradients and later ones add, so a role that the first one missed would keep stale gradients.
        """
        progress.moved()
        self.engine.set_gradient_accumulation_boundary(last)
        if self.scales_loss and self.stage == 0:
            loss = loss * self._loss_scale()  # DeepSpeed scales it under ZeRO alone, and unscales always
        self.engine.backward(loss)
        if not last:
            self.engine.step()

    def step(self, learning_rates: dict[str, float], frozen: frozenset[str] = frozenset()) -> dict[str, float]:
        """Take the optimizer step; returns each role's gradient norm before clipping.

        In float16 an overflow makes DeepSpeed lower its loss scale and pass the step over: no norm is returned then.

        Args:
            learning_rates: by role; 0 for a frozen one.
            frozen: roles that stand still, Adam's state included.

        Raises:
            FloatingPointError: a gradient is not finite (DeepSpeed would pass over the step in silence); it is dropped.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["role"]]
        self.steps.norms, self.steps.frozen = {}, frozen
        if self.scales_loss:
            scaled_by = self._loss_scale()
            # A dynamic scale that grows in this very step grows before DeepSpeed divides the gradients by it.
            self.steps.correction = lambda: self._loss_scale() / scaled_by
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed has no type of its own for this
            if not self.scales_loss or "minimum" not in str(error):
                raise
            self.discard()
            raise FloatingPointError(f"float16 gradients overflow at the smallest loss scale: {error}") from error
        finally:
            self.steps.skip = False
        norms = dict(self.steps.norms)
        if not all(map(math.isfinite, norms.values())):  # the same numbers on every rank
            raise FloatingPointError(f"a gradient is not finite: its norm is {norms}")
        if self.scales_loss and not norms:
            return {}
        if set(norms) != set(learning_rates):
            raise FloatingPointError(f"a gradient is not finite: DeepSpeed stepped {sorted(norms) or 'no role'} alone")
        return norms

    def _loss_scale(self) -> float:
        optimizer = self.engine.optimizer
        return optimizer.loss_scale_config.cur_scale if self.stage == 0 else optimizer.loss_scale

    def discard(self) -> None:
        """Forget the gradients of the minibatch: weights, moments and step counts stay as they are."""
        self.steps.skip = True
        try:
            with optimizer_state.any_overflow(self.engine.optimizer):
                self.engine.step()
        finally:
            self.steps.skip = False

    def capture(self, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict]:
        """Masters and moments of a role's parameters, whole, and the numbers beside them; a collective."""
        at = optimizer_state.pieces(self.engine.optimizer, parameters)
        numbers = {"step": optimizer_state.steps(self.optimizer, at)}
        if self.scales_loss:
            numbers["loss_scale"] = optimizer_state.loss_scale(self.engine.optimizer)
        with optimizer_state.in_memory(self.engine.optimizer, at):
            return optimizer_state.capture(self.optimizer, parameters, at), numbers

    def restore(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], numbers: dict) -> None:
        """Put back what `capture` gave, at whatever stage and number of ranks."""
        at = optimizer_state.pieces(self.engine.optimizer, parameters)
        with optimizer_state.in_memory(self.engine.optimizer, at, changed=True):
            optimizer_state.restore(self.optimizer, parameters, at, tensors, numbers["step"])
        if self.scales_loss:
            optimizer_state.restore_loss_scale(self.engine.optimizer, numbers.get("loss_scale", {}))

    def close(self) -> None:
        """Give back hooks, buffers and what lies on a disk."""
        _destroy(self.engine)
        if self.swap_folder is not None:
            self.swap_folder.close()


class FrozenEngine:
    """A module for inference alone, sharded by ZeRO-3; `ds_config` is resolved for a model that never trains."""

    def __init__(self, module: nn.Module, ds_config: dict):
        module.requires_grad_(False)
        if device_of(ds_config["zero_optimization"], "offload_param") == get_accelerator().device_name():
            logger.warning("offload_param cpu frees nothing here: the device is the CPU itself")
        for part in [*causal.expert_modules(module), *decoder_layers(module)]:
            deepspeed.utils.set_z3_leaf_module(part, True)
        with _quiet():
            self.engine, *_ = deepspeed.initialize(model=module, config=ds_config)
        onednn.take_over(module)
        pointwise.take_over(module)
        self.module = module

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        progress.moved()
        return self.engine(*args, **kwargs)

    def close(self) -> None:
        _destroy(self.engine)


def phase_weights(
    module: nn.Module, keep_bytes: int | str, device: torch.device, offloaded: bool = False
) -> PhaseWeights:
    """What of a module's weights stays gathered for a phase; the same on every rank (a collective).

    Args:
        keep_bytes: zero.keep_gathered_bytes of the recipe.
        offloaded: their shards live in host memory, since the device has little: auto then keeps nothing.
    """
    if keep_bytes == "auto":
        free = 0 if offloaded else device_memory.free_bytes(device, local_ranks())
        keep_bytes = int(dist.all_reduce(torch.tensor(free // 10), "min"))
    return PhaseWeights(module, keep_bytes)


def _adamw(groups: list[ParameterGroup], on_cpu: bool) -> torch.optim.Optimizer:
    parameter_groups = [
        {
            "params": group.parameters,
            "role": group.role,
            "gradient_clipping": group.settings.gradient_clipping,
            "lr": 0.0,
            "betas": (group.settings.beta1, group.settings.beta2),
            "eps": group.settings.epsilon,
            "weight_decay": group.settings.weight_decay,
        }
        for group in groups
    ]
    # Offloaded states live beside the CPU: DeepSpeed asks for its vectorised CPU Adam there.
    return DeepSpeedCPUAdam(parameter_groups) if on_cpu else torch.optim.AdamW(parameter_groups)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, partitioned parameters are whole on every rank (a collective); others are left as they are."""
    # What is whole already (small parameters that DeepSpeed keeps whole) would be cut up again at the end.
    partitioned = [p for p in parameters if not is_gathered(p)]
    with deepspeed.zero.GatheredParameters(partitioned) if partitioned else contextlib.nullcontext():
        yield


class Fetch:
    """A gather of ZeRO-3 parameters that runs while something else computes (a collective, begun on creation).

    Those that are whole already, or that ZeRO-3 does not manage, are left as they are, now and at the end.
    """

    # Not under inference_mode, which the sampler runs in: DeepSpeed would give training parameters inference tensors.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.held = {id(p): p for p in parameters if not is_gathered(p)}
        self.handles = []
        for quantized in (True, False):  # DeepSpeed can keep frozen shards in 8 bit: those travel apart
            batch = [p for p in self.held.values() if hasattr(p.ds_tensor, "ds_quant_scale") == quantized]
            if batch:
                self.handles.append(batch[0].all_gather_coalesced(batch, quantize=quantized))

    @torch.inference_mode(False)
    @torch.no_grad()
    def wait(self) -> None:
        """Until every parameter is whole."""
        while self.handles:
            self.handles.pop(0).wait()

    @torch.inference_mode(False)
    @torch.no_grad()
    def release(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Cut some of the parameters again, or all; a tensor that somebody took from one lives on with him."""
        self.wait()
        wanted = list(self.held) if parameters is None else [id(p) for p in parameters if id(p) in self.held]
        for key in wanted:
            self.held.pop(key).partition()


def elements(parameter: nn.Parameter) -> int:
    """How many numbers the whole parameter has, sharded or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_gathered(parameter: nn.Parameter) -> bool:
    """Whether a ZeRO-3 parameter holds its whole tensor now; True for parameters that ZeRO-3 does not manage."""
    return not hasattr(parameter, "ds_id") or parameter.ds_status == ZeroParamStatus.AVAILABLE


def stays_whole(parameter: nn.Parameter) -> bool:
    """Whether every rank holds the whole parameter between steps: below ZeRO-3, or under its persistence threshold."""
    return not hasattr(parameter, "ds_id") or parameter.ds_persist


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this rank keeps of a parameter: its ZeRO-3 shard, or all of it."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data


def shards_hash(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 over the bytes of this rank's shards, in the order given."""
    digest = hashlib.sha256()
    for name, parameter in named_parameters:
        digest.update(name.encode())
        digest.update(local_shard(parameter).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _quiet() -> contextlib.AbstractContextManager:
    """Silence what libraries print at start-up (DeepSpeed's op loader writes to stdout)."""
    verbose = os.environ.get("ALTERNATOR_VERBOSE")
    return contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO())


def _destroy(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give back hooks and buffers, and what DeepSpeed goes on naming: all of the engine would stay alive with it."""
    engine.destroy()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # by module, without a limit
    named = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
    named[:] = [module for module in named if module is not engine.module]
