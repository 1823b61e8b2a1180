"""The toy world: what is written is read back, what is broken is rejected; a build is cached, whole and seeded."""

import json
import os
import shutil
from math import log
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from engine import dist, stories, toyworld
from engine.role_config import OptimizerSettings
from engine.scoring import last_token_scores
from engine.stories import Opening, Plot, characters, draw_opening, draw_plot, judge, normalize, parse, vocabulary
from engine.supervised import FitSettings, pad_right, sft_loss
from engine.toyworld import ToyWorldSettings, build_tokenizer, corrupt, draw_prompts, prepare

pytestmark = pytest.mark.usefixtures("alone")

ONE = "Once there was a fox named Mia. Mia lived by the river."
TWO = "Once there was a fox named Mia and a bear named Tom. They lived on the hill."
HAPPY = "One day Mia found a red key by the river. Then Mia lost the key all alone. At last Mia danced with joy."
SAD = "In spring Mia and Tom built a blue kite near the castle. In the end they cried with grief."
BOTH = (
    "In spring Mia built a blue kite near the castle. Then Tom shared the kite all alone. At last they wept and wept."
)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Opening, Plot]]:
    random = Random("test")
    openings = [draw_opening(random) for _ in range(5000)]
    return [(opening, draw_plot(opening, random)) for opening in openings]


# -- stories and their parser ------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(drawn):
    for opening, plot in drawn:
        verdict = parse(f"{opening.text} {plot.text}")
        assert verdict.grammatical and (verdict.opening, verdict.plot) == (opening, plot)
        assert verdict.happy == plot.happy and verdict.characters == set(opening.names)
        assert characters(plot.text) == set(opening.names)


def test_the_world_is_large_and_balanced(drawn):
    assert len({plot.text for _, plot in drawn}) > 0.99 * len(drawn)
    assert sum(plot.happy for _, plot in drawn) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert {len(opening.names) for opening, _ in drawn} == {1, 2}
    words = [len(normalize(plot.text).split()) for _, plot in drawn]
    assert min(words) >= 15 and max(words) <= 32
    assert 100 < len(vocabulary()) < 250


def test_a_turn_foretells_the_ending_but_does_not_decide_it(drawn):
    turned = [(plot.turn["turn"] in stories.GOOD_TURNS) == plot.happy for _, plot in drawn if plot.turn]
    assert sum(turned) / len(turned) == pytest.approx(0.8, abs=0.03)


def test_a_mood_can_be_ordered():
    random = Random(0)
    for happy in (True, False):
        assert all(draw_plot(draw_opening(random), random, happy=happy).happy == happy for _ in range(200))


@pytest.mark.parametrize(
    ("text", "happy"),
    [(f"{ONE} {HAPPY}", True), (f"{TWO} {SAD}", False), (f"{TWO} {BOTH}", False)],
)
def test_stories_by_hand(text, happy):
    for spaced in (text, normalize(text), f"\n {text}  "):
        verdict = parse(spaced)
        assert verdict.grammatical and verdict.happy == happy


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        ". . . .",
        "\x00\n\t",
        "Mia",
        "{name} {0} %s \\",
        "\N{GRINNING FACE} na\u00efve \u5c0f\u72d0\u72f8.",
        "Mia " * 5000,
        ONE,
        HAPPY,
        f"{HAPPY} {ONE}",
        f"{ONE} {HAPPY} {HAPPY}",
        f"{ONE} {HAPPY} At last Mia danced with joy.",
        f"{ONE} {HAPPY}"[:-1],
        f"{ONE} {HAPPY}</s>",
        f"{ONE} {HAPPY}".lower(),
        f"{ONE} {HAPPY}".replace(".", ","),
        f"{ONE} {HAPPY}".replace("the key", "the kite"),
        f"{ONE} {HAPPY}".replace("At last Mia", "At last they"),
        f"{TWO} {BOTH}".replace("they wept", "Mia wept"),
        f"{TWO} {SAD}".replace("Mia and Tom built", "Mia and Mia built"),
        f"{TWO} {SAD}".replace("named Tom", "named Mia"),
        f"{ONE} {HAPPY}".replace("Mia lived", "Tom lived"),
        f"{ONE} {HAPPY}".replace("red", "happy"),
        f"{ONE} At last Mia danced with joy.",
    ],
)
def test_other_text_is_no_story(text):
    verdict = parse(text)
    assert not verdict.grammatical and not verdict.happy and verdict.plot is None
    assert verdict.characters == {name for name in ("Mia", "Tom") if name in text.split() or f"{name}." in text.split()}


@pytest.mark.parametrize("kind", toyworld.CORRUPTIONS + toyworld.UNLEARNED_CORRUPTIONS)
def test_corruptions_are_never_sound(drawn, kind):
    random = Random(1)
    for opening, plot in drawn[:2000]:
        response = corrupt(opening, plot, random, kind)
        ended = response.endswith("</s>")
        text = response.removesuffix("</s>")
        kept = characters(text) == set(opening.names)
        assert not (ended and kept and parse(f"{opening.text} {text}").grammatical), response


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_judge_by_hand():
    """Words and full stops: HAPPY 10 + 1 + 7 + 1 + 6 + 1 = 26, SAD 12 + 1 + 7 + 1 = 21, `Zoe danced .` 3."""
    prompts = [ONE, TWO, ONE, TWO]
    responses = [HAPPY, SAD, "Zoe danced.", SAD]
    assert judge(prompts, responses) == {
        "happy_fraction": 1 / 4,
        "grammatical_fraction": 3 / 4,
        "distinct_stories": 3.0,
        "characters_kept_fraction": 3 / 4,
        "mean_words": (26 + 21 + 3 + 21) / 4,
    }


def test_names_alone_make_no_story_distinct():
    others = [ONE.replace("Mia", name) for name in ("Mia", "Tom", "Zoe")]
    told = [HAPPY.replace("Mia", name) for name in ("Mia", "Tom", "Zoe")]
    assert judge(others, told)["distinct_stories"] == 1
    # Who of the two does it is a difference.
    swapped = BOTH.replace("Tom", "?").replace("Mia", "Tom").replace("?", "Mia")
    assert judge([TWO, TWO], [BOTH, swapped])["distinct_stories"] == 2


def test_a_missing_or_strange_character_is_not_kept():
    alone = "In spring Mia built a blue kite near the castle. At last they wept and wept."
    strange = BOTH.replace("Tom", "Zoe")
    assert judge([TWO, TWO, TWO], [BOTH, alone, strange])["characters_kept_fraction"] == pytest.approx(1 / 3)
    assert judge([TWO], [""])["characters_kept_fraction"] == 0


def test_judge_of_nothing_and_of_unequal_lists():
    assert set(judge([], []).values()) == {0.0}
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        judge([ONE, TWO], [HAPPY])
    assert toyworld.judge is judge  # where the quickstart's recipe looks for it


# -- tokenizer, prompts, pairs -----------------------------------------------------------------------------------------


def test_tokenizer_round_trip(drawn, tmp_path):
    build_tokenizer(128).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for opening, plot in drawn[:500]:
        prompt, response = tokenizer(opening.text)["input_ids"], tokenizer(plot.text)["input_ids"]
        assert tokenizer.unk_token_id not in prompt + response
        assert tokenizer.decode(prompt) == opening.text
        assert tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True) == plot.text
        assert tokenizer(f"{opening.text} {plot.text}")["input_ids"] == prompt + response
        assert tokenizer(normalize(plot.text))["input_ids"] == response
    assert tokenizer("Zebra")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer("Mia</s>")["input_ids"][-1] == tokenizer.eos_token_id


def test_prompts_are_distinct_and_heldout_ones_unseen():
    train, heldout = draw_prompts(1000, 300, seed=3)
    texts = [opening.text for opening in train + heldout]
    assert (len(train), len(heldout)) == (1000, 300) and len(set(texts)) == 1300
    assert draw_prompts(1000, 300, seed=3) == (train, heldout)
    assert draw_prompts(1000, 300, seed=4) != (train, heldout)


def test_preference_pairs_are_ordered_by_construction():
    """The judge agrees with every label: a sound happy plot over a sound sad one, or a sound plot over an unsound."""
    tokenizer = build_tokenizer(128)
    openings, _ = draw_prompts(200, 1, seed=0)
    prompts = {tuple(tokenizer(opening.text)["input_ids"]): opening for opening in openings}
    kinds = []
    for pair in toyworld.preferences(tokenizer, openings, 1500, Random(0)):
        assert max(len(pair.chosen), len(pair.rejected)) <= 128
        assert pair.chosen[-1] == tokenizer.eos_token_id
        opening = next(prompts[ids] for length in range(24) if (ids := tuple(pair.chosen[:length])) in prompts)
        ended = pair.rejected[-1] == tokenizer.eos_token_id
        chosen, rejected = (
            parse(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (pair.chosen, pair.rejected)
        )
        assert chosen.grammatical and chosen.characters == set(opening.names)
        sound = rejected.grammatical and ended and rejected.characters == set(opening.names)
        assert not sound or (chosen.happy and not rejected.happy)
        kinds.append(sound)
    assert sum(kinds) / len(kinds) == pytest.approx(0.5, abs=0.05)


# -- prepare -----------------------------------------------------------------------------------------------------------

QUICK = FitSettings(optimizer=OptimizerSettings(learning_rate=1e-2), batch_sequences=16)
TINY = ToyWorldSettings(
    hidden_size=16,
    layers=1,
    heads=2,
    train_prompts=64,
    heldout_prompts=32,
    stories=128,
    pairs=64,
    heldout_pairs=32,
    policy=QUICK,
    reward=QUICK,
    minimum_accuracy=0.0,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toyworld"
    prepare(folder, settings=TINY)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"  # it holds seconds
    }


def test_prepare_writes_hugging_face_folders(world):
    policy = AutoModelForCausalLM.from_pretrained(world / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(world / "reward")
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    assert (world / "policy" / "model.safetensors").is_file() and (world / "reward" / "tokenizer.json").is_file()
    assert reward.config.num_labels == 1 and policy.config.max_position_embeddings == 128
    generation = GenerationConfig.from_pretrained(world / "policy")
    assert (
        generation.eos_token_id == tokenizer.eos_token_id and generation.do_sample and generation.max_new_tokens == 48
    )
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    heldout = [json.loads(line) for line in (world / "heldout.jsonl").read_text().splitlines()]
    assert (len(rows), len(heldout)) == (64, 32)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in heldout}
    assert all(characters(row["prompt"]) == set(row["characters"]) for row in rows + heldout)
    measured = json.loads((world / "manifest.json").read_text())["measured"]
    assert 0 <= measured["reward_accuracy"] <= 1 and measured["policy_heldout_loss"] > 0


def test_a_second_call_builds_nothing(world, monkeypatch):
    monkeypatch.setattr(toyworld, "_build", lambda *args: pytest.fail("built again"))
    prepare(world, settings=TINY)
    with pytest.raises(pytest.fail.Exception):
        prepare(world, seed=1, settings=TINY)
    with pytest.raises(pytest.fail.Exception):
        prepare(world, settings=TINY.model_copy(update={"pairs": 65}))


def test_the_same_seed_builds_the_same_world(world, tmp_path):
    torch.manual_seed(123)  # the caller's random state matters as little as it is touched
    before = torch.get_rng_state()
    prepare(tmp_path / "again", settings=TINY)
    assert torch.equal(before, torch.get_rng_state())
    assert contents(tmp_path / "again") == contents(world)
    prepare(tmp_path / "other", seed=1, settings=TINY)
    assert contents(tmp_path / "other")["policy/model.safetensors"] != contents(world)["policy/model.safetensors"]


def test_a_killed_build_leaves_nothing_and_is_done_again(tmp_path, monkeypatch, world):
    folder = tmp_path / "toyworld"
    with monkeypatch.context() as patch:
        patch.setattr(toyworld, "train_reward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, settings=TINY)
    assert list(tmp_path.iterdir()) == []
    # A kill that no handler survives leaves the folder it was building in, which nobody takes for the finished one.
    (tmp_path / "toyworld.building-dead").mkdir()
    prepare(folder, settings=TINY)
    assert contents(folder) == contents(world)


def test_an_outdated_world_is_replaced_and_other_files_are_not(tmp_path, world):
    folder = tmp_path / "toyworld"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="holds files but no toy world"):
        prepare(folder, settings=TINY)
    assert (folder / "thesis.txt").read_text() == "mine"
    (folder / "manifest.json").write_text('{"version": 0}')
    prepare(folder, settings=TINY)
    assert contents(folder) == contents(world)


def test_a_reward_model_that_learned_nothing_is_refused(tmp_path):
    strict = TINY.model_copy(update={"minimum_accuracy": 1.0, "pairs": 16})
    with pytest.raises(RuntimeError, match="held-out pairs rightly"):
        prepare(tmp_path / "toyworld", settings=strict)
    assert not (tmp_path / "toyworld").exists()


def prepared_by_rank(folder: str) -> float:
    prepare(folder, settings=TINY)
    assert (Path(folder) / "manifest.json").is_file()
    return json.loads((Path(folder) / "manifest.json").read_text())["measured"]["policy_heldout_loss"]


@pytest.mark.dist
def test_two_ranks_build_one_world(pool, tmp_path, world):
    first, second = pool.run(prepared_by_rank, str(tmp_path / "toyworld"))
    alone = json.loads((world / "manifest.json").read_text())["measured"]["policy_heldout_loss"]
    assert first == second == pytest.approx(alone, abs=1e-2)
    built, expected = contents(tmp_path / "toyworld"), contents(world)
    assert built.keys() == expected.keys() and built["prompts.jsonl"] == expected["prompts.jsonl"]
    assert len(list(tmp_path.iterdir())) == 1


def prepared_on_own_disks(folders: str) -> str:
    """As on two nodes: each rank in a working folder of its own, the first of its node."""
    before, local = Path.cwd(), os.environ["LOCAL_RANK"]
    os.chdir(Path(folders) / str(dist.rank()))
    os.environ["LOCAL_RANK"] = "0"
    try:
        prepare("toyworld", settings=TINY)
        return Path("toyworld/manifest.json").read_text()
    finally:
        os.chdir(before)
        os.environ["LOCAL_RANK"] = local


@pytest.mark.dist
def test_nodes_with_own_disks_get_one_each(pool, tmp_path, world):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    first, second = pool.run(prepared_on_own_disks, str(tmp_path))
    assert first == second
    ones, others = (contents(tmp_path / rank / "toyworld") for rank in ("0", "1"))
    assert ones == others and ones.keys() == contents(world).keys()
    shutil.rmtree(tmp_path / "1" / "toyworld")  # a node was replaced by a new one
    pool.run(prepared_on_own_disks, str(tmp_path))
    assert contents(tmp_path / "0" / "toyworld") == contents(tmp_path / "1" / "toyworld")
    assert [path.name for rank in ("0", "1") for path in (tmp_path / rank).iterdir()] == ["toyworld"] * 2


# -- quality of the real thing -----------------------------------------------------------------------------------------


def respond(folder, prompts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    torch.manual_seed(0)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    sequences = policy.generate(**encoded)
    return tokenizer.batch_decode(sequences[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.dist
def test_the_base_policy_tells_balanced_sound_stories(full_world):
    prompts = [json.loads(line)["prompt"] for line in (full_world / "heldout.jsonl").read_text().splitlines()]
    verdict = judge(prompts, respond(full_world, prompts))
    assert 0.40 <= verdict["happy_fraction"] <= 0.58
    assert verdict["grammatical_fraction"] >= 0.95 and verdict["characters_kept_fraction"] >= 0.97
    assert verdict["distinct_stories"] >= 0.95 * len(prompts)


@pytest.mark.slow
@pytest.mark.dist
def test_the_reward_model_prefers_happy_over_sad_over_gibberish(full_world):
    assert json.loads((full_world / "manifest.json").read_text())["measured"]["reward_accuracy"] >= 0.95
    tokenizer = AutoTokenizer.from_pretrained(full_world / "reward")
    reward = AutoModelForSequenceClassification.from_pretrained(full_world / "reward")
    random = Random("judged")
    openings = [draw_opening(random) for _ in range(200)]
    happy = [f"{draw_plot(o, random, happy=True).text} </s>" for o in openings]
    sad = [f"{draw_plot(o, random, happy=False).text} </s>" for o in openings]
    broken = [corrupt(o, draw_plot(o, random, happy=True), random) for o in openings]

    def scores(responses):
        rows = tokenizer([f"{o.text} {r}" for o, r in zip(openings, responses, strict=True)])["input_ids"]
        with torch.no_grad():
            return last_token_scores(reward, *pad_right(rows))

    assert scores(happy).mean() > scores(sad).mean() > scores(broken).mean()
    assert (scores(happy) > scores(sad)).float().mean() > 0.97
    # A sound sad story against a corrupted happy one weighs two faults: 0.75 to 0.87 in five builds.
    assert (scores(sad) > scores(broken)).float().mean() > 0.65


@pytest.mark.slow
@pytest.mark.dist
def test_the_policy_is_near_the_entropy_of_the_grammar(full_world):
    """Independent of sampling: the loss per story is at most 0.5 nats above what the grammar leaves open."""
    tokenizer = AutoTokenizer.from_pretrained(full_world / "policy")
    policy = AutoModelForCausalLM.from_pretrained(full_world / "policy")
    random = Random("entropy")
    told = [(opening, draw_plot(opening, random)) for opening in (draw_opening(random) for _ in range(1000))]
    examples = toyworld.demonstrations(tokenizer, told)
    with torch.no_grad():
        per_story = sft_loss(policy, examples, len(examples)).item()

    def coin(p):
        return -p * log(p) - (1 - p) * log(1 - p)

    # time, deed, adjective, thing, place; mood, close and one of 8 endings; whether it turns; its mood, verb, manner
    entropy = log(6) + log(6) + log(8) + log(12) + log(10) + log(2) + log(4) + log(8)
    entropy += coin(0.7) + 0.7 * (coin(0.8) + log(4) + log(5))
    # of two characters: whether they act together, which is sure without a turn, and who of them turns it then
    entropy += 2 / 3 * 0.7 * (coin(0.3) + 0.3 * log(2))
    assert entropy == pytest.approx(18.05, abs=0.01)
    assert entropy - 0.3 < per_story < entropy + 0.5  # 0.3: three standard errors of the mean over 1000 stories
