"""How good the policy is on held-out prompts: the same prompts and the same random numbers at every look."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engine import dist
from engine.advantages import ScoreCombiner
from engine.batch import Prompts, map_rows
from engine.config import Recipe
from engine.evaluation import evaluate, score
from engine.hybrid_engine import HybridEngine
from engine.metrics import Metrics
from engine.randomness import Stream
from engine.reward_sources import RewardSource, Texts
from engine.rollout import generate
from engine.stopping import Stops


@dataclass(frozen=True)
class Look:
    """The policy at one moment, over the held-out prompts of all ranks."""

    metrics: Metrics
    prompts: list[str]
    responses: list[str]
    scores: list[float]


class HeldOut:
    """Samples the held-out prompts and judges the responses.

    Args:
        prompts: this rank's rows of them.
        judge: f(prompts, responses) -> {metric: number}, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        stops: Stops,
        judge: Callable[[list[str], list[str]], dict[str, float]] | None,
    ):
        self.recipe, self.prompts, self.tokenizer, self.stops, self.judge = recipe, prompts, tokenizer, stops, judge

    def look(self, engine: HybridEngine, sources: list[RewardSource]) -> Look:
        """A collective; every rank gets the whole."""
        recipe = self.recipe
        with engine.generation() as actor:
            idle = engine.idle_pass
            rollout = generate(
                actor, self.prompts, recipe.generation, self.stops, recipe.seed, stream=Stream.EVALUATION, idle=idle
            )
        texts = Texts.of(self.prompts, rollout, self.tokenizer, recipe.generation.stop_strings)
        with engine.inference():
            source_scores = score(sources, rollout, texts)
            rollout = map_rows(rollout, dist.all_gather_rows)
            evaluation = evaluate(engine, rollout, source_scores, recipe)
        prompts = [text for part in dist.all_gather_objects(texts.prompts) for text in part]
        responses = [text for part in dist.all_gather_objects(texts.responses) for text in part]
        scores = ScoreCombiner(recipe).raw(evaluation)
        metrics = {
            "eval/score_mean": scores.mean().item(),
            "eval/kl_sequence_mean": (evaluation.old_logprobs - evaluation.ref_logprobs).sum(1).mean().item(),
            "eval/response_tokens_mean": rollout.response_lengths.float().mean().item(),
            "eval/eos_fraction": rollout.ended.float().mean().item(),
        }
        return Look(metrics | self._judged(prompts, responses), prompts, responses, scores.tolist())

    def _judged(self, prompts: list[str], responses: list[str]) -> Metrics:
        """What the judge says, asked once, by rank 0: it may be somebody's paid service.

        Raises:
            RunError: on every rank, when it raised or gave anything but a dict of finite numbers.
        """
        judged, problem = {}, None
        if self.judge is not None and dist.rank() == 0:
            try:
                judged = {f"eval/{name}": float(value) for name, value in self.judge(prompts, responses).items()}
                if not all(map(math.isfinite, judged.values())):
                    problem = f"the judge's numbers must be finite, got {judged}"
            except Exception as error:  # the user's code can raise anything
                problem = f"the judge {self.recipe.evaluation.judge} raised {type(error).__name__}: {error}"
        dist.agree(problem)
        return dist.broadcast_object(judged)
