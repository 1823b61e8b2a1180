"""Whether the engine, as it stands on this machine with this recipe, keeps what PPO relies on: on a few short rows.

Each check is a comparison that no working engine can fail, and that one with the fault it is named for does. They leave
no trace: weights, generators, what DeepSpeed remembers and the counts of traffic are what they were.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from engine import dist, environment_checks, fetching, randomness, traffic, zero
from engine.batch import Rollout, take_rows
from engine.evaluation import evaluate
from engine.findings import Finding, Result, find, together, within
from engine.minibatches import deal
from engine.probes import (
    CHANGED_BEFORE,
    CHANGED_END,
    CUT,
    MadeUp,
    Sample,
    Size,
    Subject,
    by_name,
    differing,
    felt,
    generated,
    largest,
    nudged,
    off,
    rows_of,
)
from engine.randomness import Stream
from engine.reward_sources import RewardModel
from engine.sampling import token_uniforms

AT_START, WHOLE = Size(rows=4, tokens=6), Size(rows=12, tokens=24)


def examine(subject: Subject, size: Size) -> list[Finding]:
    """All checks, of all ranks (a collective)."""
    with ExitStack() as stack:
        for left_alone in (randomness.untouched(), traffic.uncounted(), subject.engine.unremembered()):
            stack.enter_context(left_alone)
        for source in subject.sources:
            if isinstance(source, RewardModel):
                stack.enter_context(fetching.unremembered(source.engine.engine))
        stack.enter_context(subject.engine.inference())
        sample = Sample.of(subject, size)
        return together([find(name, check, subject, sample) for name, check in CHECKS.items()])


def first_ratio(subject: Subject, sample: Sample) -> Result:
    """Old log-probs by inference, against the same tokens in forwards cut and asked for as an update's."""
    recipe, engine, rollout = subject.recipe, subject.engine, sample.rollout
    ppo = recipe.ppo.model_copy(update={"old_logprobs": "recompute"})
    scores = torch.zeros(len(rollout), 1)
    old_logprobs = evaluate(engine, rollout, scores, recipe.model_copy(update={"ppo": ppo})).old_logprobs
    full_kl = recipe.kl.placement == "loss" and recipe.kl.estimator == "full"
    plan = deal(torch.arange(len(rollout)), rollout.sequence_lengths, recipe.ppo, dist.world_size())
    deviations = []
    for rows in plan[dist.rank()]:
        output = engine.forward(rollout, rows, entropy=True, values=True, full_kl=full_kl)
        ratio = (output.logprobs.cpu() - old_logprobs[rows]).exp()[rollout.response_mask[rows]]
        deviations += (ratio - 1).abs().tolist()
    return within(
        largest(deviations),
        subject.bound,
        "before any step max |ratio - 1| must be rounding, got {measured}: inference and update compute different "
        "policies (dropout, a layer that draws at random or looks at the batch); the model can't be trained like this",
    )


def adapters_off(subject: Subject, sample: Sample) -> Result:
    """With all trained adapters moved, the reference says what it said, and the actor something else."""
    if not subject.adapters:
        return "no adapter is trained", None
    before = by_name(subject.said(sample.rollout))
    with nudged(subject.adapters):
        after = by_name(subject.said(sample.rollout))
    moved, acted = (off(after[name], before[name]) for name in ("ref_logprobs", "logprobs"))
    measured = f"moves by {moved:.1e}, the actor by {acted:.1e}"
    if subject.recipe.actor.train == "lora" and acted == 0:
        return measured, (
            "the actor must follow its adapter, got log-probs that stay when it is changed: the adapter is not used; "
            "look at actor.lora.targets"
        )
    if moved <= (min(subject.bound, acted / 100) if acted else subject.bound):
        return measured, None
    return measured, (
        f"the reference must not follow what is trained, got log-probs that move by {moved:.1e} with the adapters: "
        "they are not switched off for it, so the KL would hold the policy near itself; set reference.home to model"
    )


def batched_is_alone(subject: Subject, sample: Sample) -> Result:
    """Log-probs, values and scores of a row among others, padded, against those of the row alone."""
    prompts, rows = sample.prompts, range(len(sample.rollout))
    # Cut, so that some are padded, by tokens that are none of theirs.
    lengths = sample.rollout.response_lengths // (1 + torch.arange(len(rows)) % 3)
    rollout = replace(sample.rollout, response_lengths=lengths.clamp(min=1))

    def one(row: int) -> Rollout:
        return take_rows(rollout, slice(row, row + 1))

    with nudged(subject.adapters | subject.heads):
        batched = by_name(subject.said(rollout))
        alone = [by_name(subject.said(one(row))) for row in rows]
    batched |= subject.scores(prompts, rollout)
    alone = [of_row | subject.scores(rows_of(prompts, [row]), one(row)) for row, of_row in enumerate(alone)]
    found = {name: off(torch.cat([of_row[name] for of_row in alone]), x) for name, x in batched.items()}
    worst = largest(found.values())
    name = next(name for name, x in found.items() if x == worst or x != x)
    return within(
        worst,
        subject.bound,
        f"a row must not depend on its company or padding, and its {name} does by {{measured}}: the model ignores its "
        "attention mask or its positions; try another model.attn_implementation, or ppo.packing false if it is true",
    )


def end_token_counts(subject: Subject, sample: Sample) -> Result:
    """Made-up responses whose end token is also what fills the padding, with changes that must be felt or must not."""
    made = MadeUp.of(subject, sample.prompts)
    versions = made.rollout(), made.rollout(filler=made.words[0]), made.rollout(changed=True)
    with nudged(subject.adapters | subject.heads):
        plain, filled, changed = (by_name(subject.said(rollout)) for rollout in versions)
    scores, filled_scores, changed_scores = (subject.scores(made.prompts, rollout) for rollout in versions)
    padding = largest(off((filled | filled_scores)[name], x) for name, x in (plain | scores).items())
    rollout, exactly = versions[0], subject.recipe.model.dtype != "float32"
    before, after = plain["values"], changed["values"]
    # V at a token is read before it. So it knows nothing of that token, and all of those before.
    early = off(after[CHANGED_END, :3], before[CHANGED_END, :3])
    ends = plain["logprobs"].gather(1, rollout.response_lengths[:, None] - 1)
    wrong = {
        "the mask leaves it out": not torch.equal(rollout.response_mask.sum(1), rollout.response_lengths),
        "it has no log-prob": bool((ends == 0).any()),
        f"what fills the padding moves a result by {padding:.1e}": not padding <= subject.bound,
        f"a value knows the token that it is read before, by {early:.1e}": not early <= subject.bound,
        "a value knows nothing of the token before": not felt(after[CHANGED_BEFORE], before[CHANGED_BEFORE], exactly),
    }
    for name, score in scores.items():
        # Where it is cut off, a score that passes it over is the same; where another token stands, one read before it.
        seen = [felt(changed_scores[name][rows], score[rows], exactly) for rows in (CUT, CHANGED_END)]
        wrong[f"the {name} does not see it"] = not all(seen)
    return _all_right(
        wrong,
        f"{len(wrong)} properties, padding moves {padding:.1e}",
        "an end token that equals the padding is a token like any other",
        "masks and positions must come from lengths; give the tokenizer a pad_token of its own, or name a model of "
        "another type",
    )


def gathered_is_sharded(subject: Subject, sample: Sample) -> Result:
    """The sampler's log-probs are the engine's; with more or fewer weights fetched while decoding, the same tokens."""
    engine, rollout = subject.engine, sample.rollout
    mask, logprobs = rollout.response_mask, by_name(subject.said(rollout))["logprobs"]
    measured, problem = within(
        off(rollout.sampler_logprobs[mask], logprobs[mask]),
        subject.bound,
        "the sampler must be the policy that trains, got log-probs off by {measured}: responses would come from "
        "another policy; ppo.importance_cap corrects for it, and another model type may not need it",
    )
    if problem or engine.engine.stage != 3:
        return measured, problem
    resident = engine.replica.resident_fraction
    with engine.generation(0 if resident else engine.replica.largest_group_bytes) as actor:
        again = generated(subject, actor, sample.prompts, sample.settings)
    rows = differing(sample.mine, again, sample.margins, subject.bound)
    measured += f"; {resident:.0%} and {engine.replica.resident_fraction:.0%} gathered"
    return measured, None if not rows else (
        f"gathered weights and weights fetched while decoding must sample the same, got others in rows {rows}: "
        "set generation.gather_budget_bytes to 1000000000000000 (all is gathered) or to 0 (nothing)"
    )


def random_numbers(subject: Subject, sample: Sample) -> Result:
    """One for each prompt, sample and position, none twice, and the same whoever computes it beside whatever else."""
    draws, samples = torch.arange(32).repeat_interleave(2), torch.arange(2).repeat(32)

    def numbers(rows: slice) -> Tensor:
        return token_uniforms(subject.recipe.seed, Stream.SELF_CHECKS, draws[rows], samples[rows], 8)

    all_, last = numbers(slice(None)), numbers(slice(-1, None))
    hashes = dist.all_gather_objects(hashlib.sha256(all_.numpy().tobytes()).hexdigest())
    rows = differing(sample.mine, sample.rollout, sample.margins, subject.bound)
    wrong = {
        "two prompts, samples or positions share one": len(all_.unique()) < all_.numel(),
        "a row's depend on the rows beside it": not torch.equal(last, all_[-1:]),
        "ranks draw different ones": len(set(hashes)) > 1,
        f"ranks sample other responses in rows {rows}": bool(rows),
    }
    return _all_right(
        wrong,
        f"{all_.numel()} distinct, the same on {len(hashes)} ranks",
        "random numbers are a function of seed, prompt, sample and position alone",
        "start every rank with the same seed and the same requirements.txt",
    )


def disk_space(subject: Subject, sample: Sample) -> Result:
    """For the checkpoints that lie side by side at most: those kept, the best, those inside an iteration, a new one."""
    settings = subject.recipe.checkpoint
    most = settings.keep_last + (settings.keep_best is not None) + 2 * settings.mid_phase + 1
    return environment_checks.disk_space(subject.folder, sum(map(zero.elements, subject.trained.values())), most)


CHECKS = {
    "first ratio is 1": first_ratio,
    "adapters off is base": adapters_off,
    "batched is alone": batched_is_alone,
    "gathered is sharded": gathered_is_sharded,
    "end token counts": end_token_counts,
    "random numbers": random_numbers,
    "disk space": disk_space,
}


def _all_right(wrong: dict[str, bool], measured: str, rule: str, remedy: str) -> Result:
    found = [said for said, true in wrong.items() if true]
    return measured, f"{rule}, and {'; '.join(found)}: {remedy}" if found else None
