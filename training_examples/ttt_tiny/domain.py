"""The closed English domain of ttt-tiny: its words, questions and answers, split into training and held-out sentences.

Everything is lower case without punctuation. A sentence is held out by a hash of its text, so the split is the same in
every script and on every machine. A held-out question is a new combination: its template and its fact each occur in
training, the sentence never does. Random word sequences (text-to-speech and "repeat after me") are drawn with a seed
and split by the same hash.
"""

import random
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
TENS = "thirty forty fifty sixty seventy eighty ninety".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = ("january february march april may june july august september october november december").split()
OPPOSITES = [
    pair.split("-")
    for pair in (
        "hot-cold big-small fast-slow old-young high-low up-down left-right day-night black-white happy-sad "
        "open-closed full-empty early-late hard-soft light-dark near-far rich-poor strong-weak wet-dry clean-dirty "
        "good-bad long-short thick-thin first-last love-hate begin-finish question-answer summer-winter above-below "
        "north-south inside-outside push-pull true-false always-never"
    ).split()
]
CAPITALS = dict(
    pair.split("-")
    for pair in (
        "france-paris england-london germany-berlin italy-rome spain-madrid portugal-lisbon russia-moscow "
        "japan-tokyo china-beijing egypt-cairo greece-athens austria-vienna poland-warsaw norway-oslo "
        "ireland-dublin canada-ottawa cuba-havana kenya-nairobi peru-lima hungary-budapest"
    ).split()
)
FACTS = [
    ("what color is the sky", "the sky is blue"),
    ("what color is the grass", "the grass is green"),
    ("what color is snow", "snow is white"),
    ("what color is a lemon", "a lemon is yellow"),
    ("what color is an orange", "an orange is orange"),
    ("what color is blood", "blood is red"),
    ("what color is milk", "milk is white"),
    ("what color is coal", "coal is black"),
    ("how many days are in a week", "a week has seven days"),
    ("how many months are in a year", "a year has twelve months"),
    ("how many hours are in a day", "a day has twenty four hours"),
    ("how many minutes are in an hour", "an hour has sixty minutes"),
    ("how many legs has a dog", "a dog has four legs"),
    ("how many legs has a bird", "a bird has two legs"),
    ("how many legs has a spider", "a spider has eight legs"),
    ("how many legs has a horse", "a horse has four legs"),
    ("how many wheels has a car", "a car has four wheels"),
    ("how many fingers has a hand", "a hand has five fingers"),
    ("what does a cow drink", "a cow drinks water"),
    ("what does a bird eat", "a bird eats seeds"),
    ("where does a fish live", "a fish lives in water"),
    ("where does a bird live", "a bird lives in a tree"),
    ("what do bees make", "bees make honey"),
    ("what comes from a cow", "milk comes from a cow"),
    ("name the days of the week", "the days are " + " ".join(DAYS)),
    ("name the months of the year", "the months are " + " ".join(MONTHS)),
    ("what is your name", "my name is tiny"),
    ("who are you", "i am a small talking model"),
]
GREETINGS = [
    (question, answer)
    for answer, questions in {
        "hello i am tiny": "hello|hello there|hi|hi there|hello tiny|hi tiny",
        "good morning": "good morning|good morning tiny|a good morning to you",
        "good evening": "good evening|good evening tiny|a good evening to you",
        "i am fine thank you": "how are you|how are you today|hello how are you|are you fine",
        "yes i can hear you": "can you hear me|do you hear me|hello can you hear me|tiny can you hear me",
        "you are welcome": "thank you|thanks|thank you tiny|thank you very much",
        "goodbye": "goodbye|goodbye tiny|bye|bye bye",
        "i can count and answer small questions": "what can you do|what do you know|tell me what you can do",
    }.items()
    for question in questions.split("|")
]
# What is said to silence, noise and music, and to anything outside the domain.
NOT_HEARD = "i did not hear you"
NOT_KNOWN = "i do not know that"
OBJECTS = (
    "apple banana bread butter cheese chicken coffee sugar salt potato tomato rabbit tiger lion monkey mouse elephant "
    "garden river mountain forest ocean island bridge castle window door table chair kitchen bottle paper pencil music "
    "guitar piano doctor teacher farmer sister brother mother father baby purple brown pink silver golden jacket hat "
    "shoe train airplane bicycle rocket planet flower morning evening"
).split()
COLORS = "red orange yellow green blue purple pink brown black white silver golden gray".split()
ANIMALS = (
    "dog cat horse cow bird fish spider rabbit tiger lion monkey mouse elephant duck sheep goat pig frog bear fox "
    "snake wolf"
).split()
# What is read aloud and repeated: words that carry a meaning of their own. A recogniser that expects sentences would
# correct random function words, and names out of context, and count its own corrections as the voice's errors.
CONTENT = list(
    dict.fromkeys(
        [*NUMBERS, *TENS, *DAYS, *MONTHS, *OBJECTS, *COLORS, *ANIMALS]
        + "sky grass snow lemon milk coal water honey seeds tree car hand blood wheels fingers legs".split()
    )
)
# Ways to begin: each multiplies every question that starts with a question word.
OPENINGS = ("", "please tell me ", "do you know ", "can you tell me ")
REPEAT_OPENINGS = ("repeat after me ", "please repeat ", "say ", "repeat ")
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Item:
    """One question and its answer. `kind` names the family (addition, days, repeat, ...)."""

    kind: str
    question: str
    answer: str


def is_held_out(sentence: str) -> bool:
    """Return whether a sentence belongs to the held-out set (a fixed tenth of all sentences, by CRC-32 of the text)."""
    return zlib.crc32(sentence.encode()) % 100 < HELD_OUT_PERCENT


def _arithmetic() -> Iterator[Item]:
    for a in range(11):
        for b in range(11):
            x, y, z = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
            answer = f"{x} plus {y} is {z}"
            for question in (f"what is {x} plus {y}", f"how much is {x} plus {y}"):
                yield from _open("addition", question, answer)
            for question in (f"add {x} and {y}", f"{x} plus {y}"):
                yield Item("addition", question, answer)
    for a in range(13):
        for b in range(a + 1):
            x, y, z = NUMBERS[a], NUMBERS[b], NUMBERS[a - b]
            answer = f"{x} minus {y} is {z}"
            for question in (f"what is {x} minus {y}", f"how much is {x} minus {y}"):
                yield from _open("subtraction", question, answer)
            for question in (f"take {y} from {x}", f"{x} minus {y}"):
                yield Item("subtraction", question, answer)
    for a in range(1, 6):
        for b in range(1, 6):
            if a * b <= 20:
                x, y, z = NUMBERS[a], NUMBERS[b], NUMBERS[a * b]
                answer = f"{x} times {y} is {z}"
                for question in (f"what is {x} times {y}", f"how much is {x} times {y}"):
                    yield from _open("multiplication", question, answer)
                yield Item("multiplication", f"{x} times {y}", answer)
    for a in range(13):
        for b in range(13):
            if a != b:
                x, y = NUMBERS[a], NUMBERS[b]
                yield Item("comparison", f"which is bigger {x} or {y}", f"{NUMBERS[max(a, b)]} is bigger")
                yield Item("comparison", f"which is smaller {x} or {y}", f"{NUMBERS[min(a, b)]} is smaller")


def _calendar() -> Iterator[Item]:
    for kind, unit, names in (("days", "day", DAYS), ("months", "month", MONTHS)):
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            for word, other in (("after", after), ("before", before)):
                answer = f"{other} comes {word} {name}"
                for question in (f"what {unit} comes {word} {name}", f"which {unit} is {word} {name}"):
                    yield from _open(kind, question, answer)
                yield Item(kind, f"name the {unit} {word} {name}", answer)
                yield Item(kind, f"please name the {unit} {word} {name}", answer)
            if unit == "day":
                yield Item(kind, f"today is {name} what is tomorrow", f"tomorrow is {after}")
                yield Item(kind, f"today is {name} what was yesterday", f"yesterday was {before}")
                yield Item(kind, f"if today is {name} what is tomorrow", f"tomorrow is {after}")
                yield Item(kind, f"if today is {name} what was yesterday", f"yesterday was {before}")


def _counting() -> Iterator[Item]:
    for a in range(21):
        for b in range(a + 1, 21):
            up = " ".join(NUMBERS[a : b + 1])
            for question in (
                f"count from {NUMBERS[a]} to {NUMBERS[b]}",
                f"please count from {NUMBERS[a]} to {NUMBERS[b]}",
            ):
                yield Item("counting", question, up)
            if b <= 12:
                down = " ".join(reversed(NUMBERS[a : b + 1]))
                yield Item("counting", f"count down from {NUMBERS[b]} to {NUMBERS[a]}", down)
                yield Item("counting", f"please count down from {NUMBERS[b]} to {NUMBERS[a]}", down)
    for index in range(2, len(TENS)):
        tens = ["ten", "twenty", *TENS][: index + 1]
        yield Item("counting", f"count by ten to {tens[-1]}", " ".join(tens))


def _knowledge() -> Iterator[Item]:
    for pair in OPPOSITES:
        for word, other in (pair, pair[::-1]):
            answer = f"the opposite of {word} is {other}"
            yield from _open("opposites", f"what is the opposite of {word}", answer)
            yield Item("opposites", f"tell me the opposite of {word}", answer)
            yield Item("opposites", f"say the opposite of {word}", answer)
    for country, city in CAPITALS.items():
        answer = f"the capital of {country} is {city}"
        yield from _open("capitals", f"what is the capital of {country}", answer)
        yield from _open("capitals", f"which city is the capital of {country}", answer)
        yield Item("capitals", f"tell me the capital of {country}", answer)
        yield Item("capitals", f"name the capital of {country}", answer)
    for question, answer in FACTS:
        yield from _open("facts", question, answer)
    for question, answer in GREETINGS:
        yield Item("greetings", question, answer)


def _open(kind: str, question: str, answer: str) -> Iterator[Item]:
    for opening in OPENINGS:
        yield Item(kind, opening + question, answer)


def fixed_items() -> list[Item]:
    """Return every question of the domain whose answer is fixed (all kinds but "repeat")."""
    return [*_arithmetic(), *_calendar(), *_counting(), *_knowledge()]


def vocabulary() -> list[str]:
    """Return all words of the domain, sorted: every word the model can hear, read, write or say."""
    words = {
        "repeat",
        "after",
        "me",
        "say",
        "please",
        "hundred",
        *CONTENT,
        *CAPITALS,
        *CAPITALS.values(),
        *NOT_HEARD.split(),
        *NOT_KNOWN.split(),
    }
    for item in fixed_items():
        words.update(item.question.split(), item.answer.split())
    return sorted(words)


def random_words(rng: random.Random, shortest: int, longest: int, words: Sequence[str] | None = None) -> str:
    """Return a sequence of `shortest` to `longest` of `words`, by default all of the domain, in any order."""
    return " ".join(rng.choices(_WORDS if words is None else words, k=rng.randint(shortest, longest)))


def repeat_item(rng: random.Random) -> Item:
    """Return a "repeat after me" request of 1 to 5 content words; the request's text decides whether it is held out."""
    words = random_words(rng, 1, 5, CONTENT)
    return Item("repeat", rng.choice(REPEAT_OPENINGS) + words, words)


# How often each kind is asked, in training and in evaluation.
KIND_WEIGHTS = {
    "addition": 14, "subtraction": 12, "multiplication": 6, "comparison": 6, "days": 10, "months": 10, "counting": 10,
    "opposites": 10, "capitals": 8, "facts": 4, "repeat": 10,
    "greetings": 4,
}  # fmt: skip


def sample_items(rng: random.Random, count: int, held_out: bool, excluded: Collection[str] = ()) -> list[Item]:
    """Draw `count` items by KIND_WEIGHTS, all of them held out or none of them, no question among `excluded`.

    A kind is left out when all its questions are excluded.
    """
    pools: dict[str, list[Item]] = {}
    for item in fixed_items():
        if is_held_out(item.question) == held_out and item.question not in excluded:
            pools.setdefault(item.kind, []).append(item)
    weights = {kind: weight for kind, weight in KIND_WEIGHTS.items() if kind in pools or kind == "repeat"}
    kinds = rng.choices(list(weights), weights=list(weights.values()), k=count)
    return [_draw_repeat(rng, held_out, excluded) if kind == "repeat" else rng.choice(pools[kind]) for kind in kinds]


def _draw_repeat(rng: random.Random, held_out: bool, excluded: Collection[str]) -> Item:
    while is_held_out((item := repeat_item(rng)).question) != held_out or item.question in excluded:
        pass
    return item


def sample_sequences(
    rng: random.Random,
    count: int,
    held_out: bool,
    shortest: int = 2,
    longest: int = 8,
    excluded: Collection[str] = (),
    words: Sequence[str] | None = None,
) -> list[str]:
    """Draw `count` sequences of `words` (*optional*, defaults to the whole domain), all of them held out or none of
    them, none among `excluded`."""
    found: list[str] = []
    while len(found) < count:
        text = random_words(rng, shortest, longest, words)
        if is_held_out(text) == held_out and text not in excluded:
            found.append(text)
    return found


def recombined_answer(rng: random.Random) -> str:
    """Return a sentence built as the answers are, of words that need not belong together ("sixty comes after butter").

    Reading them aloud teaches the answers' shape for every content word.
    """
    pattern = rng.choice(
        (
            "{0} plus {1} is {2}", "{0} minus {1} is {2}", "{0} times {1} is {2}", "{0} is bigger", "{0} is smaller",
            "{0} comes after {1}", "{0} comes before {1}", "tomorrow is {0}", "yesterday was {0}",
            "the opposite of {0} is {1}", "the capital of {0} is {1}", "the {0} is {1}", "{0} is {1}", "a {0} is {1}",
            "a {0} has {1} {2}", "a {0} lives in {1}", "a {0} drinks {1}", "a {0} eats {1}", "{0} comes from a {1}",
        )
    )  # fmt: skip
    words = rng.choices(CONTENT, k=3)
    if any(sign in pattern for sign in ("plus", "minus", "times")):
        words = rng.choices([*NUMBERS, *TENS], k=3)
    elif "capital" in pattern:
        words = [rng.choice(list(CAPITALS)), rng.choice(list(CAPITALS.values()))]
    text = pattern.format(*words)
    return " ".join("an" if a == "a" and b[0] in "aeiou" else a for a, b in pairwise([*text.split(), "."]))


def lm_sentences(seed: int, n: int) -> list[str]:
    """Return `n` training sentences (questions and answers alike) for the recogniser's language model."""
    rng = random.Random(seed)
    items = sample_items(rng, (n + 1) // 2, held_out=False)
    return [text for item in items for text in (item.question, item.answer)][:n]


_WORDS = vocabulary()
