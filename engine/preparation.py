"""Before ranks are a group: each looks at what its host has, and what is wrong on any is told on all, with the host.

Nothing is loaded or compiled yet, so a file that is missing on one node costs seconds and leaves nobody waiting. What
comes from the hub is fetched by one rank of each node: caches are the node's own, or one that all share.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from engine import dist, environment_checks
from engine.checks import check_files
from engine.config import Recipe
from engine.errors import RecipeError, RunError, problems_of
from engine.findings import Finding
from engine.model_checks import is_hub_name
from engine.prompts import LOCAL_FORMATS, read_rows

WEIGHTS = ["*.safetensors"]
OLDER_WEIGHTS = ["*.bin"]
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def before_start(recipe: Recipe, examine: bool = True) -> list[Finding]:
    """Look at everything that the recipe points at, and at this machine; returns what was found of that.

    Args:
        examine: the machine, too.

    Raises:
        RecipeError: on every rank, what was wrong on any.
    """
    found: list[Finding] = []
    # Before ranks meet: it asks whether the port where they will is free.
    problems = problems_of(lambda: found.extend(environment_checks.before_start())) if examine else []
    try:
        dist.on_first_of_each_node(partial(fetch, recipe))
        together(partial(check_files, recipe, built=not recipe.toyworld), problems)
    except RunError:
        if problems:
            raise RecipeError(*problems) from None
        raise
    return found


def together(check: Callable[[], None], problems: list[str] | None = None) -> None:
    """Make a check on every rank, and end as one.

    Args:
        problems: that this rank has already.

    Raises:
        RecipeError: on every rank, what was wrong on any.
    """
    if told := tell(dist.exchange_with_hosts(problems_of(check) + (problems or []))):
        raise RecipeError(*told)


def tell(everywhere: list[tuple[str, list[str]]]) -> list[str]:
    """The problems of all ranks as one list; `everywhere` has each rank's host and problems.

    What all ranks found is said once; the rest with the host, which is where to look for it.
    """
    ranks_with: dict[str, list[int]] = {}
    for rank, (_, problems) in enumerate(everywhere):
        for problem in dict.fromkeys(problems):
            ranks_with.setdefault(problem, []).append(rank)
    told = []
    for problem, ranks in ranks_with.items():
        hosts = dict.fromkeys(everywhere[rank][0] for rank in ranks)
        where = f"on {', '.join(hosts)} (rank {', '.join(map(str, ranks))}): "
        told.append(problem if len(ranks) == len(everywhere) else where + problem)
    return told


def from_the_hub(recipe: Recipe) -> dict[str, str | None]:
    """Names of models that are no folders here, each with its revision; empty: there is nothing to fetch."""
    models = {recipe.model.path: recipe.model.revision}
    others = [recipe.critic.path, recipe.reference.path, *(reward.model for reward in recipe.rewards)]
    models |= {path: None for path in others if path and path not in models}
    if recipe.toyworld:
        models = {path: at for path, at in models.items() if Path(recipe.toyworld) not in Path(path).parents}
    return {path: revision for path, revision in models.items() if is_hub_name(path)}


def fetch(recipe: Recipe) -> None:
    """Bring the models, and a data set of the hub, into this node's cache.

    What can't be had is left to the checks, which say so in the words of the recipe.
    """
    for path, revision in from_the_hub(recipe).items():
        from huggingface_hub import snapshot_download  # here: most recipes name folders

        try:
            get = partial(snapshot_download, path, revision=revision)
            here = Path(get(allow_patterns=[*BESIDE_WEIGHTS, *WEIGHTS]))
            if not any(here.glob(WEIGHTS[0])):
                get(allow_patterns=OLDER_WEIGHTS)
        except Exception:  # network, authorisation, name, disk: told when it is asked for again
            continue
    for dataset in recipe.datasets:
        if Path(dataset).suffix.lower() not in LOCAL_FORMATS:
            problems_of(read_rows, recipe.data, dataset)


def writes_for_its_node(folder: Path) -> bool:
    """Whether this rank is to write what goes into a folder: rank 0, and one of each node that has a disk of its own.

    The folder is there already; all ranks call it (a collective).
    """
    token = folder / f".{dist.broadcast_object(uuid.uuid4().hex)}"
    if dist.rank() == 0:
        token.touch()
    dist.barrier()
    sees_rank_0 = token.exists()
    dist.barrier()
    if dist.rank() == 0:
        token.unlink()
    return dist.rank() == 0 or (dist.local_rank() == 0 and not sees_rank_0)


def copy_to_own_disks(folder: Path, writes: bool) -> None:
    """What rank 0 wrote, to the byte, by every rank that writes for a node of its own (a collective).

    Args:
        writes: what `writes_for_its_node` said of the folder.
    """
    if any(dist.all_gather_objects(writes and dist.rank() != 0)):
        files = [file for file in folder.rglob("*") if file.is_file()] if dist.rank() == 0 else []
        bytes_of = {
            file.relative_to(folder).as_posix(): torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            for file in files
        }
        for name, content in dist.broadcast_tensors({"files": bytes_of}, source=0)["files"].items():
            if writes and dist.rank() != 0:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.numpy().tobytes())
    dist.barrier()
