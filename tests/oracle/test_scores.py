"""The summary numbers against hand-worked cases, brute force and their identity."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everalign.errors import InputError
from everalign.learning.scores import Scores

# Hand-worked: Last = (70+60+90)/3; BWT = ((70-80)+(60-85))/2; AP = (80 + (75+85)/2 + 220/3)/3;
# FWT = ((55-50) + (58-52))/2; forgetting of a = max(80,75)-70.
THREE = Scores(
    ["a", "b", "c"],
    [48.0, 50.0, 52.0],
    [[80.0, 55.0, 53.0], [75.0, 85.0, 58.0], [70.0, 60.0, 90.0]],
)


def test_hand_worked_summary():
    assert THREE.last == pytest.approx(220 / 3)
    assert THREE.backward_transfer == pytest.approx(-17.5)
    assert THREE.average_performance == pytest.approx((80 + 80 + 220 / 3) / 3)
    assert THREE.forward_transfer == pytest.approx(5.5)
    assert THREE.forgetting == {"a": pytest.approx(10.0), "b": pytest.approx(25.0)}
    assert THREE.changes == [pytest.approx(-10.0), pytest.approx(-25.0), 0.0]
    assert THREE.summary == {
        "last": THREE.last,
        "backward_transfer": THREE.backward_transfer,
        "average_performance": THREE.average_performance,
        "forward_transfer": THREE.forward_transfer,
    }


def test_forgetting_counts_from_the_best_score_since_learning():
    scores = Scores(["a", "b", "c"], [99.0] * 3, [[60.0, 98.0, 1.0], [70.0, 50.0, 1.0], [65.0, 52.0, 50.0]])
    assert scores.forgetting == {"a": pytest.approx(5.0), "b": pytest.approx(-2.0)}


@st.composite
def square_scores(draw):
    n = draw(st.integers(1, 6))
    number = st.floats(-100, 100, allow_nan=False)
    row = st.lists(number, min_size=n, max_size=n)
    return Scores([f"t{i}" for i in range(n)], draw(row), draw(st.lists(row, min_size=n, max_size=n)))


@given(square_scores())
def test_last_is_mean_diagonal_plus_scaled_backward_transfer(scores):
    n = len(scores.tasks)
    diagonal = sum(scores.matrix[i][i] for i in range(n)) / n
    transfer = scores.backward_transfer
    assert (transfer is None) == (n < 2)
    assert scores.last == pytest.approx(diagonal + (n - 1) / n * (transfer or 0.0), abs=1e-9)


@given(square_scores())
def test_summary_equals_the_plain_sums(scores):
    n, m, zero = len(scores.tasks), scores.matrix, scores.zero_shot
    assert scores.last == pytest.approx(sum(m[n - 1]) / n, abs=1e-9)
    average = sum(sum(m[k][: k + 1]) / (k + 1) for k in range(n)) / n
    assert scores.average_performance == pytest.approx(average, abs=1e-9)
    if n > 1:
        backward = sum(m[n - 1][j] - m[j][j] for j in range(n - 1)) / (n - 1)
        forward = sum(m[j - 1][j] - zero[j] for j in range(1, n)) / (n - 1)
        assert scores.backward_transfer == pytest.approx(backward, abs=1e-9)
        assert scores.forward_transfer == pytest.approx(forward, abs=1e-9)


@given(square_scores(), st.integers(1, 6))
def test_up_to_is_the_run_stopped_early(scores, rows):
    stopped = scores.up_to(rows)
    assert stopped.learned == scores.learned[:rows]
    k = min(rows, len(scores.tasks))
    assert stopped.last == pytest.approx(sum(scores.matrix[k - 1][:k]) / k, abs=1e-9)


def test_a_run_in_progress_counts_only_learned_tasks():
    scores = Scores(["a", "b", "c"], [None] * 3, [[0.8, 0.5, 0.1], [0.6, 0.9, 0.1]])
    assert scores.learned == ["a", "b"]
    assert scores.last == pytest.approx(0.75)
    assert scores.backward_transfer == pytest.approx(-0.2)
    assert scores.forward_transfer is None
    assert scores.changes == [pytest.approx(-0.2), 0.0]


def test_nothing_learned_yet():
    scores = Scores(["a"], [0.5], [])
    assert set(scores.summary.values()) == {None}
    assert scores.forgetting == {}
    assert scores.changes == []
    assert Scores([], [], []).last is None


def test_one_task_has_a_last_score_and_no_transfer():
    scores = Scores(["a"], [0.5], [[0.8]])
    assert scores.summary == {
        "last": 0.8,
        "backward_transfer": None,
        "average_performance": 0.8,
        "forward_transfer": None,
    }
    assert scores.forgetting == {}


def test_a_task_without_a_test_set_is_left_out_but_its_row_stays():
    scores = Scores(["a", "untested", "c"], [0.5, None, 0.5], [[0.9, None, 0.5], [0.7, None, 0.6], [0.6, None, 0.8]])
    assert scores.last == pytest.approx(0.7)
    assert scores.backward_transfer == pytest.approx(-0.3)
    assert scores.average_performance == pytest.approx((0.9 + 0.7 + 0.7) / 3)
    assert scores.forward_transfer == pytest.approx(0.1)
    assert scores.forgetting == {"a": pytest.approx(0.3)}
    assert scores.changes == [pytest.approx(-0.3), None, 0.0]


def test_joint_training_defines_only_last():
    scores = Scores.joint(["a", "b"], [0.5, 0.5], [0.7, 0.8])
    assert scores.matrix == [[None, None], [0.7, 0.8]]
    assert scores.summary == {
        "last": pytest.approx(0.75),
        "backward_transfer": None,
        "average_performance": None,
        "forward_transfer": None,
    }
    assert scores.forgetting == {}


def test_separate_training_takes_the_mean_diagonal():
    scores = Scores.separate(["a", "b"], [0.5, 0.5], [0.7, 0.9])
    assert scores.matrix == [[0.7, None], [None, 0.9]]
    assert scores.last == pytest.approx(0.8)
    assert scores.backward_transfer is None
    assert scores.average_performance is None
    assert scores.forward_transfer is None
    assert scores.forgetting == {}


def test_from_mappings_orders_columns_and_marks_the_unmeasured():
    scores = Scores.from_mappings(["a", "b"], {"b": 0.4}, [{"a": 0.7}, {"b": 0.9, "a": 0.6}])
    assert scores.zero_shot == [None, 0.4]
    assert scores.matrix == [[0.7, None], [0.6, 0.9]]
    with pytest.raises(InputError, match=r"unknown tasks \['x'\]"):
        Scores.from_mappings(["a"], {}, [{"x": 0.1}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "a"], [1.0, 1.0], []), r"\['a'\] appear twice"),
        ((["a", ""], [1.0, 1.0], []), "empty"),
        ((["a", "b"], [1.0], []), "zero_shot has 1 scores for 2 tasks"),
        ((["a"], [1.0], [[1.0], [1.0]]), "2 rows for 1 tasks"),
        ((["a", "b"], [1.0, 1.0], [[1.0, 1.0], [1.0]]), "row 2 of the score matrix has 1 scores"),
        ((["a"], [math.nan], []), "zero_shot: the score on task 'a' is nan"),
        ((["a"], [1.0], [[math.inf]]), "row 1 .* task 'a' is inf"),
        ((["a", "b"], [1.0, 1.0], [[1.0, None], [None, 1.0]]), "task 'a' after learning 'b' is missing"),
        ((["a", "b"], [1.0, 1.0], [[None, None], [1.0, 1.0]]), "task 'a' after learning 'a' is missing"),
        ((["a", "b"], [1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]], "joint"), "last row only"),
        ((["a", "b"], [1.0, 1.0], [[1.0, 1.0]], "joint"), "learns all 2 tasks, not 1"),
        ((["a", "b"], [1.0, 1.0], [[1.0, 1.0], [None, 1.0]], "separate"), "diagonal only"),
        ((["a"], [1.0], [[1.0]], "parallel"), "regime 'parallel'"),
    ],
)
def test_wrong_scores_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Scores(*arguments)


def test_up_to_needs_a_sequence():
    with pytest.raises(InputError, match="joint run has no earlier rows"):
        Scores.joint(["a"], [0.5], [0.7]).up_to(1)


def test_scores_need_no_torch():
    code = "import sys, everalign.learning.scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
