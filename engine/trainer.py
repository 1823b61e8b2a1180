"""The loop: generation, inference, advantages, update; iteration after iteration, with a look at held-out prompts."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from engine import (
    dist,
    environment_checks,
    findings,
    models,
    preparation,
    progress,
    reward_sources,
    self_checks,
    toyworld,
    zero,
)
from engine.advantages import KLController, RunningMoments, ScoreCombiner, make_experience
from engine.batch import Experience, Prompts, Rollout, map_rows, take_rows
from engine.checkpoint import Checkpoints, name_of, restore
from engine.checkpoint_config import seconds_of
from engine.checks import check_files, warnings_of
from engine.config import Recipe
from engine.console import progress_bar
from engine.divergence import DIVERGENCE, go_back, sound_evaluation, sound_rollout
from engine.errors import RecipeError
from engine.evaluation import evaluate, score
from engine.export import export_final
from engine.findings import Finding
from engine.heldout import HeldOut, Look
from engine.hybrid_engine import HybridEngine
from engine.interruption import Interruption
from engine.metrics import (
    MetricSinks,
    PhaseClock,
    append_jsonl,
    check_finite,
    console_line,
    memory_metrics,
    padding_fraction,
    rollout_metrics,
    update_metrics,
)
from engine.plugins import load_function
from engine.probes import Size, Subject
from engine.prompts import PromptSet, PromptSource, load_prompts, share
from engine.report import before_after, draw_learning_curve
from engine.resume import Resumed, find
from engine.reward_sources import Texts
from engine.roles import ACTOR
from engine.rollout import generate
from engine.run_folder import RunFolder
from engine.run_state import Begun, RunState
from engine.stopping import Stops, check_vocabulary
from engine.update import update
from engine.watchdog import Watchdog

logger = dist.get_logger(__name__)

FINAL = "final"
"""The folder of a finished run's weights."""


def train(recipe: Recipe) -> Path:
    """Run a recipe from start to end; returns the run's folder.

    Raises:
        RecipeError: the recipe can't be run as it is, or can't go on with the run that it names.
        Stopped: it was asked to, and what there was to keep is on the disk.
        RunError: a reward function, a judge or the run's folder failed.
        FloatingPointError, Diverged: training diverged, and the recipe says to stop then.
    """
    looked_at = preparation.before_start(recipe, examine=recipe.self_check)
    zero.start(watched=recipe.watchdog_seconds is not None)
    watchdog = Watchdog(recipe.watchdog_seconds)
    interruption = Interruption(seconds_of(recipe.time_limit) if recipe.time_limit else None, watchdog)
    try:
        with watchdog:
            if recipe.toyworld:
                toyworld.prepare(recipe.toyworld)  # all ranks build it together
                preparation.together(partial(check_files, recipe))
            if recipe.self_check:
                findings.refuse(environment_checks.examine(recipe, looked_at))
            resumed = find(recipe)
            torch.manual_seed(recipe.seed)
            with progress.phase("loading"):
                trainer = Trainer(recipe, resumed)
            try:
                trainer.run(interruption)
            finally:
                trainer.close()
    finally:
        interruption.close()
    return trainer.folder.path


class Trainer:
    """One PPO run: its parts, built from the recipe, and the loop over them.

    Args:
        resumed: where it was stopped; None: it begins.
    """

    def __init__(self, recipe: Recipe, resumed: Resumed | None = None):
        self.recipe = recipe
        self.tokenizer = models.load_tokenizer(recipe.model)
        self.prompt_set = load_prompts(recipe.data, recipe.generation, self.tokenizer)
        self.prompts = self._prompt_source(self.prompt_set)
        with progress_bar("loading models", total=2) as advance:
            self.engine = HybridEngine.load(recipe)
            self._check_vocabulary(self.prompt_set)
            end_ids = models.end_token_ids(self.tokenizer, self.engine.roles.causal, recipe.generation.end_tokens)
            self.stops = Stops(end_ids, recipe.generation.stop_strings, self.tokenizer)
            advance("roles")
            self.sources = reward_sources.build(recipe, self.engine, self.tokenizer)
            advance("rewards")
        self.heldout = self._heldout()
        self.combiner = ScoreCombiner(recipe)
        self.kl = KLController(recipe.kl)
        self.interruption: Interruption | None = None
        self.state = RunState()
        if resumed is not None and resumed.checkpoint is not None:
            self._take_up(restore(self.engine, resumed.checkpoint, resumed.source, resumed.same_course))
        if recipe.self_check:
            findings.refuse(self.self_check(self_checks.AT_START, environment_checks.folder_of(recipe)))
        self.folder = RunFolder.claim(recipe, self.engine.ds_config, resumed)
        self.is_new = resumed is None or resumed.iteration < 0
        self.checkpoints = Checkpoints(recipe, self.folder.path, self.engine, self.folder.writes)
        self.sinks = MetricSinks(self.folder.path, self.state.iteration)

    def _take_up(self, state: RunState) -> None:
        """Go on from a state that a checkpoint kept; the engine has its weights already."""
        self.state = state
        self.kl.kl_coef = self.state.kl_coef
        self.combiner.moments = [RunningMoments(**moments) for moments in self.state.moments]
        self.engine.learning_rate_factor = self.state.learning_rate_factor

    def self_check(self, size: Size, folder: Path) -> list[Finding]:
        """Whether what was built keeps what training relies on, before it begins; nothing is changed by it."""
        parts = (self.engine, self.tokenizer, self.prompt_set, self.stops, self.sources)
        found = self_checks.examine(Subject(self.recipe, *parts, folder), size)
        logger.info("self-check: %d checks of the engine, %.1f s", len(found), sum(one.seconds for one in found))
        return found

    def run(self, interruption: Interruption) -> None:
        """All iterations that are left, then the final adapters and the report."""
        self.interruption, interruption.checkpoints = interruption, self.checkpoints
        interruption.watchdog.checkpoints = self.checkpoints
        for warning in warnings_of(self.recipe):
            logger.warning("note: %s", warning)
        last = self.recipe.iterations
        if self.state.iteration >= last and (self.folder.path / FINAL).exists():
            logger.info("%s is complete: %d iterations of %d", self.folder.path, self.state.iteration, last)
            return
        base = dist.all_gather_objects(self.engine.frozen_hash())
        before = self._look(0) if self.is_new else self.folder.first_look()
        if self.is_new and self.recipe.failures.on_divergence == "roll_back":
            self._keep(0)
            self.checkpoints.write(self.state, name_of(self.state))  # to go back to before there is another
        after = None
        with progress_bar("PPO", last, self.state.iteration) as advance, progress.phase("between phases"):
            while (iteration := self.state.iteration) < last:
                try:
                    metrics = self.iterate(self.state.begun or Begun(iteration))
                    self.sinks.write(iteration + 1, metrics)
                    logger.info(console_line(iteration + 1, last, metrics))
                    after = self._look(iteration + 1)
                except DIVERGENCE as error:
                    self._go_back(error)
                    advance("rolled back", by=self.state.iteration - iteration)
                    continue
                advance(f"score {metrics['score/mean']:+.3f}")
                self._keep(iteration + 1)
                self.checkpoints.at_rest(self.state)
                looked = after.metrics if after else {}
                self.checkpoints.after_iteration(self.state, metrics | looked, last=iteration + 1 == last)
        with progress.phase("export"):
            self._finish(base, before, after or self.folder.last_look())

    def _keep(self, iteration: int, begun: Begun | None = None) -> None:
        """The state between two iterations: `iteration` are complete."""
        moments = [asdict(moments) for moments in self.combiner.moments]
        self.state = replace(self.state, iteration=iteration, kl_coef=self.kl.kl_coef, moments=moments, begun=begun)

    def _go_back(self, error: Exception) -> None:
        """To the last good checkpoint, as often as the recipe allows; the files go on from there, too."""
        state = go_back(error, self.recipe, self.state, self.engine, self.checkpoints, self.folder)
        self._take_up(state)
        self.sinks.close()
        self.sinks = MetricSinks(self.folder.path, state.iteration)

    def iterate(self, begun: Begun) -> dict[str, float]:
        """One iteration of PPO, or what is left of it; returns its metrics."""
        recipe, iteration, clock = self.recipe, begun.iteration, PhaseClock(begun.spent)
        progress.begin_iteration(iteration + 1)
        self._keep(iteration, begun)  # before the statistics of scores take this iteration in

        def phase_is_done() -> None:
            begun.spent = clock.so_far
            self.checkpoints.at_rest(self.state)
            self.checkpoints.in_iteration(self.state)

        def step_is_done() -> None:
            begun.spent, stop = clock.so_far, self.interruption is not None and self.interruption.check()
            self.checkpoints.in_iteration(self.state, asked=stop)
            if stop:
                self.interruption.stop()

        prompts = self.prompts.batch(iteration + self.state.prompt_shift, dist.rank(), dist.world_size())
        if begun.rollout is None:
            with clock.phase("generation"):
                begun.rollout = sound_rollout(self._generate(prompts), iteration)
            phase_is_done()
        mine = take_rows(begun.rollout, share(len(begun.rollout), dist.rank(), dist.world_size()))
        texts = Texts.of(prompts, mine, self.tokenizer, recipe.generation.stop_strings)
        if begun.evaluation is None:
            with clock.phase("inference"), self.engine.inference():
                scores = score(self.sources, mine, texts)
                found = evaluate(self.engine, begun.rollout, scores, recipe)
                begun.evaluation = sound_evaluation(found, iteration, recipe.failures.kl_abort)
            phase_is_done()
        rollout, evaluation, stats = begun.rollout, begun.evaluation, begun.stats
        self.checkpoints.moving()
        with clock.phase("training"):
            experience = make_experience(rollout, evaluation, recipe, self.combiner, self.kl.kl_coef)
            frozen = frozenset({ACTOR}) if iteration < recipe.critic.warmup_iterations else frozenset()
            update(self.engine, experience, recipe, iteration, self.kl.kl_coef, frozen, stats, step_is_done)
        self.checkpoints.at_rest(self.state)
        metrics = {
            **rollout_metrics(experience, self.combiner.raw(evaluation), [source.name for source in self.sources]),
            **update_metrics(stats),
            **clock.metrics(),
            **memory_metrics(),
            "kl_coef": self.kl.kl_coef,
            "generation/resident_fraction": self.engine.replica.resident_fraction,
            "padding/fraction": padding_fraction(experience, stats),
            "data/prompts_dropped": self.prompt_set.dropped,
            "data/prompts_truncated": self.prompt_set.truncated,
            "failures/roll_backs": self.state.roll_backs,
        }
        self.kl.update(metrics["kl/k1_sequence_mean"], len(rollout))
        self._keep_samples(iteration, prompts, texts, experience)
        return metrics

    def _generate(self, prompts: Prompts) -> Rollout:
        """Responses to the prompts of all ranks, on every rank.

        A row is kilobytes. With the rows of all ranks on each, dealing, whitening, metrics and minibatches are
        one-process code whose result can't depend on who sampled what.
        """
        settings, seed = self.recipe.generation, self.recipe.seed
        with self.engine.generation() as actor:
            mine = generate(actor, prompts, settings, self.stops, seed, idle=self.engine.idle_pass)
        return map_rows(mine, dist.all_gather_rows)

    def _prompt_source(self, prompts: PromptSet) -> PromptSource:
        data = self.recipe.data
        return PromptSource(prompts, self.recipe.seed, data.prompts_per_iteration, data.samples_per_prompt)

    def _check_vocabulary(self, prompts: PromptSet) -> None:
        rows = self.engine.roles.causal.config.get_text_config().vocab_size
        problems = check_vocabulary(self.tokenizer, rows, {token for record in prompts.records for token in record.ids})
        if problems:
            raise RecipeError(*problems)

    def _heldout(self) -> HeldOut | None:
        settings = self.recipe.evaluation
        if settings.dataset is None:
            return None
        found = load_prompts(self.recipe.data, self.recipe.generation, self.tokenizer, settings.dataset)
        if found.dropped or found.truncated:
            logger.warning("held-out prompts: %d dropped, %d truncated", found.dropped, found.truncated)
        self._check_vocabulary(found)
        source = self._prompt_source(found)
        judge = load_function(settings.judge) if settings.judge else None
        prompts = source.head(settings.prompts, dist.rank(), dist.world_size())
        return HeldOut(self.recipe, prompts, self.tokenizer, self.stops, judge)

    def _look(self, iteration: int) -> Look | None:
        """Held-out prompts after `iteration` iterations, when it is time for them."""
        every, last = self.recipe.evaluation.every_iterations, self.recipe.iterations
        due = iteration in (0, last) or (every and iteration % every == 0)
        if self.heldout is None or not due:
            return None
        with progress.phase("evaluation"):
            look = self.heldout.look(self.engine, self.sources)
        check_finite(look.metrics, f"held-out metrics after {iteration} iterations")
        logger.info("held-out  %s", "  ".join(f"{n.removeprefix('eval/')} {v:.3f}" for n, v in look.metrics.items()))
        if dist.rank() == 0:
            append_jsonl(self.folder.path / "evaluation.jsonl", [{"iteration": iteration, **look.metrics}])
            rows = zip(look.prompts, look.responses, look.scores, strict=True)
            self.folder.add_samples(iteration, "heldout", rows)
        return look

    def _keep_samples(self, iteration: int, prompts: Prompts, texts: Texts, experience: Experience) -> None:
        if dist.rank() == 0 and len(prompts):
            rows = zip(texts.prompts, texts.responses, experience.scores.tolist()[: len(prompts)], strict=True)
            self.folder.add_samples(iteration + 1, "training", rows)

    def _finish(self, base: list[str], before: Look | None, after: Look | None) -> None:
        unfinished = self.folder.path / f".{FINAL}"
        if dist.rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was stopped here
        export_final(self.engine, unfinished, self.recipe, self.tokenizer)
        if dist.rank() == 0:
            unfinished.rename(self.folder.path / FINAL)
        now = dist.all_gather_objects(self.engine.frozen_hash())
        if dist.rank() != 0:
            return
        self.folder.write_json("base_shards.json", {"sha256_by_rank_before": base, "sha256_by_rank_after": now})
        draw_learning_curve(self.folder.path)
        if before is not None:
            page = before_after(before, after)
            (self.folder.path / "before_after.txt").write_text(page)
            logger.info("\n%s", page)
        logger.info("frozen shards %s; run folder: %s", "unchanged" if now == base else "CHANGED", self.folder.path)
        assert now == base, "frozen weights changed during training: see base_shards.json"

    def close(self) -> None:
        """Give back files, engines and buffers."""
        self.sinks.close()
        for source in self.sources:
            source.close()
        self.engine.close()
