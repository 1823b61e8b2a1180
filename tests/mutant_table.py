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
