"""Other people's sentences: everyday English outside the domain of ttt-tiny, to which it answers that it does not know.

Sentences are drawn from patterns and word lists, all of them words that Kokoro's lexicons hold. A fifth of the patterns
never occurs in training, so that the held-out lists can ask what no pattern of the training looks like.
"""

import random
import re
import zlib
from collections.abc import Collection

from training_examples.ttt_tiny.domain import is_held_out

WORDS = {
    "person": (
        "my sister|my brother|my neighbor|the doctor|the teacher|our boss|an old friend|my grandmother|my uncle|"
        "the captain|the lawyer|her husband|his wife|the children|a stranger|the mayor|the nurse|my cousin|"
        "the president|the baker|a young man|the girl next door|your parents|the pilot|everybody|nobody|the students|"
        "their manager"
    ),
    "name": (
        "anna|peter|sarah|david|lucy|tom|helen|james|maria|robert|carol|george|laura|frank|susan|oliver|rachel|"
        "martin|alice|henry|nora|victor|diana|philip|julia|edward"
    ),
    "place": (
        "the airport|the office|the station|the library|the hospital|the beach|the supermarket|the museum|school|"
        "the park|the village|the theater|the restaurant|the factory|the farm|the bank|church|the stadium|the hotel|"
        "the university|the harbor|the lake|the pharmacy|downtown|the garage|the post office"
    ),
    "country": (
        "brazil|sweden|turkey|india|mexico|denmark|finland|chile|vietnam|thailand|morocco|belgium|ukraine|nepal|"
        "switzerland|argentina|australia|iceland|jordan|colombia"
    ),
    "food": (
        "pizza|soup|rice|salad|spaghetti|pancakes|ice cream|a sandwich|roast beef|cereal|pepper|garlic|chocolate|"
        "mushrooms|noodles|a burger|olives|peanuts|yogurt|cherries|carrots|wine|beer|lemonade|hot tea|biscuits"
    ),
    "object": (
        "my keys|the umbrella|a new phone|the camera|his wallet|the newspaper|that suitcase|the blanket|a ladder|"
        "the hammer|her glasses|the television|a ticket|the envelope|some flowers|the radio|an old map|the mirror|"
        "a fresh towel|the computer|your passport|the candle|a pair of scissors|the letter|this machine|the painting"
    ),
    "creature": (
        "crocodile|penguin|camel|turtle|whale|parrot|squirrel|butterfly|donkey|giraffe|kangaroo|owl|shark|lizard|"
        "hedgehog|eagle|octopus|worm|dolphin|beetle"
    ),
    "time": (
        "tomorrow evening|next week|on the weekend|before lunch|at midnight|after work|last night|in the spring|"
        "two weeks ago|right now|every afternoon|during the holidays|later|at noon|this time|once again|soon"
    ),
    "weather": ("raining|snowing|windy|foggy|sunny|freezing|stormy|cloudy"),
    "quality": (
        "expensive|beautiful|boring|dangerous|delicious|heavy|broken|interesting|strange|comfortable|noisy|important|"
        "wonderful|terrible|simple|famous|useful|quiet|difficult|perfect"
    ),
    "action": (
        "wash the dishes|call the police|learn to swim|paint the fence|take a walk|cook dinner|fix the car|"
        "write a letter|go shopping|visit the zoo|play chess|watch a movie|clean the windows|feed the chickens|"
        "plant a tree|ride a horse|read a book|catch the bus|book a flight|move the sofa|bake a cake|"
        "answer the phone|pay the bill|sing a song|lock the gate|turn off the light"
    ),
    "did": (
        "lost the game|bought a house|broke the vase|missed the train|found a wallet|won the prize|"
        "forgot the meeting|left early|moved to the city|sold the boat|wrote a poem|fell asleep|told a joke|"
        "sent the letter|went fishing|burned the toast|changed the plan|stayed at home|crossed the street|"
        "called twice"
    ),
    "topic": (
        "football|politics|the weather|cooking|history|gardening|chemistry|poetry|basketball|photography|traffic|"
        "the economy|dinosaurs|volcanoes|computers|opera|fashion|medicine|the stars|religion"
    ),
    "famous": ("shakespeare|einstein|plato|napoleon|cleopatra|hamlet|columbus|newton|picasso|galileo"),
    "big": ("thirty|forty|fifty|sixty|seventy|eighty|ninety|a hundred|a thousand"),
    "much": ("how tall|how heavy|how old|how fast|how deep|how expensive|how far away"),
    "odd": (
        "cucumber|strawberry|violin|pumpkin|blanket|zebra|brick|sponge|coconut|pillow|trumpet|wallet|cabbage|carpet"
    ),
}
PATTERNS = (
    "where is {object}|where can i buy {food}|who is {name}|who wrote {object}|when does {place} open|"
    "why is {object} so {quality}|why did {name} go to {place}|how do i get to {place}|is it {weather} outside|"
    "what is the weather like {time}|will it be {weather} {time}|what time is it|what time does the bus leave|"
    "do you like {food}|do you speak spanish|have you seen {object}|have you ever been to {country}|can you {action}|"
    "could you {action} {time}|please {action}|please {action} {time}|do not {action}|i want to {action}|"
    "i would like some {food} please|i would rather {action} {time}|i need {object} {time}|"
    "i think {person} {did} {time}|i forgot where i put {object}|i am going to {place} {time}|let us {action}|"
    "{person} {did}|{person} {did} {time}|{name} {did} {time}|{name} and {name} {did}|{name} is at {place}|"
    "{person} wants to {action} {time}|{person} said that {name} {did}|{person} thinks it is {quality}|"
    "we met {person} at {place} {time}|we should {action} before it gets {weather}|it was {weather} at {place}|"
    "the food at {place} was {quality}|{object} is very {quality}|{object} looks {quality}|that sounds {quality}|"
    "did you know that {name} {did}|did {person} really {action}|tell me a story about {topic}|play some music|"
    "tell me a joke|tell me something about {topic}|what do you think about {topic}|who invented {object}|"
    "explain {topic} to me|what is the meaning of life|what is your favorite {topic}|open the door for {name}|"
    "set an alarm for {time}|turn the volume down|send a message to {name}|read the news to me please|"
    "remind me to {action} {time}|order {food} for {name}|how much does {food} cost|how are {person} today|"
    "how many people live in {country}|how big is {country}|where is {country}|how do you make {food}|"
    "what is the capital of {country}|tell me the capital of {country}|which city is the capital of {country}|"
    "what color is a {odd}|what color is the {odd}|how many legs has a {creature}|where does a {creature} live|"
    "what does a {creature} eat|what is the opposite of {odd}|what is {big} plus {big}|what is {big} times {big}|"
    "{big} minus {big}|who was {famous}|when was {famous} born|what did {famous} say about {topic}|{much} is {name}|"
    "{much} is a {creature}|{much} is {place}|what comes after winter holidays|what is a {odd} made of|"
    "the {creature} ate {food}|a {creature} is not {quality}|there is a {creature} at {place}|"
    "my {creature} likes {food}|nobody at {place} likes {topic}|{name} talks about {topic} {time}|"
    "if it is {weather} we will {action}|when {person} comes home we {action}|"
    "because {name} {did} we had to {action}|go forward and then turn left|stop it right there|wait a minute|"
    "of course|never mind|excuse me please|good luck with {topic}|what a {quality} day|this is {quality}|"
    "that is not {quality} at all|see you {time}|are you {quality}|are you at {place}|is {name} married|"
    "is {food} {quality}|was it {quality} at {place}|{person} has {object}|he took {object} to {place}|"
    "she {did} and {did}|they {did} {time}|you {did}|it took {name} a long time to {action}|"
    "there were {food} and {food} on the table|give {object} to {name}|put {object} under the chair|"
    "take {object} with you|bring {food} when you come|look at {object}|{person} never {did}|"
    "once upon a time {person} {did}|as soon as {name} {did} {person} {did}|buy {food}|"
    "the news about {topic} is {quality}|{topic} is {quality}|{topic} and {topic} are {quality}|who likes {topic}"
).split("|")
UNSEEN_PERCENT = 20
_SLOTS = {name: words.split("|") for name, words in WORDS.items()}


def is_unseen_pattern(pattern: str) -> bool:
    """Return whether a pattern is kept out of training (a fixed fifth, by CRC-32 of the text)."""
    return zlib.crc32(pattern.encode()) % 100 < UNSEEN_PERCENT


def sentence(rng: random.Random, pattern: str) -> str:
    """Return the pattern with every blank filled by a word or phrase of its list."""
    text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(_SLOTS[match.group(1)]), pattern)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def sample_sentences(
    rng: random.Random, count: int, unseen_patterns: bool, held_out: bool, excluded: Collection[str] = ()
) -> list[str]:
    """
    Draw `count` different sentences, none among `excluded`.

    Every pattern is asked for equally often; one whose sentences are used up is passed over.

    Args:
        rng (`random.Random`): the source of chance.
        count (`int`): how many.
        unseen_patterns (`bool`): whether they follow the patterns that are kept out of training, or the others.
        held_out (`bool`): whether all of them are held out by the hash of their text, or none; no matter for unseen
            patterns.
        excluded (`Collection[str]`, *optional*): sentences not to draw.

    Raises:
        ValueError: If the patterns do not hold so many sentences.
    """
    patterns = [pattern for pattern in PATTERNS if is_unseen_pattern(pattern) == unseen_patterns]
    found: dict[str, None] = {}
    misses = 0
    while len(found) < count:
        text = sentence(rng, rng.choice(patterns))
        if text in found or text in excluded or (not unseen_patterns and is_held_out(text) != held_out):
            misses += 1
            if misses > 100 * count + 10_000:
                raise ValueError(f"the patterns hold fewer than {count} sentences: {len(found)} found")
        else:
            found[text] = None
    return list(found)
