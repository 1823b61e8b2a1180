"""What is exported: which checkpoint of which run, by which recipe, and whether base and roles are still those."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from engine import checkpoint_store, dist
from engine.checkpoint import FOLDER, VERSION
from engine.command_line import parse
from engine.config import EvaluationConfig, Recipe, RewardConfig
from engine.errors import RecipeError
from engine.identity import changed_identity, identity_of
from engine.role_config import ReferenceConfig

logger = dist.get_logger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What is exported, from where and to where."""

    place: Path
    """A run's folder, for its newest whole checkpoint, or one of its checkpoints."""
    what: str
    output: Path | None = None
    """None: RUN/export/WHAT."""
    reward: str | None = None
    """Which one, by its name in the metrics; None: the only one."""
    dtype: str = "float32"
    """Of merged weights."""
    overrides: list[str] = field(default_factory=list)
    """Settings that win over the run's own, as on the command line of a run: another place of the base, say."""


@dataclass(frozen=True)
class Source:
    """What is exported, found and checked."""

    wanted: Wanted
    run: Path
    checkpoint: Path
    state: dict
    """What the checkpoint holds beside its tensors."""
    recipe: Recipe
    """As it ran; `loaded` is the part of it that this export needs."""
    loaded: Recipe
    output: Path
    reward: RewardConfig | None


def find(wanted: Wanted) -> Source:
    """What an export starts from.

    Raises:
        RecipeError: there is nothing to export like that, or the base is not that of the run.
    """
    run, checkpoint = _checkpoint(wanted.place)
    state = checkpoint_store.read_state(checkpoint)
    if state["version"] != VERSION:
        raise RecipeError(f"{checkpoint} is of format {state['version']}, this version reads {VERSION}")
    recipe = _recipe(state["recipe"], wanted.overrides)
    output = (wanted.output or run / "export" / wanted.what).absolute()
    problems, reward = [], None
    if output.exists():
        problems.append(f"output: {output} exists, and an export overwrites nothing; give another folder with --output")
    if wanted.what == "merged" and recipe.actor.train == "full":
        problems.append("what: an actor that trained in full has nothing to merge; give --what actor, a whole model")
    if wanted.what == "reward":
        reward, problem = _reward(recipe, wanted.reward)
        problems += [problem] if problem else []
    elif wanted.reward is not None:
        problems.append(f"reward: goes with --what reward alone, got --what {wanted.what}; leave it out")
    problems += _another(state, recipe, wanted.what)
    if problems:
        raise RecipeError(*problems)
    return Source(wanted, run, checkpoint, state, recipe, _needed(recipe, reward), output, reward)


def _checkpoint(place: Path) -> tuple[Path, Path]:
    """The run's folder, and the checkpoint that `place` is, or the newest whole one in it.

    Raises:
        RecipeError: there is none.
    """
    named = any((place / file).is_file() for file in (checkpoint_store.STATE, checkpoint_store.MANIFEST))
    run = place.absolute().parent.parent if named else place
    if not (named or (run / "recipe.yaml").is_file()):
        raise RecipeError(f"{place} is no run's folder and no checkpoint; name one of these")
    torn = []
    for path in [place.absolute()] if named else checkpoint_store.finished(run / FOLDER):
        problem = checkpoint_store.problem_of(path)
        if problem is None:
            for line in torn:
                logger.warning("passed over a torn checkpoint: %s", line)
            return run, path
        torn.append(problem)
    if torn:
        raise RecipeError(f"{torn[0]}; name a whole checkpoint, or the run's folder for its newest one")
    raise RecipeError(
        f"{run} has no checkpoint to export (checkpoint.every_iterations 0 keeps none); a finished run's final/ loads "
        "in peft as it is"
    )


def _recipe(values: dict, overrides: list[str]) -> Recipe:
    """By the way that any recipe goes: a file, and the command line that wins over it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        recipe = parse([str(file), *overrides])
    return recipe.model_copy(update={"output": None, "resume": None, "time_limit": None})


def _reward(recipe: Recipe, name: str | None) -> tuple[RewardConfig | None, str | None]:
    """The one that is meant, or what is wrong."""
    names = [reward.label for reward in recipe.rewards]
    if (name is None and len(names) > 1) or (name is not None and name not in names):
        got = "none" if name is None else repr(name)
        return None, f"reward: the run has {', '.join(names)}, got {got}; name one with --reward"
    chosen = recipe.rewards[names.index(name or names[0])]
    if chosen.function:
        said = f"reward: {chosen.label} is a Python function, {chosen.function}, which has no weights; take the file"
        return None, said
    return chosen, None


def _another(state: dict, recipe: Recipe, what: str) -> list[str]:
    """Whether base, tokenizer, roles or adapters are others than the run's."""
    roles = {"actor", "critic"} | ({"rewards"} if what == "reward" else set())

    def narrowed(identity: dict) -> dict:
        kept = {part: identity[part] for part in ("base", "tokenizer", "adapter shapes")}
        return {**kept, "roles": {role: identity["roles"][role] for role in sorted(roles)}}

    now = json.loads(json.dumps(identity_of(recipe)))
    remedy = "put the old one back, or say where it lies (--model.path FOLDER)"
    return changed_identity(narrowed(state["identity"]), narrowed(now), remedy)


def _needed(recipe: Recipe, reward: RewardConfig | None) -> Recipe:
    """Without the models and files that have no part in the export, which may be gone by now."""
    changes = {
        "rewards": [] if reward is None else [reward],
        "reference": ReferenceConfig(home="base"),
        "evaluation": EvaluationConfig(),
        "generation": recipe.generation.model_copy(update={"compile": False}),
        "toyworld": None,
    }
    return recipe.model_copy(update=changes)
