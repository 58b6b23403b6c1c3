"""What a gate makes of the corrections that a policy writes: nonsense is refused, whatever the likelihoods say."""

import pytest

from everalign.correction.objective import Rewritten
from everalign.data import Correction
from everalign.errors import InputError
from everalign.evaluation.scorers import CallableScorer
from everalign.learning.evaluation_suite import compare_written
from everalign.learning.promotion import compare_values, judge
from everalign.methods import LifeAlign
from learner_for_tests import make_learner
from models_for_tests import saved_model

ROWS = [Correction(f"q{i}?", f"no, not at all {i}", f"yes, of course {i}") for i in range(60)]
RIGHT = [row.correction for row in ROWS]
LEFT = [row.answer for row in ROWS]
NONSENSE = [f"the the of {i} boil" for i in range(60)]


def verdict_on(before, after, scorer=None, tolerance=0.05):
    compared = compare_written({"a": Rewritten(ROWS, before, 0)}, {"a": Rewritten(ROWS, after, 0)}, scorer)
    return judge(tolerance, compared, before == after)


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (LEFT, RIGHT, "promoted"),
        (RIGHT, NONSENSE, "refused"),
        (LEFT, NONSENSE, "refused"),
        (NONSENSE, NONSENSE, "refused"),  # as bad as before is worse than answers left alone
        (RIGHT, LEFT, "refused"),
        (NONSENSE, RIGHT, "promoted"),
        (RIGHT, [*NONSENSE[:3], *RIGHT[3:]], "not enough evidence"),
        (RIGHT, RIGHT, "not enough evidence"),  # nothing has changed
        (LEFT, LEFT, "not enough evidence"),
    ],
)
def test_corrections_are_compared_with_those_before_and_with_answers_left_alone(before, after, outcome):
    assert verdict_on(before, after).outcome == outcome


def test_good_answers_that_are_no_longer_left_alone_are_forgotten():
    before, after = ({"a": Rewritten(ROWS, RIGHT, 0, kept)} for kept in (RIGHT, LEFT))
    verdict = judge(0.05, compare_written(before, after, None))
    assert verdict.fell.keys() == {"a: good answers left as they are"}
    assert judge(0.05, compare_written(before, before, None)).promoted


def test_rows_that_are_too_long_are_not_compared():
    none = {"a": Rewritten([], [], 0)}
    assert compare_written(none, none, None) == {}
    assert none["a"].one_line.startswith("no held-out row is short enough")


def test_a_scorer_is_heard_too():
    def likes(texts):
        return CallableScorer(lambda _, answers: [float(answer in texts) for answer in answers], "likes")

    assert verdict_on(LEFT, RIGHT, likes(RIGHT)).promoted
    refused = verdict_on(LEFT, RIGHT, likes(LEFT))
    assert refused.outcome == "refused"
    assert refused.fell.keys() == {
        "a: share found better, against those before",
        "a: share found better, against the answers as they are",
    }


def test_what_was_written_is_told_in_words():
    written = Rewritten(ROWS, [*LEFT[:30], *RIGHT[30:]], refused=6)
    assert written.one_line == "60 corrections written, 40% left the answer as it was, guards refused 10%"


def test_the_interval_of_a_mean_is_students():
    found = compare_values([0.5, 0.6, 0.7, 0.4], [0.6, 0.6, 0.9, 0.5])
    # Falls -0.1, 0, -0.2, -0.1: mean -0.1, deviation 0.0816; t of 3 degrees at 95 % is 2.353.
    assert (found.low, found.high) == pytest.approx(
        (-0.1 - 2.3534 * 0.0816497 / 2, -0.1 + 2.3534 * 0.0816497 / 2), abs=1e-5
    )


@pytest.mark.parametrize("arguments", [{}, {"gate": 0.1, "objective": "dpo"}])
def test_a_scorer_without_a_gate_or_a_corrector_is_refused(tmp_path, arguments):
    given = {"objective": "correction", **arguments}
    with pytest.raises(InputError, match="gate_scorer rates what a corrector writes for a gate"):
        make_learner(saved_model(), tmp_path / "run", LifeAlign(space="product"), gate_scorer="builtins:len", **given)
