"""What a policy learns from a corrector, and what happened in a round of it."""

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, get_args

from everalign.errors import InputError
from everalign.modeling.sampling import SamplingOptions

Labels = Literal["sft", "dpo", "fpo", "var"]


@dataclass(frozen=True)
class DistillOptions:
    """What the policy learns from corrections.

    Args:
        labels: `sft`: every corrected answer, those that are good as they are included, by plain negative
            log-likelihood (the paper's safe choice). `dpo`, `fpo`: the correction is preferred to the answer. `var`:
            the two are a scored group with rewards 1 and 0. These learn from changed answers alone.
        rounds: how often the policy answers anew.
        sampling_temperature: what logits are divided by.
        max_new_tokens: longest answer; what has not ended by then is left out.
    """

    labels: Labels = "sft"
    rounds: int = 1
    sampling_temperature: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise InputError(f"labels must be one of {', '.join(get_args(Labels))}, found {self.labels!r}")
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise InputError(f"rounds must be a whole number of at least 1, found {self.rounds!r}")
        self.sampling(1)

    @property
    def objective(self) -> str:
        """The learner's objective; `var` with one completion of weight 1 is the plain negative log-likelihood."""
        return "var" if self.labels == "sft" else self.labels

    def sampling(self, room: int) -> SamplingOptions:
        """Return how answers are sampled to prompts of at most `room` tokens."""
        return SamplingOptions(1, self.sampling_temperature, self.max_new_tokens, room)


@dataclass(frozen=True)
class Round:
    """What happened in one round, as `distill/round-N.json` of the run tells it.

    Args:
        round: from 1 on.
        prompts: that were asked.
        unanswered: prompts whose answer did not end within max_new_tokens, or says nothing; left out.
        answers: that the corrector saw.
        changed: answers that it changed.
        changed_share: of the answers.
        edit: mean share of the words of answer and correction that the other lacks, over changed answers; 0 where
            none was changed.
        rows: that were given to the policy to learn, which leaves out those above max_length (the version's manifest
            counts them); 0 where there was nothing left to learn.
    """

    round: int
    prompts: int
    unanswered: int
    answers: int
    changed: int
    changed_share: float
    edit: float
    rows: int

    def summary(self) -> str:
        """One line of text for a log."""
        line = f"{self.answers} answers, {self.changed} of them changed ({self.changed_share:.1%})"
        if self.changed:
            line += f", {self.edit:.1%} of their words"
        if self.unanswered:
            line += f"; {self.unanswered} answers did not end within max_new_tokens and are left out"
        return line


def edit_share(answer: str, correction: str) -> float:
    """Return the share of the words of two texts that the other one lacks: 0 for equal ones, 1 for no word in common.

    Words are matched in order, as `difflib` does.
    """
    return 1.0 - SequenceMatcher(None, answer.split(), correction.split(), autojunk=False).ratio()
