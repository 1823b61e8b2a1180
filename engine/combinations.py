"""Which settings go together: homes, training modes and number formats that would not work side by side.

Each rule says what was asked, why it can't be, and what to set instead.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import Recipe
    from engine.role_config import LoraSettings


def problems_of(recipe: Recipe) -> list[str]:
    """What the recipe combines that can't be, whatever the files and the ZeRO stage."""
    return [
        *_sizes(recipe),
        *_old_logprobs(recipe),
        *_full_actor(recipe),
        *_adapters(recipe),
        *_critic(recipe),
        *_reference(recipe),
        *_numbers(recipe),
        *_generation(recipe),
        *_memory(recipe),
        *_failures(recipe),
    ]


def problems_at_stage(recipe: Recipe, stage: int) -> list[str]:
    """What the recipe asks for that the ZeRO stage of its ds_config can't do."""
    problems = []
    if stage == 3 and recipe.model.quantization == "int8":
        problems.append(
            "model.quantization int8 needs ZeRO stage 0 to 2, got stage 3: every rank would keep the whole int8 weight "
            "beside its shard; set model.quantization to nf4, or zero.ds_config to ds_configs/zero2.json"
        )
    for role, lora in _trained_adapters(recipe).items():
        if lora.dora:
            problems += dora_problems(f"{role}.lora.dora true", recipe.model.quantization, stage)
    return problems


def dora_problems(said: str, quantization: str, stage: int) -> list[str]:
    """Whether DoRA works over a quantized base, asked for by a recipe or by the folder of an adapter.

    In every forward peft unpacks the base's weight and puts another parameter in its place (on the CPU), without what
    bitsandbytes kept on an int8 weight and what DeepSpeed kept on a shard.
    """
    if quantization == "int8":
        remedy = "set model.quantization to nf4 at ZeRO stage 0 to 2, or use plain LoRA"
    elif quantization == "nf4" and stage == 3:
        remedy = "set zero.ds_config to ds_configs/zero2.json, or use plain LoRA"
    else:
        return []
    return [
        f"{said} replaces the weights that it reads, which neither int8 nor ZeRO-3's shards of nf4 survive, got "
        f"model.quantization {quantization} at stage {stage}; {remedy}"
    ]


def _sizes(recipe: Recipe) -> list[str]:
    sequences = recipe.data.sequences_per_iteration
    problems = []
    if recipe.ppo.minibatch_sequences > sequences:
        problems.append(
            "a minibatch may not exceed the iteration, got ppo.minibatch_sequences "
            f"{recipe.ppo.minibatch_sequences} > {sequences} = data.prompts_per_iteration "
            f"{recipe.data.prompts_per_iteration} * data.samples_per_prompt {recipe.data.samples_per_prompt}; "
            "lower the first or raise one of the others"
        )
    if recipe.critic.warmup_iterations >= recipe.iterations:
        problems.append(
            f"critic warm-up must end within the run, got critic.warmup_iterations {recipe.critic.warmup_iterations} "
            f">= iterations {recipe.iterations}; lower the first or raise the second"
        )
    if recipe.kl.target is not None and sequences >= 5 * recipe.kl.horizon:
        problems.append(
            f"kl.horizon must be above a fifth of an iteration's {sequences} sequences, got {recipe.kl.horizon}: the "
            "controller could turn kl_coef negative; raise it"
        )
    counts = Counter(reward.label for reward in recipe.rewards)
    problems += [
        f"rewards need distinct names, got {label!r} {count} times; give each a name: of its own"
        for label, count in counts.items()
        if count > 1
    ]
    return problems


def _old_logprobs(recipe: Recipe) -> list[str]:
    """Without the pass before the update there are the sampler's log-probs alone."""
    settings, kl, problems = recipe.ppo, recipe.kl, []
    if settings.old_logprobs == "recompute":
        return problems
    said = f"got ppo.old_logprobs {settings.old_logprobs}"
    if settings.importance_cap is not None:
        problems.append(
            "ppo.importance_cap weighs the sampler's tokens by recomputed log-probs, got ppo.importance_cap "
            f"{settings.importance_cap:g} with ppo.old_logprobs {settings.old_logprobs}; set ppo.old_logprobs to "
            "recompute, or ppo.importance_cap to null"
        )
    if kl.placement == "reward" and kl.estimator == "full":
        problems.append(
            f"kl.estimator full in the reward needs the policy's whole distribution before the update, {said}; set "
            "ppo.old_logprobs to recompute, or kl.estimator to k1"
        )
    if settings.old_logprobs == "on_policy":
        problems += _on_policy(recipe)
    return problems


def _on_policy(recipe: Recipe) -> list[str]:
    """The policy of the update is the one that sampled: nothing may move, or be wanted, in between."""
    settings, kl, said = recipe.ppo, recipe.kl, "ppo.old_logprobs on_policy"
    sequences = recipe.data.sequences_per_iteration
    problems = []
    if settings.epochs > 1 or settings.minibatch_sequences < sequences:
        problems.append(
            f"{said} needs one optimizer step per iteration, got ppo.epochs {settings.epochs} and "
            f"ppo.minibatch_sequences {settings.minibatch_sequences} of {sequences} sequences; set them to 1 and "
            f"{sequences}, or ppo.old_logprobs to rollout"
        )
    if kl.placement == "reward" and kl.kl_coef:
        problems.append(
            f"{said} knows the policy's log-probs in the update alone, too late for a KL in the reward, got kl.kl_coef "
            f"{kl.kl_coef:g}; set kl.placement to loss, kl.kl_coef to 0, or ppo.old_logprobs to rollout"
        )
    if settings.target_kl is not None:
        problems.append(
            f"{said} has one step to an iteration and none to skip after it, got ppo.target_kl "
            f"{settings.target_kl:g}; set it to null, or ppo.old_logprobs to recompute"
        )
    return problems


def _full_actor(recipe: Recipe) -> list[str]:
    if recipe.actor.train == "lora":
        return []
    moves = "actor.train full moves every weight of the base"
    problems = []
    if recipe.reference_home != "model":
        problems.append(
            f"{moves}, so the base can't be the reference, got reference.home {recipe.reference.home or 'null'}; set "
            "reference.home to model (a frozen copy of model.path), or actor.train to lora"
        )
    if recipe.critic.home == "adapter":
        problems.append(
            f"{moves}, so no critic's adapter can sit on it, got critic.home adapter; set critic.home to trunk or "
            "model, or actor.train to lora"
        )
    if recipe.actor.init_adapter is not None:
        problems.append(
            f"{moves} and has no adapter, got actor.init_adapter {recipe.actor.init_adapter}; merge it into the model, "
            "or set actor.train to lora"
        )
    if recipe.model.quantization != "none":
        problems.append(
            f"actor.train full trains every weight, got model.quantization {recipe.model.quantization}, which has no "
            "gradient; set model.quantization to none, or actor.train to lora"
        )
    problems += [
        f"{moves}, so no reward adapter can sit on it, got rewards.adapter {reward.adapter}; merge it into a model of "
        "its own (rewards.model), or set actor.train to lora"
        for reward in recipe.rewards
        if reward.adapter
    ]
    return problems


def _trained_adapters(recipe: Recipe) -> dict[str, LoraSettings]:
    """The settings of the adapters that start from nothing, by role."""
    found = {}
    if recipe.actor.train == "lora" and recipe.actor.init_adapter is None:
        found["actor"] = recipe.actor.lora
    if recipe.critic.home == "adapter" or (recipe.critic.home == "model" and recipe.critic.train == "lora"):
        found["critic"] = recipe.critic.lora
    return found


def _adapters(recipe: Recipe) -> list[str]:
    problems = []
    for role, lora in _trained_adapters(recipe).items():
        targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
        twice = [name for name in targets if name in lora.modules_to_save]
        if twice:
            problems.append(
                f"{role}.lora trains a module whole or by an update, not both, got {', '.join(twice)} in targets and "
                "in modules_to_save; remove it from one of them"
            )
    return problems


def _critic(recipe: Recipe) -> list[str]:
    critic, problems = recipe.critic, []
    if critic.trunk_detach and critic.home != "trunk":
        problems.append(
            f"critic.trunk_detach needs home trunk, got critic.home {critic.home}; set critic.home to trunk or "
            "critic.trunk_detach to false"
        )
    for name, given in (("path", critic.path is not None), ("train", critic.train != "lora")):
        if given and critic.home != "model":
            problems.append(
                f"critic.{name} needs home model, got critic.{name} {getattr(critic, name)} with critic.home "
                f"{critic.home}; set critic.home to model, or remove critic.{name}"
            )
    return problems


def _reference(recipe: Recipe) -> list[str]:
    reference, home = recipe.reference, recipe.reference_home
    problems = []
    if home == "base" and reference.path is not None:
        problems.append(
            f"reference.path needs a home of its own, got {reference.path} with reference.home base; set "
            "reference.home to adapter or model, or remove reference.path"
        )
    if home == "adapter" and recipe.reference_path is None:
        problems.append(
            "reference.home adapter needs a folder, got neither reference.path nor actor.init_adapter; set one of them"
        )
    if home != "model" and reference.offload_param != "none":
        problems.append(
            f"reference.offload_param {reference.offload_param} needs a model of its own, got reference.home {home}; "
            "set reference.home to model, or reference.offload_param to none"
        )
    return problems


def _numbers(recipe: Recipe) -> list[str]:
    model, problems = recipe.model, []
    kernel = model.attn_implementation or ""
    if kernel.startswith("flash_attention") and model.dtype == "float32":
        problems.append(
            f"model.attn_implementation {kernel} computes in 16 bit alone, got model.dtype float32; set model.dtype to "
            "bfloat16, or model.attn_implementation to sdpa"
        )
    if model.quantization == "int8" and recipe.reference_home == "model":
        problems.append(
            "reference.home model is sharded as at ZeRO stage 3, got model.quantization int8: every rank would keep "
            "the whole int8 weight beside its shard; set model.quantization to nf4, or reference.home to base or "
            "adapter"
        )
    return problems


def _generation(recipe: Recipe) -> list[str]:
    budget = recipe.generation.gather_budget_bytes
    if recipe.generation.compile and budget != "auto":
        return [
            "generation.compile needs weights that stay where they are, got generation.gather_budget_bytes "
            f"{budget}: beyond it they are fetched in every step; set that to auto, or generation.compile to false"
        ]
    return []


def _memory(recipe: Recipe) -> list[str]:
    if recipe.zero.offload_activations and not recipe.zero.activation_checkpointing:
        return [
            "zero.offload_activations moves what activation checkpointing saves, got zero.offload_activations true "
            "with zero.activation_checkpointing false; set the second to true, or the first to false"
        ]
    return []


def _failures(recipe: Recipe) -> list[str]:
    failures, checkpoint, kl, problems = recipe.failures, recipe.checkpoint, recipe.kl, []
    if failures.kl_abort is not None and kl.target is not None and failures.kl_abort <= kl.target:
        problems.append(
            f"failures.kl_abort must lie above the KL that the controller steers to, got {failures.kl_abort:g} with "
            f"kl.target {kl.target:g}; raise the first or lower the second"
        )
    if failures.on_divergence != "roll_back":
        return problems
    if not checkpoint.every_iterations and not checkpoint.every_minutes:
        problems.append(
            "failures.on_divergence roll_back goes back to a checkpoint, got checkpoint.every_iterations 0 with "
            "checkpoint.every_minutes 0; set one of them, or failures.on_divergence to stop"
        )
    if checkpoint.keep_last < 2:
        problems.append(
            "failures.on_divergence roll_back needs the checkpoint before the last, whose weights may be those that "
            f"diverged, got checkpoint.keep_last {checkpoint.keep_last}; set it to 2 or more, or "
            "failures.on_divergence to stop"
        )
    return problems
