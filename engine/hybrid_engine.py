"""HybridEngine: the roles on one ZeRO engine, alternating between generation, inference and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import device_memory, dist, fetching, fused_lora, models, onednn, pointwise, zero
from engine.batch import Rollout, take_rows
from engine.config import Recipe, steps_per_iteration
from engine.ds_checks import offloads
from engine.ds_config import frozen_ds_config, read_ds_config, resolve_ds_config, with_second_shards
from engine.fetching import PhaseWeights
from engine.replica import Replica
from engine.role_config import ModelConfig, OptimizerSettings
from engine.roles import ACTOR, CRITIC, Layout, ReferenceModel, RolesModel, RolesOutput, ValueModel, named_adapters
from engine.sharded_loading import refused_together, sharded_loading

logger = dist.get_logger(__name__)


@dataclass(frozen=True)
class Schedule:
    """A role's learning rate as a pure function of its own optimizer steps.

    Args:
        settings: peak, shape and warm-up.
        total_steps: optimizer steps of the whole run in which the role learns.
    """

    settings: OptimizerSettings
    total_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0; the first warm-up step is not 0."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.learning_rate * (step + 1) / settings.warmup_steps
        span = max(1, self.total_steps - settings.warmup_steps)
        progress = min(1.0, (step - settings.warmup_steps) / span)
        shape = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * progress)).item()),
        }
        return settings.learning_rate * shape[settings.schedule]


class HybridEngine:
    """All roles on their engines: those on the shared base in one, a critic or a reference of its own in another.

    Args:
        roles: the module with its adapters, on the CPU.
        critic: with critic.home model.
        reference: with reference.home model.
    """

    def __init__(
        self,
        roles: RolesModel,
        recipe: Recipe,
        critic: ValueModel | None = None,
        reference: ReferenceModel | None = None,
    ):
        self.recipe, self.roles, self.critic = recipe, roles, critic
        settings = {ACTOR: recipe.actor.optimizer, CRITIC: recipe.critic.optimizer}
        steps = steps_per_iteration(recipe)
        learning = {ACTOR: recipe.iterations - recipe.critic.warmup_iterations, CRITIC: recipe.iterations}
        self.schedules = {role: Schedule(settings[role], steps * learning[role]) for role in settings}
        self.role_steps = dict.fromkeys(settings, 0)
        self.learning_rate_factor = 1.0
        """On the rates of all schedules: what roll-backs have made of them."""
        self.replica = Replica(roles)
        self.engine = _trained(roles, (ACTOR, CRITIC) if critic is None else (ACTOR,), recipe)
        if fused_lora.is_fused(roles):
            fused_lora.fuse(self.replica.module)  # in 16 bit the sampler must round as training does
        self.critic_engine = self.engine if critic is None else _trained(critic, (CRITIC,), recipe)
        self.reference = self.reference_logits = None
        if reference is not None:
            ahead = fetching.prefetch_elements(reference)
            config = frozen_ds_config(recipe, recipe.reference.offload_param, prefetch_elements=ahead)
            self.reference = zero.FrozenEngine(reference, config)
            if recipe.kl.estimator == "full":
                with torch.no_grad(), zero.gathered(reference.head.parameters()):
                    self.reference_logits = reference.head.whole_copy()
        self.phase_weights = self._phase_weights()

    @classmethod
    def load(cls, recipe: Recipe) -> HybridEngine:
        """Every model that the recipe's roles live in, loaded from its checkpoint.

        Raises:
            RecipeError: a checkpoint or an adapter can't be used; on every rank.
        """
        raw, dtype = read_ds_config(recipe.zero.ds_config), models.DTYPES[recipe.model.dtype]
        raw = with_second_shards(raw, dist.world_size(), zero.local_ranks())
        zero.check_dtype(dtype)
        zero.check_offload(raw)
        critic = reference = None
        with refused_together():  # before anything communicates: injecting some adapters does
            sources = named_adapters(recipe)
        with sharded_loading(raw, dtype):
            roles = RolesModel(models.load_causal(recipe.model), recipe, sources)
        if recipe.critic.home == "model":
            settings = _another(recipe.model, recipe.critic_path, quantized=recipe.critic.train == "lora")
            with sharded_loading(raw, dtype):
                critic = ValueModel(models.load_critic(settings), recipe.critic)
        if recipe.reference_home == "model":
            settings = _another(recipe.model, recipe.reference_path, quantized=True)
            with sharded_loading(frozen_ds_config(recipe, recipe.reference.offload_param), dtype):
                reference = ReferenceModel(models.load_causal(settings), recipe.generation.temperature)
        return cls(roles, recipe, critic, reference)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def ds_config(self) -> dict:
        """DeepSpeed's configuration of the shared engine, as it runs."""
        return self.engine.ds_config

    def home(self, role: str) -> RolesModel | ValueModel:
        """The module that a trained role lives in."""
        return self.critic if role == CRITIC and self.critic is not None else self.roles

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What a role trains, by name, wherever it lives."""
        return self.home(role).role_parameters(role)

    @contextmanager
    def generation(self, gather_budget_bytes: int | None = None) -> Iterator[PreTrainedModel]:
        """Inside, the actor as a plain module on every rank, without DeepSpeed's hooks. Its weights go at the end.

        No forward is a collective, unless `idle_pass` is something: then each of them is.

        Args:
            gather_budget_bytes: None: the recipe's.
        """
        try:
            budget = self._gather_budget_bytes() if gather_budget_bytes is None else gather_budget_bytes
            module = self.replica.fill(budget)
            with torch.inference_mode():
                yield module
        finally:
            self.replica.free()

    @contextmanager
    def unremembered(self) -> Iterator[None]:
        """Inside, forwards teach DeepSpeed nothing and leave nothing gathered; for before a run's first one."""
        with ExitStack() as stack:
            stack.enter_context(fetching.unremembered(self.engine.engine, self.engine.fetch_orders))
            if self.critic is not None:
                stack.enter_context(fetching.unremembered(self.critic_engine.engine, self.critic_engine.fetch_orders))
            if self.reference is not None:
                stack.enter_context(fetching.unremembered(self.reference.engine))
            yield

    @property
    def idle_pass(self) -> Callable[[], None] | None:
        """Inside `generation`, where weights are fetched in every forward: what a rank without rows calls instead."""
        return self.replica.idle_pass

    def _gather_budget_bytes(self) -> int | None:
        """How many bytes of weights stay whole while decoding, None: all. The same number on every rank (a collective).

        `auto` is what nine tenths of the free memory hold beside a full KV cache and twice the largest group: one in
        use, one in flight. The last tenth is for activations and logits.
        """
        settings = self.recipe.generation
        if self.engine.stage != 3:
            return None  # no weight is cut
        if settings.gather_budget_bytes != "auto":
            return settings.gather_budget_bytes
        rows, columns = settings.max_concurrent_sequences, self.recipe.longest_sequence
        causal, dtype = self.roles.causal, models.DTYPES[self.recipe.model.dtype]
        cache = device_memory.kv_cache_bytes(causal.config, rows, columns, dtype)
        free = device_memory.free_bytes(self.device, zero.local_ranks())
        room = free * 9 // 10 - cache - 2 * self.replica.largest_group_bytes
        if self.device.type == "cpu":
            room //= 2  # the sampler packs a copy of weights that stay: engine/onednn.py
        return max(0, int(dist.all_reduce(torch.tensor(room), "min")))

    def _phase_weights(self) -> list[PhaseWeights]:
        """Only now: a layer of an adapter is fused where its matrices are whole at all times, not for a phase."""
        keep, trained = self.recipe.zero.keep_gathered_bytes, [self.engine]
        trained += [] if self.critic is None else [self.critic_engine]
        modules = [(e.module, offloads(e.ds_config["zero_optimization"], "offload_param")) for e in trained]
        if self.reference is not None:
            modules.append((self.reference.module, self.recipe.reference.offload_param == "cpu"))
        return [zero.phase_weights(module, keep, self.device, offloaded) for module, offloaded in modules]

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside, nothing keeps a graph. Frozen weights that stayed gathered are cut again at its end."""
        try:
            with torch.no_grad():
                yield
        finally:
            for weights in self.phase_weights:
                weights.let_go()

    def forward(
        self,
        rollout: Rollout,
        rows: Tensor,
        *,
        values: bool = False,
        ref_logprobs: bool = False,
        full_kl: bool = False,
        **wanted: bool,
    ) -> RolesOutput:
        """The roles' outputs at the response tokens of some rows, `[len(rows), R]` over the rollout's full width.

        Every rank must call it equally often (ZeRO-3 fetches weights in it); a rank without rows passes none and
        computes on a made-up row that it then drops, with the graph still attached.

        Args:
            rows: int64 indices; empty is fine.
            values, ref_logprobs, full_kl: wherever the critic and the reference live.
            wanted: `logprobs`, `entropy` and `entropy_grad`, as for `RolesModel.outputs`.
        """
        layout = self._layout(rollout, rows)
        wanted |= {"values": values and self.critic is None, "full_kl": full_kl}
        # Of a reference of its own, full KL takes all logits, which the actor's head computes beside its own.
        apart = self.reference is not None and not full_kl
        if self.reference is not None and full_kl:
            wanted["reference"] = self.reference(layout, as_hidden=True), self.reference_logits
        output = self.engine(self.roles.outputs, layout, ref_logprobs=ref_logprobs and not apart, **wanted)
        if ref_logprobs and apart:
            output = replace(output, ref_logprobs=self.reference(layout))
        if values and self.critic is not None:
            output = replace(output, values=self.critic_engine(layout))
        width = rollout.response_ids.shape[1]

        def fit(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return torch.nn.functional.pad(x[: len(rows)], (0, width - x.shape[1]))

        return RolesOutput(**{name: fit(value) for name, value in vars(output).items()})

    def scores(self, role: str, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B]` scores of a reward adapter on the shared base; every rank calls it equally often."""
        with torch.no_grad():
            packed = self.recipe.ppo.packing
            return self.engine(self.roles.scores, role, ids.to(self.device), mask.to(self.device), packed)

    def _layout(self, rollout: Rollout, rows: Tensor) -> Layout:
        """Some rows, trimmed to the longest of them."""
        if len(rows) == 0:
            ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
            return Layout(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids[:, 0]))
        return Layout.of(take_rows(rollout, rows), self.device, self.recipe.ppo.packing)

    def backward(self, policy_loss: Tensor, value_loss: Tensor, last: bool) -> None:
        """The backward of a micro-batch, one per engine; `last` marks the minibatch's last one.

        Roles on one engine get one joint backward: a second one would leave stale gradients under ZeRO-3.
        """
        if self.critic is None:
            self.engine.backward(policy_loss + value_loss, last)
        else:
            self.engine.backward(policy_loss, last)
            self.critic_engine.backward(value_loss, last)

    def step(self, frozen: frozenset[str] = frozenset()) -> dict[str, float]:
        """The optimizer step of a minibatch; returns the gradient norm before clipping of each role that took it.

        In float16 a role whose gradient overflowed takes none, and its schedule waits.

        Args:
            frozen: roles that stand still: learning rate 0, and their schedule waits.

        Raises:
            FloatingPointError: a gradient is not finite; no gradient of the minibatch is left.
        """
        rates = self.learning_rates(frozen)
        if self.critic is None:
            norms = self.engine.step(rates, frozen)
        else:
            try:
                norms = self.engine.step({ACTOR: rates[ACTOR]}, frozen)
            except FloatingPointError:
                self.critic_engine.discard()
                raise
            norms |= self.critic_engine.step({CRITIC: rates[CRITIC]}, frozen)
        for role in norms:
            self.role_steps[role] += role not in frozen
        return norms

    def discard(self) -> None:
        """Drop the minibatch's gradients; nothing moves."""
        self.engine.discard()
        if self.critic is not None:
            self.critic_engine.discard()

    def learning_rates(self, frozen: frozenset[str] = frozenset()) -> dict[str, float]:
        """Each role's rate at the next optimizer step."""
        rates = {
            role: 0.0 if role in frozen else self.schedules[role].rate(step) for role, step in self.role_steps.items()
        }
        return {role: rate * self.learning_rate_factor for role, rate in rates.items()}

    def capture(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """All that training has made: by role its masters and moments, whole, and counts beside them; a collective."""
        found = {role: self._engine_of(role).capture(self.role_parameters(role)) for role in self.role_steps}
        tensors = {role: tensors for role, (tensors, _) in found.items()}
        return tensors, {role: {"schedule": self.role_steps[role], **found[role][1]} for role in found}

    def restore(self, tensors: dict[str, dict[str, Tensor]], numbers: dict) -> None:
        """Put back what `capture` gave, whole on every rank; the number of ranks and the stage may be others."""
        for role in self.role_steps:
            self._engine_of(role).restore(self.role_parameters(role), tensors[role], numbers[role])
            self.role_steps[role] = numbers[role]["schedule"]

    def _engine_of(self, role: str) -> zero.TrainedEngine:
        return self.critic_engine if role == CRITIC and self.critic is not None else self.engine

    def frozen_hash(self) -> str:
        """SHA-256 of this rank's shards of all that must never move: base, frozen adapters, a reference of its own."""
        frozen = list(self.roles.frozen_parameters().items())
        if self.critic is not None:
            frozen += self.critic.frozen_parameters().items()
        if self.reference is not None:
            frozen += self.reference.module.named_parameters()
        return zero.shards_hash(frozen)

    def close(self) -> None:
        self.engine.close()
        if self.critic is not None:
            self.critic_engine.close()
        if self.reference is not None:
            self.reference.close()


def _another(model: ModelConfig, path: str, quantized: bool) -> ModelConfig:
    """How a model beside the base is loaded: as the base is, but from its own folder."""
    changes = {"path": path, "revision": model.revision if path == model.path else None}
    return model.model_copy(update=changes if quantized else {**changes, "quantization": "none"})


def _trained(module: RolesModel | ValueModel, roles: tuple[str, ...], recipe: Recipe) -> zero.TrainedEngine:
    """A module under DeepSpeed with a parameter group for each of its trained roles."""
    settings = {ACTOR: recipe.actor.optimizer, CRITIC: recipe.critic.optimizer}
    groups = [zero.ParameterGroup(role, list(module.role_parameters(role).values()), settings[role]) for role in roles]
    if recipe.zero.activation_checkpointing:
        module.checkpoint_activations()
    ds_config = resolve_ds_config(
        read_ds_config(recipe.zero.ds_config),
        dtype=recipe.model.dtype,
        world_size=dist.world_size(),
        micro_batch=recipe.ppo.micro_batch_sequences,
        trainable_parameters=sum(zero.elements(p) for group in groups for p in group.parameters),
        largest_adapter=max(map(zero.elements, fused_lora.matrices(module)), default=0),
        prefetch_elements=fetching.prefetch_elements(module),
        local_ranks=zero.local_ranks(),
        nvme_path=recipe.zero.nvme_path,
    )
    engine = zero.TrainedEngine(module, groups, ds_config, recipe.zero.offload_activations)
    fused_lora.fuse(module, zero.stays_whole)
    onednn.take_over(module)
    pointwise.take_over(module)
    return engine
