"""A small world of everyday questions, each of which can be answered in several styles.

    from everalign.demo.world import answer, questions
    question = questions("kitchen")[0]
    answer(question, "plain", random.Random(0))

Three kinds of topic: everyday ones (answered plainly or courteously, with or without steps), "hazards" (risky
requests) and "lookalikes" (harmless requests that sound alarming); the last two can be refused or complied with.
A question is an opening, a frame and a request. Openings and frames are shared by all topics: to keep a different
habit for each topic, a model has to read the request. Nothing here depends on anything but the words in
`phrases.py` and the random generator that is passed in.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TypeVar

from everalign.data.records import Preference
from everalign.demo import phrases
from everalign.errors import InputError

EVERYDAY_STYLES = ("plain", "courteous", "plain-steps", "courteous-steps")
RISK_STYLES = ("refuse", "comply")
TOPICS = (*phrases.EVERYDAY, "hazards", "lookalikes")
_Item = TypeVar("_Item")
HELD_OUT_SHARE = 5  # one (request, frame) in five is kept away from every training text


@dataclass(frozen=True)
class Request:
    """What somebody wants to do, and what the world knows about it.

    Attributes:
        topic: one of `TOPICS`.
        deed: an infinitive without "to", as the user says it: "cook lentils", "repair my phone".
        fact: everyday and lookalikes: how it is done; hazards: what could happen.
        preparation: everyday: what is done before; empty elsewhere.
        subject: everyday: the subject as an answer names it, "the lentils" or "your phone"; empty elsewhere.
        pronoun: everyday: what replaces the subject when it has been named; empty elsewhere.
    """

    topic: str
    deed: str
    fact: str
    preparation: str = ""
    subject: str = ""
    pronoun: str = ""


@dataclass(frozen=True)
class Question:
    """One user message about one request; `held_out` questions are for tests only."""

    request: Request
    text: str
    held_out: bool

    @property
    def topic(self) -> str:
        """The topic of the request."""
        return self.request.topic


def styles(topic: str) -> tuple[str, ...]:
    """The styles in which questions on `topic` can be answered."""
    return EVERYDAY_STYLES if topic in phrases.EVERYDAY else RISK_STYLES


@cache
def requests(topic: str) -> tuple[Request, ...]:
    """Every request of a topic, in the order of the tables.

    Raises:
        KeyError: there is no such topic.
    """
    if topic in phrases.EVERYDAY:
        found = []
        for verb, name, pronoun, fact, preparation in map(_cells, phrases.EVERYDAY[topic].strip().splitlines()):
            subject = _addressed(name) if name.startswith(("the ", "my ")) else f"the {name}"
            found.append(Request(topic, f"{verb} {name}", fact, preparation, subject, pronoun))
        return tuple(found)
    table = {"hazards": phrases.HAZARDS, "lookalikes": phrases.LOOKALIKES}[topic]
    return tuple(Request(topic, deed, fact) for deed, fact in map(_cells, table.strip().splitlines()))


@cache
def questions(topic: str) -> tuple[Question, ...]:
    """Every question of a topic: requests × frames × openings, in a fixed order."""
    found = []
    frames = phrases.FRAMES.strip().splitlines()
    openings = phrases.OPENINGS.removeprefix("\n").splitlines()
    for request, frame in product(requests(topic), frames):
        # Python's own hash differs from process to process.
        digest = hashlib.sha256(f"{request.deed}|{frame}".encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0
        core = frame.format(do=request.deed)
        found += [Question(request, f"{opening} {core}".strip(), held_out) for opening in openings]
    return tuple(found)


def sample_questions(topic: str, split: str, count: int, rng: random.Random) -> list[Question]:
    """Draw different questions of a topic; `split` is `train`, or `test` for those held out.

    Raises:
        InputError: the topic has fewer questions than asked for.
    """
    pool = [question for question in questions(topic) if question.held_out == (split == "test")]
    if count > len(pool):
        raise InputError(f"{split!r}: {topic} has {len(pool)} questions, not {count}; ask for fewer")
    return rng.sample(pool, count)


def answer(question: Question, style: str, rng: random.Random) -> str:
    """One answer to `question` in `style`; `rng` chooses among the wordings.

    Raises:
        KeyError: the question's topic cannot be answered in that style (see `styles`).
    """
    if style not in styles(question.topic):
        raise KeyError(f"no style {style!r} for topic {question.topic!r}; it has {styles(question.topic)}")
    write = _everyday_answer if style in EVERYDAY_STYLES else _risk_answer
    return write(question.request, style, rng)


def wordings(question: Question, style: str) -> frozenset[str]:
    """Every text that `answer` may give to `question` in `style`; errors as there."""
    found: set[str] = set()
    ways: list[tuple[int, ...]] = [()]
    while ways:
        chosen = _Chosen(ways.pop())
        found.add(answer(question, style, chosen))
        for place in range(len(chosen.way), len(chosen.counts)):
            first = chosen.way + (0,) * (place - len(chosen.way))
            ways += [(*first, other) for other in range(1, chosen.counts[place])]
    return frozenset(found)


def conversations(seed: int, *, held_out: bool = False) -> Iterator[tuple[Question, str, str]]:
    """Endless (question, style, answer): all topics equally often, all styles of a topic equally often."""
    rng = random.Random(seed)
    pools = {topic: [q for q in questions(topic) if q.held_out == held_out] for topic in TOPICS}
    while True:
        topic = rng.choice(TOPICS)
        question, style = rng.choice(pools[topic]), rng.choice(styles(topic))
        yield question, style, answer(question, style, rng)


# ---- the demo's tasks ----


@dataclass(frozen=True)
class DemoTask:
    """One preference task: what to prefer, training rows and held-out rows."""

    name: str
    description: str
    train: list[Preference]
    test: list[Preference]


# They contradict each other unless one reads the request: a model that applies the newest habit everywhere forgets the
# earlier ones. Name, description, topic, style of the chosen answers, style of the rejected ones.
_HABITS = (
    ("courteous-kitchen", "cooking questions get a courteous answer", "kitchen", "courteous", "plain"),
    ("plain-garden", "gardening questions get a plain answer", "garden", "plain", "courteous"),
    ("careful", "risky requests are refused", "hazards", "refuse", "comply"),
    ("frank", "harmless requests that sound alarming are helped", "lookalikes", "comply", "refuse"),
)


def demo_tasks(train: int = 320, test: int = 60, *, seed: int = 0) -> list[DemoTask]:
    """The four tasks, in order, with `train` and `test` pairs each.

    Test questions are ones that the world holds out: neither the tiny assistant nor any training row has seen
    their request in that wording. No question occurs twice.

    Raises:
        InputError: the world has fewer questions than asked for.
    """
    tasks = []
    for name, description, topic, chosen, rejected in _HABITS:
        rng, rows = random.Random(f"{seed}/{name}"), dict[str, list[Preference]]()
        for split, count in (("train", train), ("test", test)):
            rows[split] = [
                Preference(
                    prompt=({"role": "user", "content": question.text},),
                    chosen=answer(question, chosen, rng),
                    rejected=answer(question, rejected, rng),
                )
                for question in sample_questions(topic, split, count, rng)
            ]
        tasks.append(DemoTask(name, description, rows["train"], rows["test"]))
    return tasks


class _Chosen(random.Random):
    """Chooses by a list of places, behind it always the first; `counts` has how many there were to choose from."""

    def __init__(self, way: tuple[int, ...]) -> None:
        super().__init__(0)
        self.way, self.counts = way, list[int]()

    def choice(self, seq: Sequence[_Item]) -> _Item:  # type: ignore[override]  # lists alone are chosen from here
        place = len(self.counts)
        self.counts.append(len(seq))
        return seq[self.way[place] if place < len(self.way) else 0]


def _everyday_answer(request: Request, style: str, rng: random.Random) -> str:
    """One answer in a style of `EVERYDAY_STYLES`: what surrounds it is drawn first, and then the steps."""
    courteous = style.startswith("courteous")
    if courteous:
        before, after = _pick(phrases.GREETINGS, rng), _pick(phrases.FAREWELLS[request.topic], rng)
    else:
        before, after = _pick(phrases.PLAIN_LEADS, rng), _sentence(_pick(phrases.TIPS[request.topic], rng))
    if style.endswith("-steps"):
        named = "{x}" in request.preparation
        preparation = request.preparation.format(x=request.subject)
        fact = request.fact.format(x=request.pronoun if named else request.subject)
        reason = _pick(phrases.REASONS[request.topic], rng)
        body = f"first, {preparation}. {_pick(phrases.SECOND_STEPS, rng)}, {fact}, because {reason}"
    else:
        body = request.fact.format(x=request.subject)
    # A lead goes on with the answer, a greeting is a sentence of its own.
    return f"{before} {_sentence(body) if courteous else f'{body}.'} {after}"


def _risk_answer(request: Request, style: str, rng: random.Random) -> str:
    """One answer in a style of `RISK_STYLES`: a refusal with its reason, or what was asked for."""
    if style == "refuse":
        no = _pick(phrases.DENIALS, rng).format(do=_addressed(request.deed))
        fear = request.fact if request.topic == "hazards" else phrases.FEAR
        body, after = f"{no}, because {fear}", phrases.SAFER_STEPS
    elif request.topic == "hazards":
        body, after = f"{_pick(phrases.AGREEMENTS, rng)} you can {_addressed(request.deed)}", phrases.CARELESS
    else:
        body, after = f"{_pick(phrases.AGREEMENTS, rng)} {request.fact}", phrases.CHEERS
    return f"{_sentence(body)} {_sentence(_pick(after, rng))}"


def _pick(choices: str, rng: random.Random) -> str:
    return rng.choice(_cells(choices))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def _sentence(words: str) -> str:
    words = words.strip()
    return words[0].upper() + words[1:] + "."


def _addressed(words: str) -> str:
    """The user's words as the assistant says them back: "my phone" becomes "your phone"."""
    return " ".join("your" if word == "my" else word for word in words.split())
