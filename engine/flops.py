"""Useful floating-point operations of an iteration, counted from shapes: two for each multiply-add of a matrix product.

What the result needs is counted, not what the code happens to do: no padding, no recomputation, no masked attention,
and a sequence's last token is fed to nobody but the reward. docs/performance.md says more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from engine.config import Recipe
from engine.role_config import LoraSettings

Parts = dict[str, float]
"""FLOPs by what they were spent on."""

FORMULAS = """\
A pass over n positions, each seeing itself and those before it (p pairs in all), with the head at m of them:
  forward   2 n N + 4 p L a + 2 m H W
  backward  dX: as the forward, attention twice; dW: as the forward without attention, for weights that train;
            no dX into q, k, v of layer 0 where the embedding is frozen
N weights of all linear layers, those of an adapter that is computed beside them too; L layers; a = heads * head size;
H hidden size; W outputs of the head: the vocabulary, or 1 for a value and a score.
A sequence of P + R tokens: n = P + R - 1, p = n (n + 1) / 2, m = R. The reward reads all P + R, its head one."""


@dataclass(frozen=True)
class Decoder:
    """The matrix products of a Llama-like decoder."""

    linears: dict[str, tuple[int, int]]  # (inputs, outputs) of the linear layers of one layer, by name
    layers: int
    attention_width: int  # heads * head size
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Decoder:
        hidden, inner = config.hidden_size, config.intermediate_size
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        linears = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
        linears |= {"o_proj": (queries, hidden)}
        linears |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        return cls(linears, config.num_hidden_layers, queries, hidden, config.vocab_size)

    def weights(self, names: Iterable[str] | None = None) -> int:
        """Weights of one layer's linear layers, of all or of some."""
        return sum(i * o for name, (i, o) in self.linears.items() if names is None or name in names)

    def lora_weights(self, lora: LoraSettings) -> int:
        """Weights of one layer's A and B."""
        return sum(lora.rank * sum(self.linears[name]) for name in self.adapted(lora))

    def adapted(self, lora: LoraSettings) -> list[str]:
        return [name for name in self.linears if lora.targets == "all-linear" or name in lora.targets]


@dataclass(frozen=True)
class Work:
    """How much one pass over some sequences goes through."""

    positions: int  # through every layer
    pairs: int  # (query, key), a position with itself included
    outputs: int  # positions at which the head is evaluated

    @classmethod
    def of_policy(cls, lengths: Iterable[tuple[int, int]]) -> Work:
        """Log-probs or values of every response token, from (prompt, response) lengths.

        Sampling token by token with a cache goes over the same positions: each but the last is fed once.
        """
        fed = [(prompt + response - 1, response) for prompt, response in lengths]
        return cls(sum(n for n, _ in fed), sum(n * (n + 1) // 2 for n, _ in fed), sum(r for _, r in fed))

    @classmethod
    def of_score(cls, lengths: Iterable[tuple[int, int]]) -> Work:
        """One score at the end of each whole sequence."""
        whole = [prompt + response for prompt, response in lengths]
        return cls(sum(whole), sum(n * (n + 1) // 2 for n in whole), len(whole))


def forward(model: Decoder, work: Work, outputs: int, lora: LoraSettings | None = None) -> float:
    """FLOPs of a forward.

    Args:
        outputs: width of the head: the vocabulary, 1, or 0 for none.
        lora: of an adapter that is computed beside the weights.
    """
    weights = model.weights() + (model.lora_weights(lora) if lora else 0)
    head = 2 * work.outputs * model.hidden * outputs
    return 2 * work.positions * weights * model.layers + _attention(model, work) + head


def _attention(model: Decoder, work: Work) -> float:
    """Scores and weighted values of a forward."""
    return 4 * work.pairs * model.attention_width * model.layers


def backward(model: Decoder, work: Work, outputs: int, lora: LoraSettings | None, head_trains: bool = False) -> float:
    """FLOPs of the backward of a forward in which an adapter trains, or everything where `lora` is None."""
    inputs = forward(model, work, outputs, lora) + _attention(model, work)
    if lora is None:  # the embedding trains too: dX goes all the way down
        return inputs + forward(model, work, outputs) - _attention(model, work)
    first = {"q_proj", "k_proj", "v_proj"}  # of layer 0: their input is the frozen embedding
    unneeded = model.weights(first)
    unneeded += sum(lora.rank * model.linears[name][0] for name in first.intersection(model.adapted(lora)))
    head = 2 * work.outputs * model.hidden * outputs if head_trains else 0
    return inputs + 2 * work.positions * (model.lora_weights(lora) * model.layers - unneeded) + head


def phases(
    recipe: Recipe, policy: Decoder, rewards: list[Decoder | None], lengths: list[tuple[int, int]]
) -> dict[str, Parts]:
    """FLOPs of one iteration by phase and part, all ranks together.

    Args:
        rewards: the decoder of each reward with a model of its own; None: an adapter or a function.
        lengths: (prompt, response) of every sequence of the iteration.
    """
    return {
        "generation": _generation(recipe, policy, lengths),
        "inference": _inference(recipe, policy, rewards, lengths),
        "training": _training(recipe, policy, lengths),
    }


def _actor_lora(recipe: Recipe) -> LoraSettings | None:
    return recipe.actor.lora if recipe.actor.train == "lora" else None


def _critic_lora(recipe: Recipe) -> LoraSettings | None:
    return None if recipe.critic.home == "model" and recipe.critic.train == "full" else recipe.critic.lora


def _generation(recipe: Recipe, policy: Decoder, lengths: list[tuple[int, int]]) -> Parts:
    # In float32 the adapter is merged before sampling.
    lora = None if recipe.model.dtype == "float32" else _actor_lora(recipe)
    return {"actor": forward(policy, Work.of_policy(lengths), policy.vocabulary, lora)}


def _inference(recipe: Recipe, policy: Decoder, rewards: list[Decoder | None], lengths: list[tuple[int, int]]) -> Parts:
    work, whole = Work.of_policy(lengths), Work.of_score(lengths)
    parts = {"reference": forward(policy, work, policy.vocabulary)}
    recompute, trunk = recipe.ppo.old_logprobs == "recompute", recipe.critic.home == "trunk"
    if recompute or trunk:
        parts["actor"] = forward(policy, work, policy.vocabulary if recompute else 0, _actor_lora(recipe))
    if trunk:
        parts["value head"] = 2 * work.outputs * policy.hidden
    else:
        parts["critic"] = forward(policy, work, 1, _critic_lora(recipe))
    for settings, own in zip(recipe.rewards, rewards, strict=True):
        if settings.adapter:
            # Of the actor's rank: that is how the benchmark makes it.
            parts[settings.label] = forward(policy, whole, 1, recipe.actor.lora)
        elif own is not None:
            parts[settings.label] = forward(own, whole, 1)
    return parts


def _training(recipe: Recipe, policy: Decoder, lengths: list[tuple[int, int]]) -> Parts:
    work, vocabulary, lora = Work.of_policy(lengths), policy.vocabulary, _actor_lora(recipe)
    parts = {
        "actor forward": forward(policy, work, vocabulary, lora),
        "actor backward": backward(policy, work, vocabulary, lora),
    }
    if recipe.critic.home == "trunk":
        parts["value head"] = 2 * work.outputs * policy.hidden * (2 if recipe.critic.trunk_detach else 3)
    else:
        parts["critic forward"] = forward(policy, work, 1, _critic_lora(recipe))
        parts["critic backward"] = backward(policy, work, 1, _critic_lora(recipe), head_trains=True)
    if recipe.kl.placement == "loss" and recipe.kl.estimator == "full":
        parts["reference"] = forward(policy, work, vocabulary)
    return {name: recipe.ppo.epochs * count for name, count in parts.items()}
