"""Generated personas: the data of `quickstart`, and a part of what the embedded backbone was trained on.

Everything here is made up by this file: users with a few likings, dialogues that ask about them, and a vector per
user. A user's answers cannot be guessed without knowing the user, so what a prefix carries can be measured.
Users are numbered; numbers from `TRAIN`, `VALIDATION` and `PRETRAINING` never overlap.
"""

import numpy as np

from e2p_jax.datasets.records import Record

TRAIN = range(3000)
VALIDATION = range(10_000, 10_200)
PRETRAINING = range(100_000, 124_000)
WIDTH = 64  # of a user vector

# topic -> (values, what a user says of it in a persona, questions, answers)
TOPICS: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    "pet": (
        "dog cat parrot rabbit horse turtle hamster snake goldfish pony ferret lizard duck goat",
        ["i have a pet {v}.", "my {v} is my best friend.", "i own a {v}."],
        ["do you have any pets?", "any animals at home?", "who lives with you?", "do you like animals?"],
        ["yes, i have a {v}.", "i have a {v} at home.", "i do! i own a {v}.", "just me and my {v}."],
    ),
    "food": (
        "pizza sushi pasta tacos curry steak salad soup burgers noodles rice cheese chicken lobster",
        ["my favorite food is {v}.", "i love to eat {v}.", "i could eat {v} every day."],
        ["what do you like to eat?", "what is your favorite food?", "are you hungry?", "what did you have for dinner?"],
        ["i love {v}.", "my favorite is {v}.", "{v}, i could eat it every day.", "some {v}, as always."],
    ),
    "drink": (
        "coffee tea milk beer wine water lemonade cola juice cocoa cider whiskey",
        ["i drink a lot of {v}.", "i can not live without {v}.", "my favorite drink is {v}."],
        ["can i get you a drink?", "what would you like to drink?", "what are you drinking?"],
        ["some {v}, please.", "i would love some {v}.", "{v}, my favorite.", "just {v} for me."],
    ),
    "job": (
        "teacher nurse doctor farmer lawyer chef driver pilot singer writer painter dancer soldier plumber",
        ["i work as a {v}.", "i am a {v}.", "my job is being a {v}."],
        ["what do you do for a living?", "where do you work?", "what is your job?", "do you work?"],
        ["i am a {v}.", "i work as a {v}.", "i have been a {v} for years.", "i earn my money as a {v}."],
    ),
    "city": (
        "london paris chicago boston texas florida california seattle denver dallas tokyo rome canada mexico",
        ["i live in {v}.", "i am from {v}.", "my home is in {v}."],
        ["where are you from?", "where do you live?", "where is your home?", "what place do you call home?"],
        ["i am from {v}.", "i live in {v}.", "my home is in {v}.", "{v}, i have always lived there."],
    ),
    "hobby": (
        "reading painting cooking fishing hiking dancing gardening swimming hunting knitting baking camping writing",
        ["i love {v}.", "{v} is my hobby.", "i go {v} every weekend.", "i spend my time {v}."],
        ["what do you do for fun?", "do you have any hobbies?", "what do you do on weekends?", "what are you up to?"],
        ["i love {v}.", "{v} mostly.", "i spend my time {v}.", "i enjoy {v} a lot."],
    ),
    "music": (
        "rock jazz rap pop country blues metal classical folk soul punk disco",
        ["i listen to {v} music.", "i love {v} music.", "{v} music makes me happy."],
        ["what music do you like?", "do you listen to music?", "what are you listening to?", "any favorite band?"],
        ["i love {v} music.", "mostly {v} music.", "i listen to {v} music all day.", "anything that is {v} music."],
    ),
    "sport": (
        "football basketball tennis golf baseball soccer hockey boxing volleyball running cycling surfing",
        ["i play {v}.", "my favorite sport is {v}.", "i am good at {v}."],
        ["do you play any sports?", "what is your favorite sport?", "do you like sports?", "do you work out?"],
        ["i play {v}.", "yes, {v} is my sport.", "i like {v} the most.", "i am into {v}."],
    ),
    "color": (
        "red blue green yellow purple orange black white pink brown",
        ["my favorite color is {v}.", "i only wear {v}.", "everything i own is {v}."],
        ["what is your favorite color?", "what color is your car?", "what color do you like?"],
        ["it is {v}.", "{v}, of course.", "i like {v} best.", "my favorite is {v}."],
    ),
    "instrument": (
        "guitar piano violin drums flute trumpet harp bass cello banjo",
        ["i play the {v}.", "i am learning the {v}.", "i practice the {v} every day."],
        ["do you play an instrument?", "can you play any music?", "are you in a band?"],
        ["i play the {v}.", "yes, the {v}.", "i have played the {v} for years.", "i practice the {v}."],
    ),
    "family": (
        "brother sister mother father wife husband daughter son grandmother uncle cousin twin",
        ["i live with my {v}.", "my {v} means the world to me.", "i am very close to my {v}."],
        ["who are you close to?", "tell me about your family.", "do you live alone?", "how is your family?"],
        ["i live with my {v}.", "my {v} is my favorite person.", "i am close to my {v}.", "my {v} is doing well."],
    ),
    "season": (
        "summer winter spring fall christmas halloween easter thanksgiving",
        ["i love {v}.", "my favorite time of the year is {v}.", "i can not wait for {v}."],
        ["what is your favorite time of the year?", "when are you happy?", "do you like the weather?"],
        ["i love {v}.", "i am happy in {v}.", "{v} is the best time.", "i can not wait for {v}."],
    ),
}
_GREETINGS = ["hi, how are you?", "hello there!", "hey, what is up?", "good morning!", "hi! nice to meet you."]
_REPLIES = [
    "i am good, and you?",
    "hello! i am fine.",
    "doing well today.",
    "great, thanks for asking.",
    "nice to meet you.",
]
_REMARKS = ["nice!", "that is cool.", "oh, i see.", "sounds good.", "me too.", "wow.", "interesting."]
_CONTEXT_SIZE = 6  # topics a user has something to say on
_ASKED = 4  # of them, in a dialogue


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def traits(user: int) -> dict[str, str]:
    """Topic -> value of one user."""
    rng = np.random.default_rng([11, user])
    topics = rng.permutation(sorted(TOPICS))[:_CONTEXT_SIZE]
    return {str(topic): _pick(rng, TOPICS[str(topic)][0].split()) for topic in topics}


def record(user: int, dialogue: int = 0) -> Record:
    """A dialogue with one user, who is the assistant."""
    values = traits(user)
    persona = np.random.default_rng([12, user])
    context = tuple(_pick(persona, TOPICS[topic][1]).format(v=value) for topic, value in values.items())
    rng = np.random.default_rng([13, user, dialogue])
    messages = [
        {"role": "user", "content": _pick(rng, _GREETINGS)},
        {"role": "assistant", "content": _pick(rng, _REPLIES)},
    ]
    for topic in rng.permutation(sorted(values))[:_ASKED]:
        _, _, questions, answers = TOPICS[str(topic)]
        remark = _pick(rng, _REMARKS) + " " if len(messages) > 2 and rng.random() < 0.5 else ""
        messages.append({"role": "user", "content": remark + _pick(rng, questions)})
        messages.append({"role": "assistant", "content": _pick(rng, answers).format(v=values[str(topic)])})
    return Record(f"user-{user}", context, tuple(messages), source=f"synthetic user {user}")


def vector(user: int) -> np.ndarray:
    """[WIDTH] float32: a fixed random direction for every value the user has, added up, plus a little noise."""
    every = [(topic, value) for topic in sorted(TOPICS) for value in TOPICS[topic][0].split()]
    directions = np.random.default_rng(14).normal(size=(len(every), WIDTH))
    mine = sum(directions[every.index(item)] for item in traits(user).items())
    noise = 0.1 * np.random.default_rng([15, user]).normal(size=WIDTH)
    return ((mine + noise) / np.sqrt(_CONTEXT_SIZE)).astype(np.float32)


def records(split: str) -> list[Record]:
    """The quickstart's records: `train` has 3000 users, `validation` 200 others."""
    users = {"train": TRAIN, "validation": VALIDATION}.get(split, range(0))
    return [record(user) for user in users]
