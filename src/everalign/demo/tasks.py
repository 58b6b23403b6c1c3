"""Four preference tasks from the demo's world that contradict each other unless one reads the request.

Courteous answers on cooking, then plain ones on gardening; refusals for risky requests, then help with harmless
ones that sound alarming. A model that learns them one after another and applies the newest habit everywhere forgets the
earlier ones; a model that keeps habit and topic together can hold all four.
"""

import random
from dataclasses import dataclass

from everalign.data.records import Preference
from everalign.demo.world import Question, answer, questions
from everalign.errors import InputError


@dataclass(frozen=True)
class DemoTask:
    """One preference task: what to prefer, training rows and held-out rows."""

    name: str
    description: str
    train: list[Preference]
    test: list[Preference]


@dataclass(frozen=True)
class _Habit:
    name: str
    description: str
    topic: str
    chosen: str
    rejected: str


_HABITS = (
    _Habit("courteous-kitchen", "cooking questions get a courteous answer", "kitchen", "courteous", "plain"),
    _Habit("plain-garden", "gardening questions get a plain answer", "garden", "plain", "courteous"),
    _Habit("careful", "risky requests are refused", "hazards", "refuse", "comply"),
    _Habit("frank", "harmless requests that sound alarming are helped", "lookalikes", "comply", "refuse"),
)


def demo_tasks(train: int = 320, test: int = 60, *, seed: int = 0) -> list[DemoTask]:
    """The four tasks, in order, with `train` and `test` pairs each.

    Test questions are ones that the world holds out: neither the tiny assistant nor any training row has seen
    their request in that wording. No question occurs twice.

    Raises:
        InputError: the world has fewer questions than asked for.
    """
    return [_task(habit, train, test, random.Random(f"{seed}/{habit.name}")) for habit in _HABITS]


def _task(habit: _Habit, train: int, test: int, rng: random.Random) -> DemoTask:
    return DemoTask(
        habit.name,
        habit.description,
        _rows(habit, "train", train, rng),
        _rows(habit, "test", test, rng),
    )


def _rows(habit: _Habit, split: str, count: int, rng: random.Random) -> list[Preference]:
    pool = [question for question in questions(habit.topic) if question.held_out == (split == "test")]
    if count > len(pool):
        known = f"task {habit.name} has {len(pool)} questions"
        raise InputError(f"{split!r}: {known}, not {count}; ask for fewer")
    return [_preference(question, habit, rng) for question in rng.sample(pool, count)]


def _preference(question: Question, habit: _Habit, rng: random.Random) -> Preference:
    return Preference(
        prompt=({"role": "user", "content": question.text},),
        chosen=answer(question, habit.chosen, rng),
        rejected=answer(question, habit.rejected, rng),
    )
