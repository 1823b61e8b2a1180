"""The mutants: one deliberate bug each, and the tests that must notice it. `tests/mutants.py` runs them.

To add one, add a row: copy a piece of the source that occurs once in its file, write the bug beside it, name the tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One replacement in one file."""

    name: str
    """Short, unique, for --only."""
    file: str
    """Path from the repository's root."""
    old: str
    """Exact text, which occurs exactly once in the file."""
    new: str
    """What stands there instead."""
    breaks: str
    """What is wrong then, in a few words."""
    tests: tuple[str, ...]
    """pytest files or node ids; at least one of their tests must fail."""
    short: bool = False
    """Killed in a few seconds in a single process: part of --short."""
    exit_codes: tuple[int, ...] = (1,)
    """pytest exit codes that count as killed. 1: a test failed; 2, a collection error, only where that is the point."""
    timeout_seconds: float = 600
    """A mutant that runs longer counts as broken."""


def ppo(name: str, old: str, new: str, breaks: str, test: str = "") -> Mutant:
    """A mutant of engine/ppo.py; `test`: the class that must notice, where the symmetries, which come first, do too."""
    node = f"tests/test_ppo.py::{test}" if test else "tests/test_ppo.py"
    return Mutant(name, "engine/ppo.py", old, new, breaks, (node,), short=True)


MUTANTS = [
    # --- engine/ppo.py: masks, means, whitening
    ppo("padding-leaks", "torch.where(mask.bool(), _wide(x), 0)", "_wide(x)", "padding is read as if it were tokens"),
    ppo(
        "padding-times-zero",
        "torch.where(mask.bool(), _wide(x), 0)",
        "_wide(x) * mask",
        "nan and inf survive under the mask (0 * nan)",
    ),
    ppo("float16-inside", "torch.promote_types(x.dtype, torch.float32)", "x.dtype", "16-bit inputs stay 16 bit"),
    ppo(
        "mean-over-padding",
        "(mask.count_nonzero().clamp(min=1) if",
        "(mask.numel() if",
        "means divide by padding too",
        "TestMeansAndWhitening",
    ),
    ppo(
        "mean-of-row-means",
        "return masked_sum(x, mask) / (mask.count_nonzero().clamp(min=1) if denominator is None else denominator)",
        "return torch.stack([_real(m, r)[0].sum() / m.sum().clamp(min=1) for r, m in zip(x, mask)]).mean()",
        "each row weighs the same, however short",
        "TestMeansAndWhitening",
    ),
    ppo(
        "empty-mask-nan",
        "mask.count_nonzero().clamp(min=1) if",
        "mask.count_nonzero() if",
        "an empty mask gives nan",
    ),
    ppo(
        "denominator-ignored",
        "if denominator is None else denominator)",
        "if True else denominator)",
        "losses are local means: the split into micro-batches shows",
    ),
    ppo(
        "shape-unchecked",
        "if x.shape != mask.shape:",
        "if False:",
        "a tensor of another shape is broadcast against the mask",
    ),
    ppo(
        "whiten-unbiased",
        "var = masked_mean((x - mean).square(), mask) if",
        "var = masked_sum((x - mean).square(), mask) / (mask.sum() - 1).clamp(min=1) if",
        "sample variance, not population variance",
    ),
    ppo("whiten-epsilon-outside", "/ (var + 1e-8) ** 0.5", "/ (var**0.5 + 1e-8)", "epsilon is added to the deviation"),
    ppo("whiten-padding", "(whitened,) = _real(mask, (", "(whitened,) = ((", "whitened padding is -mean / std, not 0"),
    ppo("whiten-adds-mean-back", "** 0.5)\n    return whitened", "** 0.5 + mean)\n    return whitened", "mean isn't 0"),
    # --- engine/ppo.py: KL
    ppo("kl-sign", "d = _wide(logprobs) - _wide(ref_logprobs)", "d = _wide(ref_logprobs) - _wide(logprobs)", "log q/p"),
    ppo("k3-direction", "torch.expm1(-d) + d", "torch.expm1(d) - d", "k3 of the other direction"),
    ppo("k3-rounded", "torch.expm1(-d) + d", "(-d).exp() - 1 + d", "a small KL is lost in rounding"),
    ppo("k2-factor", "return d.square() / 2", "return d.square()", "k2 without its 1/2: twice the gradient"),
    ppo("full-kl-direction", "p = logp.exp()\n    return (p *", "p = logq.exp()\n    return (p *", "q weighs, not p"),
    ppo(
        "full-kl-impossible-tokens",
        "torch.where(p > 0, logp - logq, 0)",
        "(logp - logq)",
        "a token impossible under both policies gives nan",
    ),
    ppo("entropy-sign", "return -(p *", "return (p *", "the entropy bonus becomes a penalty"),
    ppo(
        "kl-loss-unweighted",
        "_loss_and_stats(weight * kl_estimate(",
        "_loss_and_stats(kl_estimate(",
        "wrong KL gradient from the second optimizer step on",
        "TestKLGradients",
    ),
    ppo(
        "kl-loss-weight-attached",
        "(logprobs - old_logprobs).exp().detach()",
        "(logprobs - old_logprobs).exp()",
        "the weight is differentiated too",
        "TestKLGradients",
    ),
    # --- engine/ppo.py: rewards and GAE
    ppo(
        "kl-rewarded",
        "0) - kl_coef * kl",
        "0) + kl_coef * kl",
        "distance from the reference is rewarded",
        "TestTokenRewards",
    ),
    ppo(
        "score-on-last-column",
        "== lengths[:, None] - 1",
        "== mask.shape[1] - 1",
        "the score of a short response lands on padding",
        "TestTokenRewards",
    ),
    ppo(
        "score-one-late",
        "== lengths[:, None] - 1",
        "== lengths[:, None]",
        "the score lands one token late",
        "TestTokenRewards",
    ),
    ppo(
        "score-everywhere",
        "torch.where(is_last, scores[:, None], 0)",
        "scores[:, None]",
        "every token is scored",
        "TestTokenRewards",
    ),
    ppo(
        "mask-hole-accepted",
        "if (mask[:, 1:] & ~mask[:, :-1]).any():",
        "if False:",
        "a mask with a hole gives wrong advantages in silence",
    ),
    ppo(
        "value-one-late",
        "pad(values[:, 1:], (0, 1))",
        "pad(values[:, 2:], (0, 2))[:, : mask.shape[1]]",
        "V_{t+2} instead of V_{t+1}",
        "TestGAE",
    ),
    ppo("value-not-shifted", "pad(values[:, 1:], (0, 1))", "values", "V_t instead of V_{t+1}"),
    ppo(
        "gae-forgets-mask",
        "rewards, values = _real(mask, rewards, values)",
        "rewards, values = _wide(rewards), _wide(values)",
        "padding bootstraps the last token",
        "TestGAE",
    ),
    ppo(
        "gae-bootstraps-the-end",
        "pad(values[:, 1:], (0, 1))",
        "torch.where(mask.bool() & ~pad(mask[:, 1:].bool(), (0, 1)), values, pad(values[:, 1:], (0, 1)))",
        "V past the last token is the last V, not 0",
    ),
    ppo("gae-no-lambda", "gamma * gae_lambda * following", "gamma * following", "lambda is taken for 1"),
    ppo("gae-no-gamma", "gamma * gae_lambda * following", "gae_lambda * following", "gamma is dropped from the sum"),
    ppo("delta-no-gamma", "rewards + gamma * next_values", "rewards + next_values", "gamma is dropped from delta"),
    ppo(
        "returns-whitened",
        "return advantages, advantages + values",
        "return advantages, masked_whiten(advantages, mask) + values",
        "the critic learns from whitened advantages",
    ),
    ppo(
        "returns-are-rewards",
        "return advantages, advantages + values",
        "return advantages, rewards",
        "the critic learns the reward of one token",
    ),
    # --- engine/ppo.py: policy loss
    ppo(
        "clip-dropped",
        "losses = torch.maximum(unclipped, bounded)\n    dual",
        "losses = unclipped\n    dual",
        "no clip",
    ),
    ppo(
        "min-for-max",
        "losses = torch.maximum(unclipped, bounded)\n    dual",
        "losses = torch.minimum(unclipped, bounded)\n    dual",
        "the optimistic bound",
    ),
    ppo("clip-one-sided", "ratio.clamp(1 - clip_ratio, 1 + clip_ratio)", "ratio.clamp(max=1 + clip_ratio)", "no floor"),
    ppo(
        "ratio-inverted",
        "log_ratio = logprobs - old_logprobs",
        "log_ratio = old_logprobs - logprobs",
        "old / new",
        "TestPolicyLoss",
    ),
    ppo(
        "advantage-sign",
        "unclipped = -advantages * ratio",
        "unclipped = advantages * ratio",
        "worse is better",
        "TestPolicyLoss",
    ),
    ppo("dual-clip-dropped", "if dual_clip is not None:\n", "if False:\n", "dual_clip does nothing"),
    ppo(
        "dual-clip-of-good-tokens",
        "(advantages < 0) & (losses > ceiling)",
        "losses > ceiling",
        "good tokens get the bound of bad ones, and no gradient",
    ),
    ppo(
        "overflow-hidden",
        "losses = losses + 0 * ratio.detach()",
        "",
        "a ratio that overflowed leaves a finite loss with nan gradients",
    ),
    ppo(
        "clipped-counts-ties",
        "(bounded > unclipped).sum()",
        "(bounded >= unclipped).sum()",
        "clip fraction near 1",
        "TestPolicyLoss",
    ),
    ppo(
        "approx-kl-is-k1",
        "(torch.expm1(log_ratio) - log_ratio).sum()",
        "(-log_ratio).sum()",
        "a signed estimate: the KL stop sees noise",
    ),
    ppo("approx-kl-rounded", "torch.expm1(log_ratio)", "(ratio - 1)", "a small approx_kl is lost in rounding"),
    ppo("deviation-signed", "(ratio - 1).abs()", "(ratio - 1)", "a ratio below 1 goes unseen"),
    ppo("stats-attached", "{name: value.detach() for name, value in stats.items()}", "stats", "stats keep the graph"),
    # --- engine/ppo.py: value loss, controller, explained variance
    ppo(
        "value-clip-dropped",
        "losses = torch.maximum(unclipped, bounded)\n    return",
        "losses = unclipped\n    return",
        "value_clip does nothing",
        "TestValueLoss",
    ),
    ppo(
        "value-min-for-max",
        "losses = torch.maximum(unclipped, bounded)\n    return",
        "losses = torch.minimum(unclipped, bounded)\n    return",
        "the smaller error counts",
    ),
    ppo(
        "value-half-dropped",
        "losses = unclipped = 0.5 * (values",
        "losses = unclipped = (values",
        "the unclipped term without its 1/2",
    ),
    ppo(
        "value-clip-around-return",
        "values.clamp(old_values - value_clip, old_values + value_clip)",
        "values.clamp(returns - value_clip, returns + value_clip)",
        "clipped around the target, not the old value",
        "TestValueLoss",
    ),
    ppo(
        "controller-unclipped",
        "min(max(kl_per_sequence / target - 1, -0.2), 0.2)",
        "kl_per_sequence / target - 1",
        "leaps",
    ),
    ppo("controller-sign", "(1 + error * sequences", "(1 - error * sequences", "drives the KL away from its target"),
    ppo(
        "controller-hides-nan",
        "min(max(kl_per_sequence / target - 1, -0.2), 0.2)",
        "min(0.2, max(-0.2, kl_per_sequence / target - 1))",
        "a nan KL counts as a small one",
    ),
    ppo("controller-negative", "if sequences >= 5 * horizon:", "if False:", "kl_coef can turn negative"),
    ppo("explained-variance-mse", "(x - masked_mean(x, mask)).square()", "x.square()", "a constant error counts"),
    ppo(
        "explained-variance-constant",
        "torch.where(total == 0, 0,",
        "torch.where(total < 0, 0,",
        "1 where R is constant",
        "TestExplainedVariance",
    ),
    ppo(
        "explained-variance-float32",
        "_real(mask, values.double(), returns.double())",
        "_real(mask, values, returns)",
        "rounding noise over rounding noise where R is constant",
    ),
]

PHASES, LAYOUTS, ROLES = "tests/test_phases.py", "tests/test_hybrid_engine.py", "tests/test_roles.py"

MUTANTS += [
    # --- one process: sampling, roles, scores, minibatches, data
    Mutant(
        "sampling-without-key",
        "engine/rollout.py",
        "generator(seed, stream, int(d), int(s))",
        "generator(seed, stream)",
        "every prompt draws the same random numbers",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "sampling-stream-ignored",
        "engine/randomness.py",
        "key=[seed, stream]",
        "key=[seed, 0]",
        "held-out sampling repeats training's random numbers",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "finished-goes-on",
        "engine/rollout.py",
        "alive &= ~done",
        "alive &= torch.ones_like(done)",
        "a response is written on after its end token",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "response-mask-from-ids",
        "engine/batch.py",
        "return length_mask(self.response_lengths, self.response_ids.shape[1])",
        "return self.response_ids != 0",
        "ids != pad: an end token equal to the padding vanishes",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "positions-count-padding",
        "engine/rollout.py",
        "positions = (mask.long().cumsum(1) - 1).clamp(min=0)",
        "positions = torch.arange(longest).expand(len(rows), -1)",
        "decoding depends on the padding",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "nucleus-drops-the-boundary",
        "engine/rollout.py",
        "before = ordered.cumsum(-1) - ordered",
        "before = ordered.cumsum(-1)",
        "top-p leaves out the token that reaches p",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "logprobs-of-the-nucleus",
        "engine/rollout.py",
        "return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)",
        "return tokens, allowed.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1) + 0.1",
        "log-probs are not those of the full softmax",
        ("tests/test_rollout.py",),
        short=True,
    ),
    Mutant(
        "critic-reads-one-late",
        "engine/roles.py",
        "trunk[:, -layout.response_width - 1 : -1]",
        "trunk[:, -layout.response_width :]",
        "V_t is read after the action that it should judge",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "logprob-one-late",
        "engine/roles.py",
        "output.logits[:, :-1]",
        "output.logits[:, 1:]",
        "the logits that predict the next token score this one",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "reference-keeps-the-adapter",
        "engine/roles.py",
        "self.acting_as(REFERENCE)",
        "self.acting_as(ACTOR)",
        "the KL to the reference is always 0",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "critic-reads-the-actor",
        "engine/roles.py",
        "with self.acting_as(CRITIC):",
        "with self.acting_as(ACTOR):",
        "values come from the actor's adapter",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "missing-requires-grad",
        "engine/roles.py",
        "parameter.requires_grad_(adapter)",
        "parameter.requires_grad_(adapter and f'.{ACTOR}.' in name)",
        "the critic's adapter never learns",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "role-positions-count-padding",
        "engine/roles.py",
        "return (self.mask.long().cumsum(1) - 1).clamp(min=0)",
        "return torch.arange(self.mask.shape[1]).expand_as(self.mask)",
        "padding shifts a sequence's positions",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "temperature-forgotten",
        "engine/roles.py",
        "float() / self.temperature",
        "float()",
        "the policy that trains is not the one that samples",
        (ROLES,),
        short=True,
    ),
    Mutant(
        "score-by-ids",
        "engine/scoring.py",
        "hidden[rows, last_positions(mask)]",
        "hidden[rows, last_positions(input_ids != model.config.pad_token_id)]",
        "ids != pad: the reward never sees the end token",
        ("tests/test_scoring.py",),
        short=True,
    ),
    Mutant(
        "whiten-per-rank",
        "engine/advantages.py",
        "advantages = ppo.masked_whiten(advantages, mask)",
        "advantages = torch.cat([ppo.masked_whiten(a, m) for a, m in zip(advantages.chunk(2), mask.chunk(2))])",
        "each rank whitens by its own rows",
        ("tests/test_advantages.py",),
        short=True,
    ),
    Mutant(
        "kl-in-reward-and-loss",
        "engine/advantages.py",
        'kl_coef if recipe.kl.placement == "reward" else 0.0',
        "kl_coef",
        "the KL is paid twice",
        ("tests/test_advantages.py",),
        short=True,
    ),
    Mutant(
        "minibatches-of-the-rank",
        "engine/minibatches.py",
        "generator(seed, Stream.MINIBATCHES, iteration, epoch)",
        "generator(seed, Stream.MINIBATCHES, iteration, 0)",
        "every epoch has the same minibatches",
        ("tests/test_minibatches.py",),
        short=True,
    ),
    Mutant(
        "second-bos",
        "engine/prompts.py",
        "ids = tokenizer(texts, add_special_tokens=False)",
        "ids = tokenizer(texts, add_special_tokens=True)",
        "a chat prompt starts with two BOS tokens",
        ("tests/test_prompts.py",),
        short=True,
    ),
    Mutant(
        "typos-allowed",
        "engine/config.py",
        'extra="forbid"',
        'extra="ignore"',
        "a misspelt recipe key is passed over in silence",
        ("tests/test_config.py",),
        short=True,
    ),
    # --- two processes under DeepSpeed
    Mutant(
        "stale-gradients",
        "engine/update.py",
        "loss = policy + settings.value_coef * value",
        # In 0.19.8 two backwards of ONE forward are right: DeepSpeed moves its micro-step at the next forward.
        "engine.backward(policy, last=False); output = engine.forward(experience.rollout, rows, values=True); "
        "loss = settings.value_coef * ppo.value_loss("
        "output.values, old_values, returns, mask, settings.value_clip, denominator)[0]",
        "a forward and backward for each role: ZeRO-3 keeps stale gradients",
        (f"{LAYOUTS}::test_two_ranks_at_every_stage_make_the_plain_update[zero3-adapter]",),
    ),
    Mutant(
        "checkpoint-without-role",
        "engine/roles.py",
        "return nullcontext(), self.acting_as(self._role)",
        "return nullcontext(), nullcontext()",
        "activations are recomputed with the role of the moment",
        (f"{LAYOUTS}::test_cutting_and_recomputing_change_nothing",),
    ),
    Mutant(
        "local-denominator",
        "engine/update.py",
        "denominator = tokens / dist.world_size()",
        "denominator = tokens",
        "gradients shrink with the number of ranks",
        (f"{LAYOUTS}::test_two_ranks_at_every_stage_make_the_plain_update",),
    ),
    Mutant(
        "norm-of-a-shard",
        "engine/zero.py",
        "square = dist.all_reduce(square)",
        "square = square",
        "each rank clips by the norm of its own shard",
        (f"{LAYOUTS}::test_two_ranks_at_every_stage_make_the_plain_update",),
    ),
    Mutant(
        "clipping-forgotten",
        "engine/zero.py",
        "if limit and norm > limit:",
        "if False:",
        "gradients are never clipped",
        (f"{LAYOUTS}::test_two_ranks_at_every_stage_make_the_plain_update",),
    ),
    Mutant(
        "discard-by-zeroing",
        "engine/zero.py",
        "parameter.grad = None",
        "parameter.grad.zero_()",
        "a minibatch that the KL stop passed over still decays weights and moves by momentum",
        (f"{PHASES}::test_kl_stop_skips_the_rest_and_leaves_no_trace",),
    ),
    Mutant(
        "frozen-by-zero-loss-alone",
        "engine/hybrid_engine.py",
        "role: 0.0 if role in frozen else self.schedules[role].rate(step)",
        "role: self.schedules[role].rate(step)",
        "a frozen actor moves by weight decay",
        (f"{PHASES}::test_critic_warmup_freezes_the_actor_to_the_byte",),
    ),
    Mutant(
        "sampler-without-adapter",
        "engine/replica.py",
        "return self.tensor.data + self.layer.get_delta_weight(ACTOR)",
        "return self.tensor.data.clone()",
        "the base samples, not the actor",
        (f"{PHASES}::test_first_ratio_is_one",),
    ),
    Mutant(
        "replica-kept",
        "engine/hybrid_engine.py",
        "self.replica.free()",
        "pass",
        "generation keeps the whole policy in memory",
        (f"{PHASES}::test_generation_gives_its_memory_back",),
    ),
    Mutant(
        "non-finite-passed-over",
        "engine/update.py",
        "if not all(map(math.isfinite, minibatch.values())):",
        "if False:",
        "training goes on after a loss that is not a number",
        (f"{PHASES}::test_a_loss_that_is_not_finite_stops_before_the_step",),
    ),
    Mutant(
        "export-of-a-shard",
        "engine/checkpoint.py",
        "zero.gathered(parameters.values())",
        "zero.gathered([])",
        "ZeRO-3 exports empty tensors",
        ("tests/test_checkpoint.py",),
    ),
    Mutant(
        "silent-rank",
        "engine/dist.py",
        "if text is not None:",
        "if text is not None and index == rank():",
        "the other ranks wait for the one that failed",
        ("tests/test_reward_sources.py",),
        timeout_seconds=900,
    ),
    Mutant(
        "startup-step-counts",
        "engine/zero.py",
        "self.steps.skip = True\n        with _quiet():",
        "with _quiet():",
        "in bf16 at stage 0 DeepSpeed's start-up takes Adam's first step",
        (f"{PHASES}::test_bfloat16_steps_alike_at_every_stage",),
    ),
    Mutant(
        "waiting-counts",
        "engine/zero.py",
        'optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"] * 0',
        "pass",
        "Adam's count runs while a role is frozen",
        (f"{PHASES}::test_an_actor_that_waited_steps_like_one_that_did_not",),
    ),
    Mutant(
        "random-head",
        "engine/models.py",
        'if found["missing_keys"]:',
        "if False:",
        "weights that the checkpoint lacks start at random, in silence",
        ("tests/test_train.py::test_a_checkpoint_that_lacks_weights_is_refused",),
    ),
    Mutant(
        "run-overwritten",
        "engine/run_folder.py",
        '.open("x", encoding="utf-8")',
        '.open("w", encoding="utf-8")',
        "of two runs that start together the later writes over the earlier",
        ("tests/test_train.py::test_a_run_that_came_in_between_is_not_overwritten",),
    ),
]
