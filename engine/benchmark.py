"""The benchmark: iterations of the real trainer on a made-up workload, and what this machine could do at most."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from engine import dist, flops, logprob_memory, machine, models, workloads, zero
from engine.checks import check_files
from engine.config import Recipe
from engine.console import progress_bar
from engine.errors import RecipeError
from engine.rollout import generate
from engine.run_state import Begun
from engine.stopping import Stops
from engine.trainer import Trainer

PHASES = ("generation", "inference", "training")
WARM_UP_ITERATIONS = 1
REPEATS = 3


def run(workload: str, recipe: Recipe, assets: Path) -> dict:
    """Measure a workload; every rank calls it and gets the same result, as JSON would hold it.

    Args:
        recipe: the workload's own, with whatever the command line changed.

    Raises:
        RecipeError: the recipe can't be run, or too few iterations are left to measure.
    """
    if recipe.iterations <= WARM_UP_ITERATIONS:
        raise RecipeError(f"iterations must be above {WARM_UP_ITERATIONS}, the warm-up; got {recipe.iterations}")
    zero.start()
    if dist.rank() == 0:
        workloads.build(workload, assets)
    dist.barrier()
    check_files(recipe)
    torch.manual_seed(recipe.seed)
    trainer = Trainer(recipe)
    trainer.stops = Stops(())  # no end token: each response ends at its own limit and nowhere else
    try:
        result = {
            "workload": workload,
            "folder": str(trainer.folder.path),
            "machine": machine.describe(trainer.engine.device),
            "ranks": dist.world_size(),
            "dtype": recipe.model.dtype,
            **_iterations(trainer),
        }
        result["generation_against_plain"] = generation_against_plain(trainer)
    finally:
        trainer.close()
    if workload == "wide-vocab":
        result["logprob_memory"] = _logprob_memory(recipe)
    return result | {"phases": summary(result)}


def summary(result: dict) -> dict[str, dict]:
    """Each phase and the whole iteration: minimum and median over the iterations after the warm-up, and the rates."""
    timed = result["iterations"][WARM_UP_ITERATIONS:]
    ranks, limit = result["ranks"], max(result["limit_flops_per_second"])
    totals = {phase: sum(parts.values()) / ranks for phase, parts in result["flops"].items()}
    totals["iteration"] = sum(totals.values())
    # On an accelerator the processor's time says little.
    busy = "cpu_seconds" if result["machine"]["device"] == "cpu" else "wall_seconds"
    found = {}
    for phase, count in totals.items():
        seconds = {
            "cpu_seconds": [statistics.mean(one["cpu_seconds"][phase]) for one in timed],
            "wall_seconds": [max(one["wall_seconds"][phase]) for one in timed],
        }
        both = {name: {"min": min(of), "median": statistics.median(of)} for name, of in seconds.items()}
        rate = count / both[busy]["median"]
        found[phase] = {
            **both,
            "response_tokens_per_second": result["response_tokens"] / both["wall_seconds"]["median"],
            "flops_of_a_rank": count,
            "flops_per_second": rate,
            "share_of_limit": rate / limit,
        }
    return found


def _iterations(trainer: Trainer) -> dict:
    """All iterations, with the machine's limit measured before, between and after them."""
    recipe, dtype = trainer.recipe, models.DTYPES[trainer.recipe.model.dtype]
    limits, records = [machine.matrix_flops_per_second(dtype, trainer.engine.device)], []
    with progress_bar("benchmark", recipe.iterations) as advance:
        for iteration in range(recipe.iterations):
            records.append(measure(trainer, iteration))
            limits.append(machine.matrix_flops_per_second(dtype, trainer.engine.device))
            trainer.sinks.write(iteration + 1, records[-1]["metrics"])
            advance(f"{records[-1]['cpu_seconds']['iteration'][0]:.1f} CPU s")
    lengths = _lengths(trainer)
    tokens = sum(response for _, response in lengths)
    assert all(one["metrics"]["rollout/tokens"] == tokens for one in records), "a response ended early"
    return {
        "iterations": records,
        "limit_flops_per_second": limits,
        "sequences": len(lengths),
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "response_tokens": tokens,
        "flops": flops.phases(recipe, _decoder(recipe.model.path), _reward_decoders(recipe), lengths),
    }


def measure(trainer: Trainer, iteration: int) -> dict:
    """One iteration: seconds and peak memory of every rank, and rank 0's metrics."""
    device = trainer.engine.device
    machine.reset_peaks(device)
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    metrics = trainer.iterate(Begun(iteration))
    own = {
        "cpu_seconds": {"iteration": time.process_time() - cpu},
        "wall_seconds": {"iteration": time.perf_counter() - wall},
    }
    for phase in PHASES:
        own["cpu_seconds"][phase] = metrics[f"cpu/{phase}_seconds"]
        own["wall_seconds"][phase] = metrics[f"time/{phase}_seconds"]
    ranks = dist.all_gather_objects((own, machine.peak_rss_bytes(), machine.peak_device_bytes(device)))
    found = {kind: {name: [seconds[kind][name] for seconds, *_ in ranks] for name in own[kind]} for kind in own}
    found["peak_rss_bytes"] = [resident for _, resident, _ in ranks]
    found["peak_device_bytes"] = [held for *_, held in ranks if held is not None]
    return {**found, "load": os.getloadavg()[0], "metrics": metrics}


def _lengths(trainer: Trainer) -> list[tuple[int, int]]:
    """(prompt, response) tokens of every sequence of an iteration: the same in each, in another order."""
    prompts = trainer.prompts.batch(0)
    return list(zip(prompts.prompt_lengths.tolist(), prompts.max_new_tokens.tolist(), strict=True))


def _decoder(path: str) -> flops.Decoder:
    return flops.Decoder.of(models.AutoConfig.from_pretrained(path))


def _reward_decoders(recipe: Recipe) -> list[flops.Decoder | None]:
    return [_decoder(reward.model) if reward.model else None for reward in recipe.rewards]


def generation_against_plain(trainer: Trainer) -> dict:
    """The generation phase, gathering included, against a plain model that this process loads whole.

    The same prompts, the same sampler. In 16 bit the gathered copy computes its adapter beside the weights; the plain
    model has none.
    """
    recipe, device = trainer.recipe, trainer.engine.device
    prompts = trainer.prompts.batch(0, dist.rank(), dist.world_size())
    plain = models.load_causal(recipe.model).to(device)

    given = (prompts, recipe.generation, trainer.stops, recipe.seed)

    def gathered() -> None:
        with trainer.engine.generation() as module:
            generate(module, *given, idle=trainer.engine.idle_pass)

    def alone() -> None:
        with torch.inference_mode():
            generate(plain, *given)

    seconds = {"gathered": [], "plain": []}
    for _ in range(REPEATS):
        for name, work in (("gathered", gathered), ("plain", alone)):
            dist.barrier()
            seconds[name].append(machine.seconds_of(work, device))
    best = {name: min(of) for name, of in seconds.items()}
    ranks = dist.all_gather_objects(best)
    means = {f"{name}_seconds": statistics.mean(own[name] for own in ranks) for name in best}
    return means | {"ratio": means["gathered_seconds"] / means["plain_seconds"]}


def _logprob_memory(recipe: Recipe) -> dict:
    """On rank 0, while the others wait: the naive side needs gigabytes."""
    sizes = (recipe.ppo.micro_batch_sequences, recipe.data.max_prompt_tokens, recipe.generation.max_new_tokens)
    found = logprob_memory.compare(recipe, *sizes) if dist.rank() == 0 else None
    return dist.broadcast_object(found)
