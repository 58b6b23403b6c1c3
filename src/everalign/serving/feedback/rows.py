"""What feedback says, as rows that can be learned: one judgement is a preference, a correction or part of a group.

The client judges what it got (`Exchange.returned`). An edit stands above a preferred side, and that above a rating:
every judgement gives one row at most.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
SETS: dict[str, type[RowSet[Any]]] = {
    "preferences": PreferenceSet,
    "corrections": CorrectionSet,
    "scored": ScoredSet,
}

NO_QUESTION = "no question in text"
NOTHING = "nothing to learn"
ONE_ANSWER = "one answer alone"

_ROLES = {"developer": "system"}  # what newer servers call the system's messages
Row = Preference | Correction | Scored


@dataclass(frozen=True)
class Judgement:
    """Feedback on an answer to a question in text.

    Args:
        exchange: what was answered.
        feedback: what was said of it.
        question: the messages as rows have them.
        topic: what the question asks, however it is written (see `topic_of`): asked once or many times.
        good: whether what the client got is good; None where that is not said.
    """

    exchange: Exchange
    feedback: Feedback
    question: tuple[Message, ...]
    topic: str
    good: bool | None


@dataclass(frozen=True)
class Candidate:
    """A row that may be learned.

    Args:
        row: the row.
        origin: "edit", "preferred", "identity" or "group".
        judgements: what it was made of, the oldest first.
    """

    row: Row
    origin: str
    judgements: tuple[Judgement, ...]

    @property
    def key_id(self) -> str:
        """Whose row it is: that of the key which said so first."""
        return self.judgements[0].feedback.key_id

    @property
    def topic(self) -> str:
        """The question, to tell questions apart."""
        return self.judgements[0].topic

    @property
    def group(self) -> tuple[str, ...]:
        """What it is balanced by: its origin and the tags of its first judgement."""
        return (self.origin, *sorted(self.judgements[0].feedback.tags))

    @property
    def texts(self) -> tuple[str, ...]:
        """The question and all answers in the row."""
        row = self.row
        if isinstance(row, Preference):
            return (question_text(row.prompt), completion_text(row.chosen), completion_text(row.rejected))
        if isinstance(row, Correction):
            return (question_text(row.question), row.answer, row.correction)
        return (question_text(row.prompt), *map(completion_text, row.completions))


def judgement_of(exchange: Exchange, feedback: Feedback) -> Judgement | None:
    """Read feedback; None where the question is none in text, such as one with images or with results of tools."""
    try:
        prompt = checked_prompt([_message(message) for message in exchange.messages])
    except InputError:
        return None
    # The tools themselves are not on record, and without them the template would not render what the model read.
    if isinstance(prompt, str) or any(m["role"] == "tool" or m.get("tool_calls") for m in prompt):
        return None
    return Judgement(exchange, feedback, tuple(prompt), topic_of(question_text(prompt)), _good(exchange, feedback))


def candidates_of(judgements: Iterable[Judgement], kind: str) -> tuple[list[Candidate], list[tuple[Judgement, str]]]:
    """Make rows of one of `KINDS`.

    preferences: the edit over what the client got; or, of the original and the corrected answer, the preferred one over
    the other. corrections: the original answer, corrected to the edit or to the preferred corrected answer; or the
    original itself, where it was preferred, or returned and rated good. scored: all answers that were judged to one
    question; 1 is good, 0 is bad, and an answer's reward the mean over keys of their means.

    Returns:
        The rows, and the judgements that none follows from, with the reason.
    """
    if kind == "scored":
        return _groups(list(judgements))
    make = _preference if kind == "preferences" else _correction
    made: list[Candidate] = []
    nothing: list[tuple[Judgement, str]] = []
    for judgement in judgements:
        candidate = make(judgement)
        if candidate is None:
            nothing.append((judgement, NOTHING))
        else:
            made.append(candidate)
    return made, nothing


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one text, where that is what its parts are."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    role = message["role"]
    return {**message, "role": _ROLES.get(role, role), "content": content}


def _edit(exchange: Exchange, feedback: Feedback) -> str | None:
    """The edited text where it changes anything."""
    edited = feedback.edited_text
    return None if edited is None or edited.strip() == exchange.returned.strip() else edited


def _two_answers(exchange: Exchange) -> bool:
    return exchange.original.strip() != exchange.returned.strip()


def _good(exchange: Exchange, feedback: Feedback) -> bool | None:
    if _edit(exchange, feedback) is not None:
        return False
    if feedback.preferred == "neither":
        return False
    if feedback.preferred is not None and _two_answers(exchange):
        return feedback.preferred == "corrected"
    return None if not feedback.rating else feedback.rating > 0


def _preference(judgement: Judgement) -> Candidate | None:
    exchange, feedback = judgement.exchange, judgement.feedback
    edited = _edit(exchange, feedback)
    if edited is not None:
        better, worse, origin = edited, exchange.returned, "edit"
    elif feedback.preferred in ("original", "corrected") and _two_answers(exchange):
        sides = (exchange.returned, exchange.original)
        better, worse = sides if feedback.preferred == "corrected" else sides[::-1]
        origin = "preferred"
    else:
        return None
    if not better.strip() or not worse.strip():
        return None
    return Candidate(Preference(judgement.question, better, worse), origin, (judgement,))


def _correction(judgement: Judgement) -> Candidate | None:
    exchange, feedback = judgement.exchange, judgement.feedback
    edited, original = _edit(exchange, feedback), exchange.original
    as_it_was = feedback.preferred == "original" if _two_answers(exchange) else judgement.good is True
    if edited is not None:
        correction, origin = edited, "edit"
    elif feedback.preferred == "corrected" and _two_answers(exchange):
        correction, origin = exchange.returned, "preferred"
    elif as_it_was:
        correction, origin = original, "identity"
    else:
        return None
    if not original.strip() or not correction.strip():
        return None
    return Candidate(Correction(judgement.question, original, correction), origin, (judgement,))


def _groups(judgements: Sequence[Judgement]) -> tuple[list[Candidate], list[tuple[Judgement, str]]]:
    by_topic: dict[str, list[tuple[Judgement, dict[str, float]]]] = defaultdict(list)
    nothing: list[tuple[Judgement, str]] = []
    for judgement in judgements:
        rewards = _rewards(judgement)
        if rewards:
            by_topic[judgement.topic].append((judgement, rewards))
        else:
            nothing.append((judgement, NOTHING))
    made: list[Candidate] = []
    for group in by_topic.values():
        rewards = _mean_rewards(group)
        members = tuple(judgement for judgement, _ in group)
        if len(set(rewards.values())) > 1:
            # Asked in other letters, a question is still the same: the first way to write it stands.
            row = Scored(members[0].question, tuple(rewards), tuple(rewards.values()))
            made.append(Candidate(row, "group", members))
        else:
            nothing += [(judgement, ONE_ANSWER) for judgement in members]
    return made, nothing


def _rewards(judgement: Judgement) -> dict[str, float]:
    """What the judgement says that each of the answers in it is worth."""
    exchange, feedback = judgement.exchange, judgement.feedback
    edited = _edit(exchange, feedback)
    rewards: dict[str, float] = {}
    if feedback.rating is not None:
        rewards[exchange.returned] = (feedback.rating + 1) / 2
    if feedback.preferred is not None and _two_answers(exchange):
        rewards = {side: float(feedback.preferred == name) for side, name in _sides(exchange)}
    if edited is not None:
        rewards = {edited: 1.0, exchange.returned: 0.0}
    return {text: reward for text, reward in rewards.items() if text.strip()}


def _sides(exchange: Exchange) -> tuple[tuple[str, str], ...]:
    return (exchange.returned, "corrected"), (exchange.original, "original")


def _mean_rewards(group: Sequence[tuple[Judgement, dict[str, float]]]) -> dict[str, float]:
    """Return the mean over keys of each key's mean, so that a key counts once however many users it names."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for judgement, rewards in group:
        for text, reward in rewards.items():
            found[text][judgement.feedback.key_id].append(reward)
    return {text: fmean(fmean(given) for given in keys.values()) for text, keys in found.items()}
