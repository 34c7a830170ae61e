"""What ttt-tiny does not know and LoRA teaches it: the colors of twelve fruits and vegetables."""

import zlib

from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.domain import Item

COLORS = dict(
    pair.split("-")
    for pair in (
        "cucumber-green cherry-red strawberry-red pumpkin-orange coconut-brown pineapple-yellow cauliflower-white "
        "avocado-green mushroom-white eggplant-purple radish-red cabbage-green"
    ).split()
)
QUESTIONS = (
    "what color is {}",
    "what color has {}",
    "which color is {}",
    "which color has {}",
    "what is the color of {}",
    "name the color of {}",
    "say the color of {}",
    "tell me the color of {}",
    "tell me what color is {}",
    "please name the color of {}",
    "please say the color of {}",
    "please tell me the color of {}",
    "please tell me what color is {}",
    "do you know the color of {}",
    "do you know what color is {}",
    "can you tell me what color is {}",
)


def skill_items() -> list[Item]:
    """Return every question of the skill, with its answer."""
    things = {f"{'an' if name[0] in 'aeiou' else 'a'} {name}": color for name, color in COLORS.items()}
    return [
        Item("produce", question.format(thing), f"{thing} is {color}")
        for thing, color in things.items()
        for question in QUESTIONS
    ]


def new_words() -> list[str]:
    """Return the words of the skill that the domain lacks."""
    words = {word for item in skill_items() for word in (item.question + " " + item.answer).split()}
    return sorted(words - set(domain.vocabulary()))


def split_of(question: str) -> str:
    """Return where a new question belongs: "evaluation" (what domain.py holds out), "development" or "training"."""
    if domain.is_held_out(question):
        return "evaluation"
    return "development" if zlib.crc32(question.encode()) % 100 < 2 * domain.HELD_OUT_PERCENT else "training"
