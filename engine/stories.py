"""The toy world's stories: a grammar of characters, events and endings, and the parser that judges any text by it.

A story is an opening (the prompt) and a plot (the response): what happened first, how it turned, perhaps, and an ending
that is happy or sad. One template per sentence serves writing and reading, so that the two can't drift apart. The
parser judges; no reward is ever made of it. Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

NAMES = (
    "Mia",
    "Tom",
    "Ben",
    "Lily",
    "Max",
    "Zoe",
    "Leo",
    "Ruby",
    "Sam",
    "Nora",
    "Finn",
    "Ivy",
    "Otto",
    "Pip",
    "Rosa",
    "Hugo",
)
KINDS = ("fox", "bear", "mouse", "rabbit", "frog", "duck", "cat", "dog", "goat", "hen", "wolf", "deer")
PLACES = (
    "by the river",
    "in the valley",
    "near the bridge",
    "behind the barn",
    "on the hill",
    "at the market",
    "under the oak",
    "in the forest",
    "beside the mill",
    "near the castle",
)
TIMES = ("One day", "One morning", "After lunch", "Before dawn", "In spring", "Last summer")
DEEDS = ("found", "bought", "built", "borrowed", "painted", "carried")
ADJECTIVES = ("red", "blue", "tiny", "shiny", "wooden", "round", "heavy", "golden")
THINGS = ("key", "kite", "boat", "drum", "lamp", "hat", "bell", "map", "coin", "book", "ball", "box")
MANNERS = ("in the evening", "after a while", "without a word", "on the way home", "all alone")
GOOD_TURNS = ("polished", "shared", "repaired", "treasured")
BAD_TURNS = ("lost", "broke", "ruined", "forgot")
CLOSES = ("In the end", "That night", "At last", "When winter came")
HAPPY_ENDINGS = (
    "danced with joy",
    "laughed and laughed",
    "slept warm and safe",
    "sang merry songs",
    "smiled at the stars",
    "hugged every friend",
    "cheered with delight",
    "ate a sweet cake",
)
SAD_ENDINGS = (
    "cried with grief",
    "wept and wept",
    "slept cold and hungry",
    "sang sorry songs",
    "sighed at the moon",
    "missed every friend",
    "shivered with fear",
    "ate a stale crust",
)

SLOTS = {
    "name": NAMES,
    "friend": NAMES,
    "kind": KINDS,
    "friend_kind": KINDS,
    "place": PLACES,
    "time": TIMES,
    "deed": DEEDS,
    "adjective": ADJECTIVES,
    "thing": THINGS,
    "manner": MANNERS,
    "turn": GOOD_TURNS + BAD_TURNS,
    "close": CLOSES,
    "ending": HAPPY_ENDINGS + SAD_ENDINGS,
}

ONE_CHARACTER = "Once there was a {kind} named {name}. {name} lived {place}."
TWO_CHARACTERS = "Once there was a {kind} named {name} and a {friend_kind} named {friend}. They lived {place}."
FIRST_EVENT = "{time} {name} {deed} a {adjective} {thing} {place}."
FIRST_EVENT_TOGETHER = "{time} {name} and {friend} {deed} a {adjective} {thing} {place}."
TURN_EVENT = "Then {name} {turn} the {thing} {manner}."
ENDING_ALONE = "{close} {name} {ending}."
ENDING_TOGETHER = "{close} they {ending}."

# How often the turn already has the mood of the ending. Below 1, so that the ending alone decides what is happy.
TURN_FORETELLS = 0.8


@dataclass(frozen=True)
class Opening:
    """Who the story is about and where they live."""

    names: tuple[str, ...]  # one or two, distinct
    kinds: tuple[str, ...]  # one for each name
    place: str

    @property
    def text(self) -> str:
        """The prompt."""
        template = ONE_CHARACTER if len(self.names) == 1 else TWO_CHARACTERS
        return template.format(
            name=self.names[0], kind=self.kinds[0], friend=self.names[-1], friend_kind=self.kinds[-1], place=self.place
        )


@dataclass(frozen=True)
class Plot:
    """What happens to them, and how it ends."""

    first: dict[str, str]  # slots of FIRST_EVENT_TOGETHER where there is a friend, else of FIRST_EVENT
    turn: dict[str, str] | None  # slots of TURN_EVENT, which may be missing
    ending: dict[str, str]  # slots of ENDING_ALONE where there is a name, else of ENDING_TOGETHER

    @property
    def sentences(self) -> tuple[str, ...]:
        """Two or three sentences."""
        first = FIRST_EVENT_TOGETHER if "friend" in self.first else FIRST_EVENT
        ending = ENDING_ALONE if "name" in self.ending else ENDING_TOGETHER
        turn = () if self.turn is None else (TURN_EVENT.format(**self.turn),)
        return (first.format(**self.first), *turn, ending.format(**self.ending))

    @property
    def text(self) -> str:
        """The response."""
        return " ".join(self.sentences)

    @property
    def happy(self) -> bool:
        """Whether it ends well, however it turned on the way."""
        return self.ending["ending"] in HAPPY_ENDINGS


def draw_opening(random: Random) -> Opening:
    """An opening with one or two characters."""
    count = random.choice((1, 2, 2))
    kinds = tuple(random.choice(KINDS) for _ in range(count))
    return Opening(tuple(random.sample(NAMES, count)), kinds, random.choice(PLACES))


def draw_plot(opening: Opening, random: Random, happy: bool | None = None) -> Plot:
    """A plot that names every character of the opening and no other.

    Args:
        happy: how it ends; None: a fair coin.
    """
    happy = random.random() < 0.5 if happy is None else happy
    thing, lead, friend = random.choice(THINGS), opening.names[0], opening.names[-1]
    turns, alone = random.random() < 0.7, len(opening.names) == 1
    together = not alone and (not turns or random.random() < 0.3)
    first = {slot: random.choice(SLOTS[slot]) for slot in ("time", "deed", "adjective", "place")}
    first |= {"thing": thing, "name": lead} | ({"friend": friend} if together else {})
    turn = None
    if turns:
        good = happy if random.random() < TURN_FORETELLS else not happy
        turn = {"turn": random.choice(GOOD_TURNS if good else BAD_TURNS), "manner": random.choice(MANNERS)}
        turn |= {"thing": thing, "name": random.choice(opening.names) if together else friend}
    ending = {"close": random.choice(CLOSES), "ending": random.choice(HAPPY_ENDINGS if happy else SAD_ENDINGS)}
    return Plot(first, turn, ending | ({"name": lead} if alone else {}))


def normalize(text: str) -> str:
    """`text` with one space between words and before punctuation: what a tokenizer sees of it."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text))


def vocabulary() -> list[str]:
    """Every word that a story can hold, sorted."""
    templates = (ONE_CHARACTER, TWO_CHARACTERS, FIRST_EVENT, FIRST_EVENT_TOGETHER, TURN_EVENT)
    templates += (ENDING_ALONE, ENDING_TOGETHER)
    fixed = " ".join(re.sub(r"\{\w+\}", " ", template) for template in templates)
    return sorted(set(normalize(" ".join([fixed, *(word for words in SLOTS.values() for word in words)])).split()))


def _reader(template: str) -> re.Pattern:
    """The pattern of a sentence; a slot that comes twice must hold the same words."""
    pattern, seen = "", set()
    for literal, slot in re.findall(r"([^{]*)(?:\{(\w+)\})?", template.replace(".", " .")):
        pattern += re.escape(literal)
        if slot:
            pattern += f"(?P={slot})" if slot in seen else f"(?P<{slot}>{'|'.join(map(re.escape, SLOTS[slot]))})"
            seen.add(slot)
    return re.compile(pattern)


_OPENINGS = tuple(map(_reader, (ONE_CHARACTER, TWO_CHARACTERS)))
_FIRST_EVENTS = tuple(map(_reader, (FIRST_EVENT, FIRST_EVENT_TOGETHER)))
_TURN_EVENTS = (_reader(TURN_EVENT),)
_ENDINGS = tuple(map(_reader, (ENDING_ALONE, ENDING_TOGETHER)))


@dataclass(frozen=True)
class Verdict:
    """What the parser says of a text."""

    grammatical: bool
    """The text is one whole story: an opening, one or two events about the same thing, an ending, nothing after it."""
    happy: bool
    """It is grammatical and ends well."""
    characters: frozenset[str]
    """Names that occur in the text, grammatical or not."""
    opening: Opening | None = None
    """What was read, where it is grammatical."""
    plot: Plot | None = None
    """What was read, where it is grammatical."""


def characters(text: str) -> frozenset[str]:
    """The names that occur in any text."""
    return frozenset(NAMES).intersection(normalize(text).split())


def parse(text: str) -> Verdict:
    """Judge any text, the empty one included, as a whole story."""
    named = characters(text)
    sentences = [f"{part.strip()} ." for part in normalize(text).split(" .")]
    read = _read_story(sentences[:-1]) if sentences[-1] == " ." else None
    if read is None:
        return Verdict(False, False, named)
    opening, plot = read
    return Verdict(True, plot.happy, named, opening, plot)


def _read_story(sentences: list[str]) -> tuple[Opening, Plot] | None:
    if len(sentences) not in (4, 5):
        return None
    slots = _read(_OPENINGS, " ".join(sentences[:2]))
    first, ending = _read(_FIRST_EVENTS, sentences[2]), _read(_ENDINGS, sentences[-1])
    turn = _read(_TURN_EVENTS, sentences[3]) if len(sentences) == 5 else None
    if not (slots and first and ending) or (len(sentences) == 5 and not turn):
        return None
    alone = "friend" not in slots
    names, kinds = (slots["name"],), (slots["kind"],)
    opening = Opening(
        names if alone else (*names, slots["friend"]),
        kinds if alone else (*kinds, slots["friend_kind"]),
        slots["place"],
    )
    agrees = (
        (alone or opening.names[0] != opening.names[1])
        and first["name"] != first.get("friend")
        and (turn is None or turn["thing"] == first["thing"])
        and alone == ("name" in ending)  # "they" are two
    )
    return (opening, Plot(first, turn, ending)) if agrees else None


def _read(patterns: tuple[re.Pattern, ...], text: str) -> dict[str, str] | None:
    """The slots of the first pattern that is all of `text`."""
    return next((match.groupdict() for pattern in patterns if (match := pattern.fullmatch(text))), None)


def judge(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Metrics of responses to prompts, by the parser.

    Returns:
        happy_fraction: of all responses; an ungrammatical one is not happy.
        grammatical_fraction: of all responses, read after their prompt.
        distinct_stories: how many different responses there are once names are replaced by roles. Without that,
            distinct prompts make every story distinct, and a policy with one plot for everybody would look diverse.
        characters_kept_fraction: responses that name all of their prompt's characters and nobody else.
        mean_words: words and full stops per response.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"judge needs one response per prompt, got {len(prompts)} prompts, {len(responses)} responses")
    count = max(len(prompts), 1)
    pairs = list(zip(prompts, responses, strict=True))
    verdicts = [parse(f"{prompt} {response}") for prompt, response in pairs]
    return {
        "happy_fraction": sum(v.happy for v in verdicts) / count,
        "grammatical_fraction": sum(v.grammatical for v in verdicts) / count,
        "distinct_stories": float(len({_anonymous(prompt, response) for prompt, response in pairs})),
        "characters_kept_fraction": sum(characters(p) == characters(r) for p, r in pairs) / count,
        "mean_words": sum(len(normalize(response).split()) for response in responses) / count,
    }


def _anonymous(prompt: str, response: str) -> str:
    """The response with each name replaced by its place among the names in order of appearance."""
    order = dict.fromkeys(word for word in normalize(prompt).split() if word in NAMES)
    roles = {name: f"character {index}" for index, name in enumerate(order)}
    return " ".join(roles.get(word, word) for word in normalize(response).split())
