"""Feedback as training rows: preferences, corrections or scored groups.

Users judge the answer that they got (`Exchange.returned`). An edit counts before a preferred side, and that before a
rating; every judgement gives one row at most.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from everalign.correction.templates import question_text
from everalign.data.messages import Message, checked_prompt, completion_text
from everalign.data.records import Correction, CorrectionSet, Preference, PreferenceSet, Scored, ScoredSet
from everalign.data.rows import RowSet
from everalign.errors import InputError
from everalign.serving.store.records import Exchange, Feedback
from everalign.text import topic_of

KINDS = ("preferences", "corrections", "scored")
SETS: dict[str, type[RowSet[Any]]] = {"preferences": PreferenceSet, "corrections": CorrectionSet, "scored": ScoredSet}

NO_QUESTION = "no question in text"
NOTHING = "nothing to learn"
ONE_ANSWER = "one answer alone"


@dataclass(frozen=True)
class Judgement:
    """Feedback on the answer to a question in text.

    Args:
        exchange: the answered request.
        feedback: on the answer.
        question: the messages in the form of training rows.
        topic: identifies the question however it is written, see `topic_of`.
    """

    exchange: Exchange
    feedback: Feedback
    question: tuple[Message, ...]
    topic: str

    @property
    def edit(self) -> str | None:
        """The edited text, None if it changes nothing."""
        edited = self.feedback.edited_text
        return None if edited is None or edited.strip() == self.exchange.returned.strip() else edited

    @property
    def preferred(self) -> str | None:
        """The preferred side, None if there were no two answers to choose from."""
        differ = self.exchange.original.strip() != self.exchange.returned.strip()
        return self.feedback.preferred if differ else None

    @property
    def good(self) -> bool | None:
        """Whether the answer that the client got is good, None if the feedback does not say."""
        if self.edit is not None or self.feedback.preferred == "neither":
            return False
        if self.preferred is not None:
            return self.preferred == "corrected"
        return self.feedback.rating > 0 if self.feedback.rating else None


@dataclass(frozen=True)
class Candidate:
    """A row that may be learned.

    Args:
        row: the row.
        origin: "edit", "preferred", "identity" or "group".
        judgements: those it was made of, the oldest first.
    """

    row: Preference | Correction | Scored
    origin: str
    judgements: tuple[Judgement, ...]

    @property
    def key_id(self) -> str:
        return self.judgements[0].feedback.key_id

    @property
    def topic(self) -> str:
        return self.judgements[0].topic

    @property
    def group(self) -> tuple[str, ...]:
        """The origin and the tags of the first judgement; rows are balanced by it."""
        return (self.origin, *sorted(self.judgements[0].feedback.tags))

    @property
    def texts(self) -> tuple[str, ...]:
        row = self.row
        if isinstance(row, Preference):
            return (question_text(row.prompt), completion_text(row.chosen), completion_text(row.rejected))
        if isinstance(row, Correction):
            return (question_text(row.question), row.answer, row.correction)
        return (question_text(row.prompt), *map(completion_text, row.completions))


def judgement_of(exchange: Exchange, feedback: Feedback) -> Judgement | None:
    """Return feedback as a judgement; None if the question is not only text, but has images or tool results."""
    messages = []
    for message in exchange.messages:
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        # Newer servers call the system's messages the developer's.
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({**message, "role": role, "content": content})
    try:
        prompt = checked_prompt(messages)
    except InputError:
        return None
    # The tools themselves are not stored, and without them the template would not render what the model read.
    if isinstance(prompt, str) or any(m["role"] == "tool" or m.get("tool_calls") for m in prompt):
        return None
    return Judgement(exchange, feedback, tuple(prompt), topic_of(question_text(prompt)))


def candidates_of(judgements: Iterable[Judgement], kind: str) -> tuple[list[Candidate], list[tuple[Judgement, str]]]:
    """Make rows of one of `KINDS`.

    preferences: the edit over the returned answer; or, of the original and the corrected answer, the preferred one over
    the other. corrections: the original answer, corrected to the edit or to the preferred corrected answer; or the
    original unchanged, if it was preferred, or returned and rated good. scored: all judged answers to one question; 1
    is good, 0 is bad, and the reward of an answer is the mean over keys of each key's mean.

    Returns:
        The rows, and the judgements that give none, with the reason.
    """
    if kind == "scored":
        return _scored_groups(judgements)
    make = _preference if kind == "preferences" else _correction
    made: list[Candidate] = []
    unusable: list[tuple[Judgement, str]] = []
    for judgement in judgements:
        candidate = make(judgement)
        if candidate is None:
            unusable.append((judgement, NOTHING))
        else:
            made.append(candidate)
    return made, unusable


def _preference(judgement: Judgement) -> Candidate | None:
    original, returned = judgement.exchange.original, judgement.exchange.returned
    if judgement.edit is not None:
        chosen, rejected, origin = judgement.edit, returned, "edit"
    elif judgement.preferred == "corrected":
        chosen, rejected, origin = returned, original, "preferred"
    elif judgement.preferred == "original":
        chosen, rejected, origin = original, returned, "preferred"
    else:
        return None
    if not chosen.strip() or not rejected.strip():
        return None
    return Candidate(Preference(judgement.question, chosen, rejected), origin, (judgement,))


def _correction(judgement: Judgement) -> Candidate | None:
    original, returned = judgement.exchange.original, judgement.exchange.returned
    only_one = original.strip() == returned.strip()
    if judgement.edit is not None:
        correction, origin = judgement.edit, "edit"
    elif judgement.preferred == "corrected":
        correction, origin = returned, "preferred"
    elif judgement.preferred == "original" or (only_one and judgement.good):
        correction, origin = original, "identity"
    else:
        return None
    if not original.strip() or not correction.strip():
        return None
    return Candidate(Correction(judgement.question, original, correction), origin, (judgement,))


def _scored_groups(judgements: Iterable[Judgement]) -> tuple[list[Candidate], list[tuple[Judgement, str]]]:
    """Make one group of every topic, in the first way that its question was written."""
    members: dict[str, list[Judgement]] = defaultdict(list)
    # Rewards by topic, text and key: the mean over keys is taken last, so that a key counts once, with all its users.
    rewards: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    unusable: list[tuple[Judgement, str]] = []
    for judgement in judgements:
        given = _rewards(judgement)
        if not given:
            unusable.append((judgement, NOTHING))
            continue
        members[judgement.topic].append(judgement)
        for text, reward in given.items():
            rewards[judgement.topic][text][judgement.feedback.key_id].append(reward)
    made: list[Candidate] = []
    for topic, group in members.items():
        means = {text: fmean(map(fmean, keys.values())) for text, keys in rewards[topic].items()}
        if len(set(means.values())) > 1:
            row = Scored(group[0].question, tuple(means), tuple(means.values()))
            made.append(Candidate(row, "group", tuple(group)))
        else:
            unusable += [(judgement, ONE_ANSWER) for judgement in group]
    return made, unusable


def _rewards(judgement: Judgement) -> dict[str, float]:
    """Return the rewards that a judgement gives to each answer in it."""
    original, returned = judgement.exchange.original, judgement.exchange.returned
    rewards: dict[str, float] = {}
    if judgement.edit is not None:
        rewards = {judgement.edit: 1.0, returned: 0.0}
    elif judgement.preferred is not None:
        sides = {"corrected": returned, "original": original}
        rewards = {text: float(judgement.preferred == side) for side, text in sides.items()}
    elif judgement.feedback.rating is not None:
        rewards = {returned: (judgement.feedback.rating + 1) / 2}
    return {text: reward for text, reward in rewards.items() if text.strip()}
