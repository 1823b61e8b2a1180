"""The mathematics of PPO: pure functions of tensors, importing torch alone.

Shapes: `[B, T]` is B sequences by T response positions, V is the vocabulary. A mask is True on real tokens.

Four rules hold everywhere. Arithmetic is in float32 or better (float64 stays float64, and results keep that type). A
masked position may hold anything, inf and nan included: it is replaced by 0 BEFORE any arithmetic, because a 0 applied
afterwards would still meet nan in the backward pass (0 * nan); so it changes nothing, comes out 0 and gets gradient 0.
An empty mask gives 0. And a non-finite value at a real token is never repaired: it reaches the loss or (a log-prob of
-inf, whose ratio is 0) `approx_kl_sum`, for the trainer to see.

Statistics are detached sums and counts over real tokens (one maximum, named so), never means: sums add up over
micro-batches and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

Stats = dict[str, Tensor]

KL_KINDS = ("k1", "k2", "k3")
KL_LOSS_KINDS = ("k2", "k3", "full")


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar: the sum of `x` over real tokens. `x` and `mask` have the same shape, whatever it is."""
    (x,) = _real(mask, x)
    return x.sum()


def masked_mean(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Scalar: the sum of `x` over real tokens / denominator; None: their number, which makes it their mean.

    Every loss is one of these. The trainer passes global tokens / world size, so that ranks averaged by DeepSpeed give
    the mean over all tokens, however they were dealt out; a mean of local means would weigh short responses up.
    """
    return masked_sum(x, mask) / (mask.count_nonzero().clamp(min=1) if denominator is None else denominator)


def masked_whiten(
    x: Tensor, mask: Tensor, mean: float | Tensor | None = None, var: float | Tensor | None = None
) -> Tensor:
    """`[B, T]`: (x - mean) / sqrt(var + 1e-8) on real tokens, 0 on padding.

    Args:
        x, mask: `[B, T]`.
        mean, var: scalars over the tokens of all ranks; None: the mean and the population variance of these tokens.
    """
    (x,) = _real(mask, x)
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_mean((x - mean).square(), mask) if var is None else var
    (whitened,) = _real(mask, (x - mean) / (var + 1e-8) ** 0.5)
    return whitened


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Elementwise estimate of KL(p||q) from one token drawn from p (Schulman 2020, "Approximating KL Divergence").

    With d = log p - log q: k1 = d (unbiased, signed), k2 = d^2 / 2, k3 = exp(-d) - 1 + d (unbiased, never negative).

    Args:
        logprobs, ref_logprobs: log p and log q of the drawn tokens, any one shape.
        kind: "k1", "k2" or "k3". The exact sum over the vocabulary is `full_kl`, which needs logits.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"unknown KL estimator {kind!r}; valid: {', '.join(KL_KINDS)} (and full, from full_kl)")
    d = _wide(logprobs) - _wide(ref_logprobs)
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    return torch.expm1(-d) + d


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`[...]`: sum_v p(v) (log p(v) - log q(v)), exact at each position, p = softmax(logits), q = softmax(ref_logits).

    Args:
        logits, ref_logits: `[..., V]`, both already divided by the sampling temperature. A logit of -inf is a token of
            probability 0, which adds nothing where p is 0 and inf where only q is.
    """
    logp, logq = _wide(logits).log_softmax(-1), _wide(ref_logits).log_softmax(-1)
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """`[...]`: -sum_v p(v) log p(v) of p = softmax(logits), in nats. `logits` is `[..., V]`; -inf is probability 0."""
    logp = _wide(logits).log_softmax(-1)
    p = logp.exp()
    return -(p * torch.where(p > 0, logp, 0)).sum(-1)


def token_rewards(scores: Tensor, kl: Tensor, kl_coef: float | Tensor, mask: Tensor) -> Tensor:
    """`[B, T]`: -kl_coef * kl on real tokens, plus the sequence's score on the last one (Ziegler et al. 2019, eq. 2).

    Args:
        scores: `[B]`.
        kl: `[B, T]`, the penalty per token.
        kl_coef: its weight; 0 when the KL is a term of the loss.
        mask: `[B, T]`, contiguous from 0.
    """
    _check_contiguous(mask)
    (kl,) = _real(mask, kl)
    (scores,) = _real(mask.any(dim=1), scores)
    lengths = mask.count_nonzero(dim=1)
    is_last = torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1
    return torch.where(is_last, scores[:, None], 0) - kl_coef * kl


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, eq. 11 and 16), V past the last real token being 0.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma gae_lambda A_{t+1},   returns = A + V.

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`, V_t read before response token t.
        mask: `[B, T]`, contiguous from 0.

    Returns:
        advantages and returns, `[B, T]` each, not whitened.
    """
    _check_contiguous(mask)
    rewards, values = _real(mask, rewards, values)
    next_values = pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    following = deltas.new_zeros(deltas.shape[0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio: float,
    denominator: float | Tensor | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7), as a loss: max(-A ratio, -A clip(ratio, 1 -+ clip_ratio)).

    `dual_clip` c bounds it by -A c where A < 0 (Ye et al. 2020, dual-clip PPO), for bad tokens whose ratio ran away.

    Args:
        logprobs, old_logprobs, advantages, mask: `[B, T]`.
        denominator: what the sum over real tokens is divided by; None: the number of real tokens here.
        dual_clip: above 1; None: off.
        weights: `[B, T]` factors on each token's loss, from `importance_weights`; no gradient flows into them.

    Returns:
        loss, and stats: `loss_sum`; `clipped` and `dual_clipped`, tokens at which that bound decides;
        `approx_kl_sum` of (ratio - 1) - log ratio; `ratio_deviation_max`, the largest |ratio - 1|; `tokens`.
    """
    if clip_ratio <= 0:
        raise ValueError(f"clip_ratio must be above 0, got {clip_ratio}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}; None turns it off")
    logprobs, old_logprobs, advantages = _real(mask, logprobs, old_logprobs, advantages)
    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    losses = torch.maximum(unclipped, bounded)
    dual_clipped = torch.zeros_like(losses, dtype=torch.bool)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (losses > ceiling)
        losses = torch.where(dual_clipped, ceiling, losses)
    # An overflowed ratio can hide behind a bound: finite loss, nan gradient (0 * inf). This makes the loss nan as well.
    losses = losses + 0 * ratio.detach()
    if weights is not None:
        (weights,) = _real(mask, weights.detach())
        losses = weights * losses
    stats = {"clipped": (bounded > unclipped).sum(), "dual_clipped": dual_clipped.sum()}
    return _loss_and_stats(losses, mask, denominator, stats | ratio_stats(logprobs, old_logprobs, mask))


def ratio_stats(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Stats:
    """How far one policy is from the other that sampled, by `[B, T]` log-probs of its tokens.

    Returns:
        `approx_kl_sum` of (ratio - 1) - log ratio; `ratio_deviation_max`, the largest |ratio - 1|.
    """
    logprobs, old_logprobs = _real(mask, logprobs.detach(), old_logprobs.detach())
    log_ratio = logprobs - old_logprobs
    difference = torch.expm1(log_ratio)
    return {
        "approx_kl_sum": (difference - log_ratio).sum(),
        "ratio_deviation_max": pad(difference.abs().flatten(), (0, 1)).max(),
    }


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """`[...]`: min(pi / mu, cap) of tokens that mu sampled for an update that takes them for pi's.

    Truncated importance sampling: what V-trace calls rho (Espeholt et al. 2018, IMPALA, eq. 1), here between the
    trainer's weights and the same weights as the sampler computes with them (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). The cap bounds the variance and biases towards mu.

    Args:
        old_logprobs, sampler_logprobs: log pi and log mu, any one shape.
        cap: above 0.
    """
    if cap <= 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    return (_wide(old_logprobs) - _wide(sampler_logprobs)).detach().exp().clamp(max=cap)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip: float | None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """0.5 max((V - R)^2, (clip(V, V_old -+ value_clip) - R)^2), as in OpenAI's baselines (ppo2).

    Args:
        values, old_values, returns, mask: `[B, T]`.
        value_clip: None: 0.5 (V - R)^2.
        denominator: what the sum over real tokens is divided by; None: the number of real tokens here.

    Returns:
        loss, and stats: `loss_sum`; `clipped`, tokens at which the clipped term decides; `tokens`.
    """
    if value_clip is not None and value_clip <= 0:
        raise ValueError(f"value_clip must be above 0, got {value_clip}; None turns it off")
    values, old_values, returns = _real(mask, values, old_values, returns)
    losses = unclipped = 0.5 * (values - returns).square()
    if value_clip is not None:
        bounded = 0.5 * (values.clamp(old_values - value_clip, old_values + value_clip) - returns).square()
        losses = torch.maximum(unclipped, bounded)
    return _loss_and_stats(losses, mask, denominator, {"clipped": (losses > unclipped).sum()})


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kind: str,
    denominator: float | Tensor | None = None,
    full: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The KL to the reference as a term of the loss, right in expectation after the first optimizer step too.

    Wanted: grad KL(p||q) = E_p[d grad log p] = E_m[ratio d grad log p], with d = log p - log q, tokens drawn from the
    old policy m and ratio = p / m. As grad k2 = d grad log p, that is the gradient of `ratio * k2` with the ratio held
    constant: differentiating it too would add ratio k2 grad log p. The same with k3 gives E_p[(1 - q/p) grad log p],
    which is grad KL(q||p), the other direction. k1 gives E_p[grad log p] = 0 and is refused. `full` is summed over the
    vocabulary already: the ratio of the one token drawn there has mean 1 and would only add noise, so it isn't used.

    Args:
        logprobs, old_logprobs, ref_logprobs, mask: `[B, T]`; the gradient flows into `logprobs` (k2, k3) or `full`.
        kind: "k2", "k3" or "full".
        denominator: what the sum over real tokens is divided by; None: the number of real tokens here.
        full: `[B, T]` from `full_kl`, with kind "full" only.

    Returns:
        loss (before kl_coef), and stats: `loss_sum`; `tokens`.
    """
    if kind == "k1":
        raise ValueError("k1 has gradient 0 in the loss; use k2 or full there, or put k1 in the reward")
    if kind not in KL_LOSS_KINDS:
        raise ValueError(f"unknown KL estimator {kind!r}; valid in the loss: {', '.join(KL_LOSS_KINDS)}")
    if (kind == "full") != (full is not None):
        raise ValueError(f"full={'None' if full is None else 'a tensor'} with kind {kind!r}; pass it with full alone")
    if full is not None:
        return _loss_and_stats(full, mask, denominator, {})
    logprobs, old_logprobs, ref_logprobs = _real(mask, logprobs, old_logprobs, ref_logprobs)
    weight = (logprobs - old_logprobs).exp().detach()
    return _loss_and_stats(weight * kl_estimate(logprobs, ref_logprobs, kind), mask, denominator, {})


def adaptive_kl_coef(kl_coef: float, kl_per_sequence: float, target: float, sequences: int, horizon: float) -> float:
    """The next kl_coef: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) sequences / horizon) (Ziegler et al. 2019, 2.2).

    Args:
        kl_per_sequence: measured KL summed over a response's tokens, mean over responses, in nats.
        target: the KL to steer to, in nats.
        sequences: responses seen since the last call.
        horizon: responses over which the controller reacts.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target and horizon must be above 0, got target={target}, horizon={horizon}")
    if sequences >= 5 * horizon:
        raise ValueError(f"{sequences} sequences with horizon={horizon} could turn kl_coef negative; raise the horizon")
    # The measured number comes first: Python's min and max then hand a nan on, where they would else replace it.
    error = min(max(kl_per_sequence / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * sequences / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Scalar: 1 - Var(R - V) / Var(R) over real tokens. 1 is a perfect critic, 0 a constant; 0 if R doesn't vary.

    Args:
        values, returns, mask: `[B, T]`.
    """
    # In float64 equal float32 returns have variance exactly 0, not a rounding error to divide by.
    values, returns = _real(mask, values.double(), returns.double())
    error, total = (masked_mean((x - masked_mean(x, mask)).square(), mask) for x in (returns - values, returns))
    return torch.where(total == 0, 0, 1 - error / torch.where(total == 0, 1, total))


def _wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _real(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in at least float32, 0 where the mask is False. Shapes must agree: broadcasting would hide a bug."""
    for x in tensors:
        if x.shape != mask.shape:
            raise ValueError(
                f"a tensor of shape {list(x.shape)} with a mask of shape {list(mask.shape)}; must be equal"
            )
    return tuple(torch.where(mask.bool(), _wide(x), 0) for x in tensors)


def _check_contiguous(mask: Tensor) -> None:
    """Refuse a mask with a hole: there would be no one last token, nor a next value."""
    mask = mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("mask must be contiguous from position 0 in each row; got a real token after a masked one")


def _loss_and_stats(losses: Tensor, mask: Tensor, denominator, stats: Stats) -> tuple[Tensor, Stats]:
    """A loss from its `[B, T]` terms, and its detached stats with the two that every loss has."""
    stats = {"loss_sum": masked_sum(losses, mask), **stats, "tokens": mask.count_nonzero()}
    return masked_mean(losses, mask, denominator), {name: value.detach() for name, value in stats.items()}
