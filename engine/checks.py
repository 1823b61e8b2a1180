"""What the schema can't check: files, all before any model loads and reported at once; and what deserves a warning."""

from __future__ import annotations

import os
from pathlib import Path

from engine import combinations, model_checks
from engine.config import Recipe, steps_per_iteration
from engine.ds_checks import machine_problems, stage_of
from engine.ds_config import read_ds_config
from engine.errors import RecipeError, problems_of
from engine.plugins import load_function
from engine.role_config import LoraSettings


def check_files(recipe: Recipe, built: bool = True) -> None:
    """Check everything that the recipe points at.

    Args:
        built: False before the toy world exists: what will lie in its folder is then left for a second call.

    Raises:
        RecipeError: every problem found.
    """
    world = Path(recipe.toyworld).resolve() if recipe.toyworld and not built else None

    def due(path: str) -> bool:
        return world is None or world not in Path(path).resolve().parents

    problems = _check_output(recipe)
    problems += _check_ds_config(recipe)
    problems += model_checks.problems_of(recipe, due)
    problems += [p for reward in recipe.rewards if reward.function for p in problems_of(load_function, reward.function)]
    if recipe.evaluation.judge:
        problems += problems_of(load_function, recipe.evaluation.judge)
    problems += [problem for dataset in recipe.datasets if due(dataset) for problem in _check_rows(recipe, dataset)]
    if due(recipe.data.dataset):
        problems += _check_columns(recipe)
    if problems:
        raise RecipeError(*problems)


def check_world(recipe: Recipe) -> None:
    """For what reads the toy world's models and doesn't build it.

    Raises:
        RecipeError: it isn't there yet.
    """
    if recipe.toyworld and not Path(recipe.toyworld).is_dir():
        raise RecipeError(
            f"toyworld: {recipe.toyworld} is not built yet; run the recipe once (--iterations 1), or make quickstart"
        )


def warnings_of(recipe: Recipe) -> list[str]:
    """What the recipe allows and its author may not have meant, for the log."""
    kl, generation, evaluation = recipe.kl, recipe.generation, recipe.evaluation
    warnings = []
    if kl.placement == "reward" and kl.estimator in ("k2", "k3"):
        warnings.append(
            f"kl.estimator {kl.estimator} in the reward does not have the KL's gradient as its expectation; k1 does"
        )
    if kl.placement == "reward" and kl.estimator == "full":
        warnings.append(
            "kl.estimator full in the reward leaves out the gradient of each token's own KL; k1 in the reward or full "
            "in the loss has it"
        )
    if kl.placement == "loss" and kl.estimator == "k3":
        warnings.append(
            "kl.estimator k3 in the loss has the gradient of the other direction, KL(reference || policy); k2 and full "
            "have that of KL(policy || reference)"
        )
    for role, settings in (("actor", recipe.actor), ("critic", recipe.critic)):
        if settings.optimizer.warmup_steps >= steps_per_iteration(recipe) * recipe.iterations:
            warnings.append(f"{role}.optimizer.warmup_steps is as long as the run: the peak rate is never reached")
    if generation.temperature == 0:
        warnings.append("generation.temperature 0 trains on argmax responses: nothing is explored")
    restricted = {
        "top_k": generation.top_k > 0,
        "top_p": generation.top_p < 1,
        "min_new_tokens": generation.min_new_tokens,
    }
    for key in (key for key, on in restricted.items() if on):
        warnings.append(
            f"generation.{key} restricts the draw alone: log-probs and ratio are those of the full softmax, so the "
            "update is not exactly on-policy"
        )
    if generation.min_new_tokens and generation.stop_strings:
        warnings.append(
            "generation.min_new_tokens with stop_strings: a response goes on behind a stop string that came too early, "
            "and what follows is not scored"
        )
    ignored = {
        "actor.lora": recipe.actor.train == "full" or recipe.actor.init_adapter is not None,
        "critic.lora": recipe.critic.home == "trunk" or recipe.critic.train == "full",
    }
    for key, unused in ignored.items():
        if unused and getattr(recipe, key.partition(".")[0]).lora != LoraSettings():
            warnings.append(f"{key} has no effect here: nothing trains an adapter made from it")
    if recipe.actor.init_adapter and recipe.reference_home == "base":
        warnings.append(
            "reference.home base with actor.init_adapter: the KL pulls the actor back to the base, away from where it "
            "starts; leave reference.home out for a frozen copy of the adapter"
        )
    if evaluation.dataset is None and (evaluation.judge or evaluation.every_iterations):
        warnings.append("evaluation.judge and evaluation.every_iterations have no effect without evaluation.dataset")
    return warnings


def _check_ds_config(recipe: Recipe) -> list[str]:
    problems = []
    try:
        raw = read_ds_config(recipe.zero.ds_config)
        problems += [f"{recipe.zero.ds_config}: {problem}" for problem in machine_problems(raw)]
        problems += combinations.problems_at_stage(recipe, stage_of(raw))
        size = raw.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
        if size != 1 and recipe.critic.home == "model":
            problems.append(
                f"{recipe.zero.ds_config}: zero_optimization.zero_hpz_partition_size takes one trained model, got "
                f"{size} with critic.home model: DeepSpeed makes its groups of ranks for the first one alone; set "
                "critic.home to adapter or trunk, or remove it"
            )
    except RecipeError as error:
        problems += error.problems
    try:
        raw = read_ds_config(recipe.zero.frozen_ds_config, frozen=True)
        problems += [f"{recipe.zero.frozen_ds_config}: {problem}" for problem in machine_problems(raw)]
    except RecipeError as error:
        problems += error.problems
    return problems


def _check_columns(recipe: Recipe) -> list[str]:
    """A reward function gets the columns by name, beside its own two arguments."""
    from engine.prompts import LOCAL_FORMATS, read_rows  # here: it imports torch

    if Path(recipe.data.dataset).suffix.lower() not in LOCAL_FORMATS or not any(r.function for r in recipe.rewards):
        return []
    try:
        taken = {"prompts", "responses"} & {name for row in read_rows(recipe.data) for name in row.values}
    except RecipeError:
        return []  # told by _check_rows
    taken -= {recipe.data.text_column}
    if not taken:
        return []
    return [
        f"{recipe.data.dataset}: a column named {' and '.join(sorted(taken))} would meet the reward function's "
        "argument of that name; rename it"
    ]


def _check_rows(recipe: Recipe, dataset: str) -> list[str]:
    from engine.prompts import LOCAL_FORMATS, read_rows  # here: it imports torch

    # A hub dataset is downloaded once, when the trainer reads it; that too comes before any model.
    return (
        problems_of(read_rows, recipe.data, dataset, recipe.generation)
        if Path(dataset).suffix.lower() in LOCAL_FORMATS
        else []
    )


def _check_output(recipe: Recipe) -> list[str]:
    if recipe.output is None or recipe.resume is not None:  # resume.py looks at the folder of a run that goes on
        return []
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        return [f"output: {folder} is a file; give a folder with --output"]
    if folder.is_dir() and any(folder.iterdir()):
        what = "already holds a run" if (folder / "recipe.yaml").exists() else "is not empty"
        return [f"output: {folder} {what}, and a run never overwrites one; give another folder with --output"]
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return [f"output: {folder} can't be made, {there} takes no new files; give another folder with --output"]
    return []
