"""Win rates: the length-controlled fit against scipy's, both orders of a judge, replies that cannot be read."""

import numpy as np
import pytest
from scipy.optimize import minimize

from chat_server_for_tests import ChatServer
from everalign.errors import InputError
from everalign.evaluation.answers import judged_scores, length_controlled, win_rate
from everalign.evaluation.judge import RUBRICS, JudgeScorer, rubric_of
from everalign.evaluation.scorers import CallableScorer
from everalign.evaluation.statistics import bootstrap_mean
from everalign.llm_client import ChatClient
from everalign.storage import Journal


def outcomes_by_length(count=400, seed=0):
    """Outcomes that length alone decides: the longer answer wins with a probability that its lead raises."""
    rng = np.random.default_rng(seed)
    lengths = rng.normal(30, 40, count).round()
    chance = 1 / (1 + np.exp(-2 * np.tanh(lengths / lengths.std())))
    return (rng.random(count) < chance).astype(float), lengths


def test_the_fit_is_the_minimum_that_scipy_finds():
    outcomes, lengths = outcomes_by_length()
    outcomes[::7] = 0.5
    x = np.tanh(lengths / lengths.std())

    def loss(p):
        z = p[0] + p[1] * x
        return (np.logaddexp(0, z) - outcomes * z).sum() + (0.01 * p[0] ** 2 + 0.1 * p[1] ** 2) / 2

    best = minimize(loss, [0.0, 0.0], tol=1e-12).x
    assert length_controlled(outcomes, lengths)[0] == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-6)


def test_what_length_alone_has_won_is_no_win_at_equal_length():
    outcomes, lengths = outcomes_by_length(2000)
    assert outcomes.mean() > 0.6
    assert length_controlled(outcomes, lengths)[0] == pytest.approx(0.5, abs=0.04)


def test_a_weight_of_two_is_a_row_that_is_there_twice():
    outcomes, lengths = np.array([1, 0, 0.5, 1.0]), np.array([1.0, -1, 1, -1])
    # The spread of the lengths is the same with the rows 0 and 1 twice.
    twice = [0, 0, 1, 1, 2, 3]
    found = length_controlled(outcomes, lengths, np.array([[2.0, 2, 1, 1], [1, 1, 1, 1]]))
    assert found[0] == pytest.approx(length_controlled(outcomes[twice], lengths[twice])[0], abs=1e-9)
    assert found[1] == pytest.approx(length_controlled(outcomes, lengths)[0], abs=1e-9)


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_outcomes_that_never_differ_have_a_finite_fit(outcome):
    found = length_controlled(np.full(30, outcome), np.linspace(-9, 20, 30))[0]
    assert found == pytest.approx(outcome, abs=0.02)
    assert length_controlled(np.full(30, outcome), np.zeros(30))[0] == pytest.approx(outcome, abs=0.02)


def test_a_scorer_wins_by_its_rewards_and_equal_answers_are_ties():
    scorer = CallableScorer(lambda prompts, answers: [float(len(answer)) for answer in answers], "length")
    found = win_rate(scorer, ["a", "b", "c", "d"], ["long", "long", "x", "x"], ["x", "x", "x", "long"])
    assert found.win_rate.value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert (found.prompts, found.ties, found.failed) == (4, 1, 0)
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high
    with pytest.raises(InputError, match="at least one prompt"):
        win_rate(scorer, [], [], [])


def judge(server, tmp_path):
    client = ChatClient(server.url, "judge", "", concurrency=2)
    return JudgeScorer(client, instructions=RUBRICS["helpful"], cache=Journal(tmp_path / "judge.sqlite"))


def test_a_judge_reads_both_orders_and_what_cannot_be_read_is_counted(tmp_path):
    def reply(messages):
        text = messages[1]["content"]
        if "odd" in text:
            return "I would rather not say."
        first = text.index("good") < text.index("bad")
        return '{"better": 1}' if first or "first" in text else '{"better": 2}'

    prompts = ["plain", "odd", "first"]
    with ChatServer(reply) as server:
        found = win_rate(judge(server, tmp_path), prompts, ["good"] * 3, ["bad"] * 3)
        # "first" always prefers what stands first: a tie.
        assert (found.win_rate.value, found.prompts, found.ties, found.failed) == (0.75, 2, 1, 1)
        asked = len(server.requests)
        again = win_rate(judge(server, tmp_path), prompts, ["good"] * 3, ["bad"] * 3)
        assert again == found
        # Only what could not be read is asked again.
        assert all("odd" in request.messages[1]["content"] for request in server.requests[asked:])


def test_scores_that_cannot_be_read_are_none(tmp_path):
    with ChatServer(lambda messages: "none" if "odd" in messages[1]["content"] else "7") as server:
        assert judged_scores(judge(server, tmp_path), ["plain", "odd"], ["a", "b"]) == [7.0, None]
    with ChatServer(lambda messages: "none") as server, pytest.raises(InputError, match="none of 1 verdicts"):
        win_rate(judge(server, tmp_path / "other"), ["p"], ["a"], ["b"])


def test_the_six_tasks_have_rubrics():
    names = ["Capybara", "HC3", "hh-harmless", "hh_helpful", "safe-rlhf", "TruthfulQA"]
    assert {rubric_of(name) for name in names} == set(RUBRICS)
    assert rubric_of("helpful") == "helpful"
    assert rubric_of("my-task") is None


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(2, 3, 400)
    found = bootstrap_mean(list(values))
    error = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.05)
    assert bootstrap_mean([4.0]) == (4.0, 4.0, 4.0)
