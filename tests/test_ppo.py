"""engine/ppo.py against float64 loops over Python floats, constants worked by hand, exact gradients and symmetries."""

import math

import pytest
import torch
from torch import tensor

from engine import ppo

LENGTHS = (5, 2, 0, 3)  # one response is empty
B, T = len(LENGTHS), 5
GARBAGE = (math.inf, -math.inf, math.nan, 1e30)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def f64(data):
    return tensor(data, dtype=torch.float64)


def mask_of(lengths=LENGTHS, width=T):
    return tensor([[t < length for t in range(width)] for length in lengths], dtype=torch.bool)


MASK = mask_of()
REAL = [(b, t) for b, length in enumerate(LENGTHS) for t in range(length)]


def close(got, wanted, **tolerance):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), **(tolerance or EXACT))


def grad_of(function, *inputs):
    """The gradients of a scalar function by its inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, allow_unused=True, materialize_grads=True)


def full_loss(mask, full):
    return ppo.kl_loss(full, full, full, mask, "full", full=full)[0]


def stats_of(mask, *inputs):
    return torch.stack([x.double() for x in ppo.policy_loss(*inputs, mask, 0.2, dual_clip=1.5)[1].values()])


# Each masked function with the number of its [B, T] inputs, as function(mask, *inputs) -> tensor.
FUNCTIONS = {
    "masked_sum": (1, lambda mask, x: ppo.masked_sum(x, mask)),
    "masked_mean": (1, lambda mask, x: ppo.masked_mean(x, mask)),
    "masked_whiten": (1, lambda mask, x: ppo.masked_whiten(x, mask)),
    "masked_whiten_global": (1, lambda mask, x: ppo.masked_whiten(x, mask, tensor(0.3), tensor(2.0))),
    "token_rewards": (1, lambda mask, kl: ppo.token_rewards(mask.sum(1), kl, 0.3, mask)),
    "gae": (2, lambda mask, r, v: torch.stack(ppo.gae(r, v, mask, 0.9, 0.8))),
    "policy_loss": (3, lambda mask, p, o, a: ppo.policy_loss(p, o, a, mask, 0.2)[0]),
    "policy_loss_dual": (3, lambda mask, p, o, a: ppo.policy_loss(p, o, a, mask, 0.2, dual_clip=1.5)[0]),
    "policy_loss_weighted": (4, lambda mask, p, o, a, w: ppo.policy_loss(p, o, a, mask, 0.2, weights=w)[0]),
    "policy_stats": (3, stats_of),
    "ratio_stats": (2, lambda mask, p, o: torch.stack(list(ppo.ratio_stats(p, o, mask).values()))),
    "value_loss": (3, lambda mask, v, o, r: ppo.value_loss(v, o, r, mask, 0.2)[0]),
    "value_loss_unclipped": (3, lambda mask, v, o, r: ppo.value_loss(v, o, r, mask, None)[0]),
    "kl_loss_k2": (3, lambda mask, p, o, q: ppo.kl_loss(p, o, q, mask, "k2")[0]),
    "kl_loss_k3": (3, lambda mask, p, o, q: ppo.kl_loss(p, o, q, mask, "k3")[0]),
    "kl_loss_full": (1, full_loss),
    "explained_variance": (2, lambda mask, v, r: ppo.explained_variance(v, r, mask)),
}


@pytest.fixture(params=FUNCTIONS, ids=str)
def case(request):
    """(function, its inputs [B, T] in float64)."""
    count, function = FUNCTIONS[request.param]
    return function, [random(B, T, seed=seed) for seed in range(count)]


class TestSymmetries:
    """What holds of every function, whatever it computes."""

    @pytest.mark.parametrize("garbage", GARBAGE)
    def test_padding_is_never_read(self, case, garbage):
        function, inputs = case
        dirty = [x.masked_fill(~MASK, garbage) for x in inputs]
        assert torch.equal(function(MASK, *dirty), function(MASK, *inputs))

    @pytest.mark.parametrize("garbage", GARBAGE)
    def test_padding_has_gradient_zero_and_spoils_no_other(self, case, garbage):
        function, inputs = case
        if not function(MASK, *[x.requires_grad_() for x in inputs]).requires_grad:
            return  # statistics are detached
        weights = random(99, seed=5)

        def scalar(*xs):
            result = function(MASK, *xs).flatten()
            return (result * weights[: len(result)]).sum()

        dirty = [x.detach().masked_fill(~MASK, garbage) for x in inputs]
        for clean_grad, dirty_grad in zip(grad_of(scalar, *inputs), grad_of(scalar, *dirty), strict=True):
            assert torch.equal(clean_grad, dirty_grad)
            assert (dirty_grad[~MASK] == 0).all()

    def test_padding_comes_out_zero(self, case):
        function, inputs = case
        result = function(MASK, *inputs)
        if result.shape[-2:] == (B, T):
            assert (result[..., ~MASK] == 0).all() and (result[..., MASK] != 0).all()

    def test_wider_padding_changes_nothing(self, case):
        function, inputs = case
        wider = torch.nn.functional.pad(MASK, (0, 3))
        result = function(wider, *[torch.nn.functional.pad(x, (0, 3), value=7.0) for x in inputs])
        if result.shape[-2:] == (B, T + 3):
            result = result[..., :T]
        close(result, function(MASK, *inputs))

    def test_permuting_the_batch_permutes_the_result(self, case):
        function, inputs = case
        order = tensor([2, 0, 3, 1])
        result, permuted = function(MASK, *inputs), function(MASK[order], *[x[order] for x in inputs])
        close(permuted, result[..., order, :] if result.shape[-2:] == (B, T) else result)

    def test_an_empty_mask_gives_zero_and_zero_gradient(self, case):
        function, inputs = case
        nothing = torch.zeros(B, T, dtype=torch.bool)
        assert (function(nothing, *inputs) == 0).all()
        if function(nothing, *[x.requires_grad_() for x in inputs]).requires_grad:
            assert all((g == 0).all() for g in grad_of(lambda *xs: function(nothing, *xs).sum(), *inputs))

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
    def test_no_rows_and_no_columns_are_empty_masks(self, case, shape):
        function, inputs = case
        result = function(torch.zeros(shape, dtype=torch.bool), *[x.new_zeros(shape) for x in inputs])
        assert (result == 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_narrow_inputs_are_computed_in_float32(self, case, dtype):
        function, inputs = case
        narrow = [x.to(dtype) for x in inputs]
        result = function(MASK, *narrow)
        assert result.dtype in (torch.float32, torch.float64)
        close(result, function(MASK, *[x.double() for x in narrow]), rtol=2e-5, atol=2e-6)

    def test_nan_at_a_real_token_is_not_hidden(self, case):
        function, inputs = case
        for index in range(len(inputs)):
            spoiled = [x.clone() for x in inputs]
            spoiled[index][0, 1] = math.nan
            unused = function is FUNCTIONS["value_loss_unclipped"][1] and index == 1  # the old values
            assert function(MASK, *spoiled).isfinite().all() == unused

    def test_number_masks_count_like_bools(self, case):
        function, inputs = case
        assert torch.equal(function(MASK.double(), *inputs), function(MASK, *inputs))
        assert torch.equal(function(MASK.long(), *inputs), function(MASK, *inputs))

    def test_shapes_must_agree(self, case):
        function, inputs = case
        with pytest.raises(ValueError, match="shape"):
            function(MASK, *[x[:, :1] for x in inputs])


class TestMeansAndWhitening:
    def test_masked_mean_by_hand(self):
        x = tensor([[1.0, 2.0, 90.0], [6.0, 90.0, 90.0]])
        mask = mask_of((2, 1), 3)
        close(ppo.masked_mean(x, mask), 3.0)  # (1 + 2 + 6) / 3; a mean of row means would be (1.5 + 6) / 2 = 3.75
        close(ppo.masked_sum(x, mask), 9.0)
        close(ppo.masked_mean(x, mask, 18), 0.5)

    def test_whiten_by_hand(self):
        # mean (1 + 2 + 6) / 3 = 3; population variance (4 + 1 + 9) / 3 = 14/3
        whitened = ppo.masked_whiten(f64([[1.0, 2.0, 90.0], [6.0, 90.0, 90.0]]), mask_of((2, 1), 3))
        root = math.sqrt(14 / 3 + 1e-8)
        close(whitened, [[-2 / root, -1 / root, 0], [3 / root, 0, 0]])

    def test_whiten_epsilon_is_added_to_the_variance(self):
        # values -+1e-4: variance 1e-8, so that 1e-4 / sqrt(1e-8 + 1e-8) = 1 / sqrt(2)
        whitened = ppo.masked_whiten(f64([[1e-4, -1e-4]]), mask_of((2,), 2))
        close(whitened, [[math.sqrt(0.5), -math.sqrt(0.5)]])

    def test_whiten_of_equal_values_is_zero(self):
        assert ppo.masked_whiten(torch.full((1, 2), 0.5), mask_of((2,), 2)).tolist() == [[0.0, 0.0]]

    def test_whiten_with_given_moments(self):
        whitened = ppo.masked_whiten(f64([[5.0, 7.0]]), mask_of((1,), 2), mean=3.0, var=16.0 - 1e-8)
        close(whitened, [[0.5, 0.0]])  # (5 - 3) / sqrt(16)

    def test_shards_with_the_moments_of_all_are_whitened_like_the_whole(self):
        x = random(B, T)
        real = [x[b, t].item() for b, t in REAL]
        mean = sum(real) / len(real)
        var = sum((y - mean) ** 2 for y in real) / len(real)
        shards = [ppo.masked_whiten(x[s], MASK[s], mean, var) for s in (slice(0, 1), slice(1, 3), slice(3, 4))]
        close(torch.cat(shards), ppo.masked_whiten(x, MASK))

    def test_gradcheck(self):
        x = random(B, T).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: ppo.masked_whiten(x, MASK), x)
        assert torch.autograd.gradcheck(lambda x: ppo.masked_mean(x, MASK), x)


class TestKLEstimates:
    def test_by_hand(self):
        # p = 0.6, q = 0.2: d = ln 3 = 1.0986..., exp(-d) = 1/3
        p, q = f64([0.6, 0.2]).log(), f64([0.2, 0.6]).log()
        d = math.log(3)
        close(ppo.kl_estimate(p, q, "k1"), [d, -d])
        close(ppo.kl_estimate(p, q, "k2"), [d * d / 2, d * d / 2])
        close(ppo.kl_estimate(p, q, "k3"), [1 / 3 - 1 + d, 3 - 1 - d])

    def test_k3_of_nearly_equal_logprobs_is_not_rounded_away(self):
        d = 1e-4
        got = ppo.kl_estimate(tensor([0.0]), tensor([-d]), "k3").item()
        assert got == pytest.approx(d * d / 2, rel=1e-2)  # exp(-d) - 1 + d in float32 is 0 or 1.2e-7

    @pytest.mark.parametrize("kind", ["k4", "full", ""])
    def test_unknown_kinds_name_the_valid_ones(self, kind):
        with pytest.raises(ValueError, match="k1, k2, k3"):
            ppo.kl_estimate(torch.zeros(1), torch.zeros(1), kind)

    def test_narrow_inputs(self):
        got = ppo.kl_estimate(tensor([-1.5]).bfloat16(), tensor([-1.0]).bfloat16(), "k2")
        assert got.dtype == torch.float32 and got.item() == 0.125

    def test_k1_and_k3_are_unbiased(self):
        p, q = random(5).softmax(0), random(5, seed=1).softmax(0)
        wanted = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        for kind in ("k1", "k3"):
            close((p * ppo.kl_estimate(p.log(), q.log(), kind)).sum(), wanted)

    def test_full_kl_against_a_loop(self):
        logits, ref_logits = random(2, 3, 7), random(2, 3, 7, seed=1)
        got = ppo.full_kl(logits, ref_logits)
        for b in range(2):
            for t in range(3):
                zs, ws = logits[b, t].tolist(), ref_logits[b, t].tolist()
                p = [math.exp(z) / sum(map(math.exp, zs)) for z in zs]
                q = [math.exp(w) / sum(map(math.exp, ws)) for w in ws]
                close(got[b, t], sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True)))

    def test_entropy_by_hand(self):
        # 1/2, 1/4, 1/4: (ln 2) / 2 + 2 (ln 4) / 4 = 1.5 ln 2; uniform over 8: 3 ln 2
        close(ppo.entropy(f64([0.5, 0.25, 0.25]).log() + 3), 1.5 * math.log(2))
        close(ppo.entropy(torch.zeros(2, 8).double()), [3 * math.log(2)] * 2)

    def test_tokens_of_probability_zero_add_nothing(self):
        logits = f64([0.0, 0.0, -math.inf])
        ref_logits = f64([0.0, math.log(3), -math.inf])
        close(ppo.entropy(logits), math.log(2))
        close(ppo.full_kl(logits, ref_logits), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
        assert ppo.full_kl(torch.zeros(3), ref_logits).item() == math.inf
        for function in (lambda z: ppo.full_kl(z, ref_logits), ppo.entropy):
            (grad,) = grad_of(function, logits)
            assert grad.isfinite().all() and grad[2] == 0

    def test_gradcheck(self):
        logits, ref_logits = random(2, 5).requires_grad_(), random(2, 5, seed=1)
        assert torch.autograd.gradcheck(lambda z: ppo.full_kl(z, ref_logits), logits)
        assert torch.autograd.gradcheck(ppo.entropy, logits)
        for kind in ppo.KL_KINDS:
            assert torch.autograd.gradcheck(lambda x, kind=kind: ppo.kl_estimate(x, ref_logits, kind), logits)


class TestKLGradients:
    """Every placement of every estimator on a policy over 5 tokens, with the expectation over tokens taken exactly.

    The wanted gradients by the logits z of p are textbook: of KL(p||q) p_k (d_k - KL), of KL(q||p) p_k - q_k.
    """

    LOGITS, REF, OLD = random(5, seed=0), random(5, seed=1), random(5, seed=2)
    ON_POLICY = pytest.mark.parametrize("old", [LOGITS, OLD], ids=["first step", "later step"])

    def wanted(self, direction="p||q"):
        p, q = ([math.exp(z) for z in zs.tolist()] for zs in (self.LOGITS, self.REF))
        p, q = ([x / sum(xs) for x in xs] for xs in (p, q))
        if direction == "q||p":
            return [a - b for a, b in zip(p, q, strict=True)]
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return [a * (math.log(a / b) - kl) for a, b in zip(p, q, strict=True)]

    def gradient(self, old, loss_of_token):
        """d/dz of sum_a m(a) loss_of_token(a, log p(a)), the token a being drawn from m = softmax(old)."""

        def expectation(logits):
            logprobs = logits.log_softmax(0)
            return sum(old.softmax(0)[a] * loss_of_token(a, logprobs[a].view(1, 1)) for a in range(5))

        return grad_of(expectation, self.LOGITS)[0]

    def in_the_reward(self, old, penalty):
        """`penalty` [5] subtracted from the reward of one-token responses; no clipping, no baseline."""
        old_logprobs, one = old.log_softmax(0), torch.ones(1, 1, dtype=torch.bool)

        def loss(a, logprobs):
            rewards = ppo.token_rewards(torch.zeros(1).double(), penalty[a].view(1, 1), 1.0, one)
            advantages, _ = ppo.gae(rewards, torch.zeros(1, 1).double(), one, 1.0, 1.0)
            return ppo.policy_loss(logprobs, old_logprobs[a].view(1, 1), advantages, one, clip_ratio=1e9)[0]

        return self.gradient(old, loss)

    def in_the_loss(self, old, kind):
        old_logprobs, ref_logprobs = old.log_softmax(0), self.REF.log_softmax(0)
        one = torch.ones(1, 1, dtype=torch.bool)
        return self.gradient(
            old,
            lambda a, logprobs: ppo.kl_loss(
                logprobs, old_logprobs[a].view(1, 1), ref_logprobs[a].view(1, 1), one, kind
            )[0],
        )

    def test_the_wanted_gradient_is_autograds(self):
        close(grad_of(lambda z: ppo.full_kl(z, self.REF), self.LOGITS)[0], self.wanted())
        close(grad_of(lambda z: ppo.full_kl(self.REF, z), self.LOGITS)[0], self.wanted("q||p"))

    def test_k1_in_the_reward_is_right(self):
        d = ppo.kl_estimate(self.LOGITS.log_softmax(0), self.REF.log_softmax(0), "k1")
        close(self.in_the_reward(self.LOGITS, d), self.wanted())

    def test_k2_k3_and_full_in_the_reward_are_not(self):
        p, q = self.LOGITS.log_softmax(0), self.REF.log_softmax(0)
        for kind in ("k2", "k3"):
            error = self.in_the_reward(self.LOGITS, ppo.kl_estimate(p, q, kind)) - f64(self.wanted())
            assert error.abs().max() > 0.1
        full = ppo.full_kl(self.LOGITS, self.REF).expand(5)  # the same whichever token was drawn: no immediate term
        close(self.in_the_reward(self.LOGITS, full), [0.0] * 5)

    @ON_POLICY
    def test_k2_in_the_loss_is_right(self, old):
        close(self.in_the_loss(old, "k2"), self.wanted())

    @ON_POLICY
    def test_k3_in_the_loss_is_the_other_direction(self, old):
        close(self.in_the_loss(old, "k3"), self.wanted("q||p"))

    @ON_POLICY
    def test_full_in_the_loss_is_right_for_each_token_drawn(self, old):
        one, old_logprobs = torch.ones(1, 1, dtype=torch.bool), old.log_softmax(0)
        for a in range(5):

            def loss(logits, a=a):
                full = ppo.full_kl(logits, self.REF).view(1, 1)
                at = logits.log_softmax(0)[a].view(1, 1), old_logprobs[a].view(1, 1), self.REF[a].view(1, 1)
                return ppo.kl_loss(*at, one, "full", full=full)[0]

            close(grad_of(loss, self.LOGITS)[0], self.wanted())

    def test_k1_in_the_loss_has_gradient_zero_and_is_refused(self):
        ref_logprobs = self.REF.log_softmax(0)
        close(self.gradient(self.LOGITS, lambda a, x: ppo.kl_estimate(x, ref_logprobs[a], "k1").sum()), [0.0] * 5)
        with pytest.raises(ValueError, match="gradient 0.*k2 or full"):
            self.in_the_loss(self.LOGITS, "k1")

    def test_without_the_weight_or_with_a_differentiated_one_it_would_be_wrong(self):
        ref_logprobs, old_logprobs = self.REF.log_softmax(0), self.OLD.log_softmax(0)

        def k2(a, x):
            return ppo.kl_estimate(x, ref_logprobs[a], "k2").sum()

        for loss in (k2, lambda a, x: (x - old_logprobs[a]).exp().sum() * k2(a, x)):
            error = self.gradient(self.OLD, loss) - f64(self.wanted())
            assert error.abs().max() > 0.05

    def test_arguments(self):
        x, one = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        with pytest.raises(ValueError, match="k2, k3, full"):
            ppo.kl_loss(x, x, x, one, "k4")
        with pytest.raises(ValueError, match="full alone"):
            ppo.kl_loss(x, x, x, one, "full")
        with pytest.raises(ValueError, match="full alone"):
            ppo.kl_loss(x, x, x, one, "k2", full=x)

    def test_value_and_stats_by_hand(self):
        # ratio 0.6 / 0.3 = 2, d = ln(0.6 / 0.2) = ln 3: 2 (ln 3)^2 / 2; over a denominator of 4
        x = [f64([[p, 0.5]]).log() for p in (0.6, 0.3, 0.2)]
        loss, stats = ppo.kl_loss(*x, mask_of((1,), 2), "k2", denominator=4)
        close(loss, math.log(3) ** 2 / 4)
        close(stats["loss_sum"], math.log(3) ** 2)
        assert stats["tokens"] == 1 and not stats["loss_sum"].requires_grad


class TestTokenRewards:
    def test_by_hand(self):
        kl = f64([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
        got = ppo.token_rewards(f64([10.0, 20.0]), kl, 0.5, mask_of((2, 3), 3))
        close(got, [[-0.5, 1 + 10.0, 0], [-2.0, -2.5, -3 + 20.0]])

    def test_a_score_of_an_empty_response_lands_nowhere(self):
        got = ppo.token_rewards(tensor([math.nan, 2.0]), torch.zeros(2, 3), 1.0, mask_of((0, 3), 3))
        assert got.tolist() == [[0, 0, 0], [0, 0, 2]]

    def test_permuting_the_batch(self):
        scores, kl, order = random(B), random(B, T, seed=1), tensor([2, 0, 3, 1])
        permuted = ppo.token_rewards(scores[order], kl[order], 0.3, MASK[order])
        assert torch.equal(permuted, ppo.token_rewards(scores, kl, 0.3, MASK)[order])

    def test_gradcheck(self):
        inputs = random(B).requires_grad_(), random(B, T).requires_grad_()
        assert torch.autograd.gradcheck(lambda s, k: ppo.token_rewards(s, k, 0.3, MASK), inputs)

    def test_scores_are_one_per_row(self):
        with pytest.raises(ValueError, match="shape"):
            ppo.token_rewards(torch.zeros(B, 1), torch.zeros(B, T), 1.0, MASK)


def loop_gae(rewards, values, lengths, gamma, gae_lambda):
    """Advantages by the definition sum_l (gamma lambda)^l delta_{t+l}, over Python floats."""
    rewards, values = rewards.tolist(), values.tolist()
    advantages = [[0.0] * len(row) for row in rewards]
    for b, length in enumerate(lengths):
        after = values[b][:length] + [0.0]
        deltas = [rewards[b][t] + gamma * after[t + 1] - after[t] for t in range(length)]
        for t in range(length):
            advantages[b][t] = sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(length - t))
    return advantages


class TestGAE:
    def test_by_hand(self):
        # gamma 0.5, lambda 0.5. deltas: 1 + 0.5*2 - 4 = -2; 3 + 0 - 2 = 1. A: 1; -2 + 0.25*1 = -1.75.
        got = ppo.gae(f64([[1.0, 3.0, 9.0]]), f64([[4.0, 2.0, 9.0]]), mask_of((2,), 3), 0.5, 0.5)
        close(got[0], [[-1.75, 1.0, 0.0]])
        close(got[1], [[2.25, 3.0, 0.0]])  # A + V

    @pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
    @pytest.mark.parametrize("gae_lambda", [1.0, 0.95, 0.0])
    def test_against_a_loop(self, gamma, gae_lambda):
        rewards, values = random(B, T), random(B, T, seed=1)
        advantages, returns = ppo.gae(rewards, values, MASK, gamma, gae_lambda)
        wanted = f64(loop_gae(rewards, values, LENGTHS, gamma, gae_lambda))
        close(advantages, wanted)
        close(returns, wanted + values * MASK)

    def test_undiscounted_it_is_reward_to_go_minus_value(self):
        rewards, values = random(B, T), random(B, T, seed=1)
        advantages, returns = ppo.gae(rewards, values, MASK, 1.0, 1.0)
        for b, t in REAL:
            to_go = sum(rewards[b, t : LENGTHS[b]].tolist())
            close(returns[b, t], to_go)
            close(advantages[b, t], to_go - values[b, t].item())

    def test_lambda_zero_is_one_step(self):
        rewards, values = random(1, 2), random(1, 2, seed=1)
        advantages, _ = ppo.gae(rewards, values, mask_of((2,), 2), 0.9, 0.0)
        (r0, r1), (v0, v1) = rewards[0].tolist(), values[0].tolist()
        close(advantages, [[r0 + 0.9 * v1 - v0, r1 - v1]])

    def test_gradcheck(self):
        inputs = random(B, T).requires_grad_(), random(B, T, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda r, v: ppo.gae(r, v, MASK, 0.9, 0.8), inputs)

    def test_a_mask_with_a_hole_is_refused(self):
        hole = tensor([[True, False, True]])
        with pytest.raises(ValueError, match="contiguous"):
            ppo.gae(torch.zeros(1, 3), torch.zeros(1, 3), hole, 1.0, 1.0)
        with pytest.raises(ValueError, match="contiguous"):
            ppo.token_rewards(torch.zeros(1), torch.zeros(1, 3), 1.0, hole)


def loop_policy(logprobs, old_logprobs, advantages, clip_ratio, dual_clip):
    """Sum of losses, and tokens clipped, over Python floats; in the paper's form, a minimum of objectives."""
    total, clipped = 0.0, 0
    for b, t in REAL:
        ratio, advantage = math.exp(logprobs[b][t] - old_logprobs[b][t]), advantages[b][t]
        bounded = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
        objective = min(ratio * advantage, bounded * advantage)
        clipped += bounded * advantage < ratio * advantage
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        total -= objective
    return total, clipped


class TestPolicyLoss:
    # ratio, A -> loss with clip_ratio 0.2 : max(-A ratio, -A clip(ratio))
    @pytest.mark.parametrize(
        "ratio, advantage, wanted, gradient, clipped",
        [
            (1.0, 2.0, -2.0, -2.0, 0),  # inside: the gradient by log p is -A ratio
            (1.1, 2.0, -2.2, -2.2, 0),
            (1.5, 2.0, -2.4, 0.0, 1),  # good and risen enough: max(-3, -2.4)
            (0.5, 2.0, -1.0, -1.0, 0),  # good but fallen: max(-1, -1.6), the clip would hide it
            (1.5, -2.0, 3.0, 3.0, 0),  # bad and risen: max(3, 2.4)
            (0.5, -2.0, 1.6, 0.0, 1),  # bad and fallen enough: max(1, 1.6)
        ],
    )
    def test_one_token_by_hand(self, ratio, advantage, wanted, gradient, clipped):
        old_logprobs, one = f64([[-1.0]]), mask_of((1,), 1)
        logprobs = (old_logprobs + math.log(ratio)).requires_grad_()
        loss, stats = ppo.policy_loss(logprobs, old_logprobs, f64([[advantage]]), one, 0.2)
        close(loss, wanted)
        close(torch.autograd.grad(loss, logprobs)[0], [[gradient]])
        assert (stats["clipped"], stats["tokens"]) == (clipped, 1)
        close(stats["approx_kl_sum"], ratio - 1 - math.log(ratio))
        close(stats["ratio_deviation_max"], abs(ratio - 1))
        assert not any(value.requires_grad for value in stats.values())

    @pytest.mark.parametrize("ratio, wanted, gradient, dual", [(5.0, 6.0, 0.0, 1), (2.0, 4.0, 4.0, 0)])
    def test_dual_clip_by_hand(self, ratio, wanted, gradient, dual):
        # A = -2, c = 3: min(max(2 ratio, ...), 6)
        logprobs = f64([[math.log(ratio)]]).requires_grad_()
        x = logprobs, torch.zeros(1, 1).double(), f64([[-2.0]])
        loss, stats = ppo.policy_loss(*x, mask_of((1,), 1), 0.2, dual_clip=3.0)
        close(loss, wanted)
        close(torch.autograd.grad(loss, logprobs)[0], [[gradient]])
        assert stats["dual_clipped"] == dual

    @pytest.mark.parametrize("dual_clip", [None, 1.5, 3.0])
    @pytest.mark.parametrize("denominator", [None, 7.0])
    def test_against_a_loop(self, dual_clip, denominator):
        x = [random(B, T, seed=seed) for seed in range(3)]
        loss, stats = ppo.policy_loss(*x, MASK, 0.2, denominator, dual_clip)
        total, clipped = loop_policy(*[y.tolist() for y in x], 0.2, dual_clip)
        close(loss, total / (denominator or len(REAL)))
        close(stats["loss_sum"], total)
        assert stats["clipped"] == clipped > 0

    def test_gradcheck(self):
        inputs = [random(B, T, seed=seed).requires_grad_() for seed in range(3)]
        for dual_clip in (None, 1.5):
            assert torch.autograd.gradcheck(
                lambda *x, c=dual_clip: ppo.policy_loss(*x, MASK, 0.2, dual_clip=c)[0], inputs
            )

    def test_an_overflowed_ratio_is_loud_even_where_the_clip_bounds_it(self):
        # A > 0: the clipped loss would be -1.2, with gradient 0 * inf = nan behind it.
        x = tensor([[200.0, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2)
        for dual_clip, sign in ((None, 1), (3.0, -1)):
            loss, stats = ppo.policy_loss(x[0], x[1], sign * x[2], mask_of((2,), 2), 0.2, dual_clip=dual_clip)
            assert not loss.isfinite()
            assert stats["approx_kl_sum"] == math.inf == stats["ratio_deviation_max"]

    def test_approx_kl_of_a_small_step_is_not_rounded_away(self):
        x = torch.full((1, 1), 1e-4), torch.zeros(1, 1), torch.ones(1, 1)
        stats = ppo.policy_loss(*x, mask_of((1,), 1), 0.2)[1]
        assert stats["approx_kl_sum"].item() == pytest.approx(5e-9, rel=1e-2)  # x^2 / 2

    def test_arguments(self):
        x = [torch.zeros(1, 1)] * 3
        with pytest.raises(ValueError, match="clip_ratio"):
            ppo.policy_loss(*x, mask_of((1,), 1), 0.0)
        with pytest.raises(ValueError, match="dual_clip"):
            ppo.policy_loss(*x, mask_of((1,), 1), 0.2, dual_clip=1.0)


class TestImportanceWeights:
    # pi / mu of the four tokens: e^0, e^1, e^2, e^-1; with cap 2: 1, 2, 2, 0.36788
    OLD, SAMPLER = [[-1.0, -1.0], [-1.0, -3.0]], [[-1.0, -2.0], [-3.0, -2.0]]

    def test_weights_by_hand(self):
        close(
            ppo.importance_weights(f64(self.OLD), f64(self.SAMPLER), 2.0),
            [[1.0, 2.0], [2.0, 0.36787944117144233]],
        )

    def test_a_weight_of_infinity_is_capped_and_nan_is_not_repaired(self):
        weights = ppo.importance_weights(f64([[0.0, math.nan]]), f64([[-1000.0, -1.0]]), 2.0)
        assert weights[0, 0] == 2 and weights[0, 1].isnan()

    def test_the_loss_by_hand(self):
        # ratio 1 and A = 1, 2, -1 on the three real tokens: -(1*1 + 2*2 + 2*-1) = -3, over 3 tokens; gradients -A w / 3
        weights = ppo.importance_weights(f64(self.OLD), f64(self.SAMPLER), 2.0)
        logprobs = f64(self.OLD).requires_grad_()
        loss, stats = ppo.policy_loss(
            logprobs, f64(self.OLD), f64([[1.0, 2.0], [-1.0, 5.0]]), mask_of((2, 1), 2), 0.2, weights=weights
        )
        close(loss, -1.0)
        close(stats["loss_sum"], -3.0)
        close(torch.autograd.grad(loss, logprobs)[0], [[-1 / 3, -4 / 3], [2 / 3, 0.0]])

    def test_a_clipped_and_a_dual_clipped_loss_are_weighted_too(self):
        # A = 2, ratio 1.5: -2.4 clipped; A = -2, ratio 5: at most 6 with dual_clip 3. Weights 0.5 and 2.
        x = f64([[math.log(1.5), math.log(5.0)]]), torch.zeros(1, 2).double(), f64([[2.0, -2.0]])
        loss, _ = ppo.policy_loss(*x, mask_of((2,), 2), 0.2, dual_clip=3.0, weights=f64([[0.5, 2.0]]))
        close(loss, (-0.5 * 2.4 + 2 * 6) / 2)

    def test_no_gradient_flows_into_the_weights(self):
        x = [random(B, T, seed=seed).requires_grad_() for seed in range(3)]
        loss, _ = ppo.policy_loss(*x, MASK, 0.2, weights=ppo.importance_weights(x[0], x[1], 1.1))
        fixed = ppo.importance_weights(x[0], x[1], 1.1).detach()
        plain, _ = ppo.policy_loss(*x, MASK, 0.2, weights=fixed)
        for found, wanted in zip(torch.autograd.grad(loss, x), torch.autograd.grad(plain, x), strict=True):
            assert torch.equal(found, wanted)
        weights = torch.ones(B, T).double().requires_grad_()
        loss, _ = ppo.policy_loss(*x, MASK, 0.2, weights=weights)
        assert torch.autograd.grad(loss, weights, allow_unused=True) == (None,)

    def test_their_mean_is_the_policy_gradient_of_pi_under_mu(self):
        """Without a cap, sum_a mu(a) w(a) A(a) grad log pi(a) = sum_a pi(a) A(a) grad log pi(a), over five tokens."""
        logits, other, advantages = random(5, seed=1).requires_grad_(), random(5, seed=2), random(5, seed=3)
        pi, mu = logits.log_softmax(-1), other.log_softmax(-1)
        expected = torch.autograd.grad(-(pi.detach().exp() * advantages * pi).sum(), logits)[0]
        pi = logits.log_softmax(-1)
        total = 0.0
        for a in range(5):
            one = pi[a].view(1, 1)
            weights = ppo.importance_weights(one, mu[a].view(1, 1), 1e9)
            loss, _ = ppo.policy_loss(
                one, one.detach(), advantages[a].view(1, 1), mask_of((1,), 1), 0.2, weights=weights
            )
            total = total + mu[a].exp() * loss
        close(torch.autograd.grad(total, logits)[0], expected)

    def test_arguments(self):
        with pytest.raises(ValueError, match="cap must be above 0, got 0"):
            ppo.importance_weights(torch.zeros(1), torch.zeros(1), 0)
        with pytest.raises(ValueError, match="must be equal"):
            ppo.policy_loss(*[torch.zeros(1, 2)] * 3, mask_of((2,), 2), 0.2, weights=torch.ones(1, 1))


class TestValueLoss:
    # V_old = 0, value_clip = 0.5 -> loss, gradient by V, clipped
    @pytest.mark.parametrize(
        "value, target, wanted, gradient, clipped",
        [
            (0.3, 1.0, 0.245, -0.7, 0),  # inside: 0.5 * 0.7^2
            (0.8, 1.0, 0.125, 0.0, 1),  # clipped to 0.5, farther: 0.5 * max(0.2^2, 0.5^2)
            (0.8, 0.0, 0.32, 0.8, 0),  # clipped to 0.5, nearer: 0.5 * max(0.8^2, 0.5^2)
            (-0.8, -1.0, 0.125, 0.0, 1),  # clipped to -0.5
        ],
    )
    def test_one_token_by_hand(self, value, target, wanted, gradient, clipped):
        values = f64([[value]]).requires_grad_()
        x = values, torch.zeros(1, 1).double(), f64([[target]])
        loss, stats = ppo.value_loss(*x, mask_of((1,), 1), 0.5)
        close(loss, wanted)
        close(torch.autograd.grad(loss, values)[0], [[gradient]])
        assert (stats["clipped"], stats["tokens"]) == (clipped, 1)
        assert not stats["loss_sum"].requires_grad

    @pytest.mark.parametrize("value_clip", [None, 0.2])
    @pytest.mark.parametrize("denominator", [None, 7.0])
    def test_against_a_loop(self, value_clip, denominator):
        values, old_values, returns = (random(B, T, seed=seed) for seed in range(3))
        total, clipped = 0.0, 0
        for b, t in REAL:
            value, old, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
            near = value if value_clip is None else min(max(value, old - value_clip), old + value_clip)
            total += 0.5 * max((value - target) ** 2, (near - target) ** 2)
            clipped += (near - target) ** 2 > (value - target) ** 2
        loss, stats = ppo.value_loss(values, old_values, returns, MASK, value_clip, denominator)
        close(loss, total / (denominator or len(REAL)))
        close(stats["loss_sum"], total)
        assert stats["clipped"] == clipped and (clipped > 0) == (value_clip is not None)

    def test_a_value_that_did_not_move_is_not_counted_as_clipped(self):
        values = random(50, 40, dtype=torch.float32) * 3
        stats = ppo.value_loss(values, values, random(50, 40, seed=1), torch.ones(50, 40, dtype=torch.bool), 0.2)[1]
        assert stats["clipped"] == 0

    def test_gradcheck(self):
        inputs = [random(B, T, seed=seed).requires_grad_() for seed in range(3)]
        for value_clip in (None, 0.2):
            assert torch.autograd.gradcheck(lambda *x, c=value_clip: ppo.value_loss(*x, MASK, c)[0], inputs)

    def test_arguments(self):
        with pytest.raises(ValueError, match="value_clip"):
            ppo.value_loss(*[torch.zeros(1, 1)] * 3, mask_of((1,), 1), 0.0)


class TestSharding:
    """Losses and stats of shards over one denominator add up to those of the whole, in value and gradient."""

    LOSSES = {
        "policy": lambda x, mask, n: ppo.policy_loss(*x, mask, 0.2, n, dual_clip=1.5),
        "value": lambda x, mask, n: ppo.value_loss(*x, mask, 0.2, n),
        "kl": lambda x, mask, n: ppo.kl_loss(*x, mask, "k2", n),
    }

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("rows", [(1, 1, 1, 1), (2, 2), (3, 1)])
    def test_shards_add_up(self, name, rows):
        loss = self.LOSSES[name]
        x = [random(B, T, seed=seed) for seed in range(3)]

        def sharded(first):
            parts = zip(*(y.split(rows) for y in (first, *x[1:], MASK)), strict=True)
            return sum(loss(part[:3], part[3], len(REAL))[0] for part in parts)

        def whole(first):
            return loss((first, *x[1:]), MASK, None)[0]

        close(sharded(x[0]), whole(x[0]))
        close(grad_of(sharded, x[0])[0], grad_of(whole, x[0])[0])

        wanted = loss(x, MASK, None)[1]
        parts = [loss(part[:3], part[3], 1)[1] for part in zip(*(y.split(rows) for y in (*x, MASK)), strict=True)]
        for key, value in wanted.items():
            combine = max if key.endswith("_max") else sum
            close(torch.as_tensor(combine(part[key] for part in parts)), value)


class TestAdaptiveKLCoef:
    # 0.1 * (1 + clip(kl / 6 - 1) * 50 / 1000)
    @pytest.mark.parametrize(
        "kl, wanted",
        [
            (6.0, 0.1),
            (6.6, 0.1 * (1 + 0.1 * 0.05)),  # 10% above
            (5.4, 0.1 * (1 - 0.1 * 0.05)),
            (60.0, 0.1 * (1 + 0.2 * 0.05)),  # far above: clipped
            (-3.0, 0.1 * (1 - 0.2 * 0.05)),
            (math.inf, 0.1 * (1 + 0.2 * 0.05)),
        ],
    )
    def test_by_hand(self, kl, wanted):
        assert ppo.adaptive_kl_coef(0.1, kl, 6.0, 50, 1000) == pytest.approx(wanted, rel=1e-12)

    def test_nan_is_not_hidden(self):
        assert math.isnan(ppo.adaptive_kl_coef(0.1, math.nan, 6.0, 50, 1000))

    def test_it_steers_to_the_target(self):
        kl_coef = 0.1
        for _ in range(5000):
            kl_coef = ppo.adaptive_kl_coef(kl_coef, 1 / kl_coef, 4.0, 64, 1000)  # a world in which kl = 1 / kl_coef
        assert kl_coef == pytest.approx(0.25, rel=1e-6)

    def test_arguments(self):
        for bad in ({"target": 0.0}, {"horizon": 0.0}, {"sequences": 5000}):
            with pytest.raises(ValueError, match="target|horizon"):
                ppo.adaptive_kl_coef(
                    **{"kl_coef": 0.1, "kl_per_sequence": 1.0, "target": 6.0}
                    | {"sequences": 64, "horizon": 1000.0}
                    | bad
                )


class TestExplainedVariance:
    def test_by_hand(self):
        # R = 1, 3, 5: variance 8/3. R - V = 1, 0, 2: mean 1, variance 2/3. 1 - 1/4.
        values, returns = tensor([[0.0, 3.0, 3.0, 9.0]]), tensor([[1.0, 3.0, 5.0, -9.0]])
        close(ppo.explained_variance(values, returns, mask_of((3,), 4)), 0.75)

    def test_marks(self):
        returns, mask = random(B, T), MASK
        close(ppo.explained_variance(returns + 3, returns, mask), 1.0)
        close(ppo.explained_variance(torch.full((B, T), 2.0), returns, mask), 0.0)
        close(ppo.explained_variance(-returns, returns, mask), -3.0)  # Var(2R) / Var(R) = 4

    def test_equal_returns_give_zero_not_noise(self):
        # 0.1 is inexact in float32, and so would be its float32 mean over 3 and its variance.
        assert ppo.explained_variance(random(1, 7), torch.full((1, 7), 0.1), mask_of((7,), 7)).item() == 0.0
