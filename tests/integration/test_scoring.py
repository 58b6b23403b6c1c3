"""Rewards for the answers of a file: what is read, what a scorer may do wrong, and going on after a kill."""

import json
import math
import sys

import numpy as np
import pytest

from everalign.data import Preference, Scored, ScoredSet, load_scored, load_unscored
from everalign.errors import EveralignError, InputError
from everalign.evaluation.scorers import CallableScorer, RewardModel, make_scorer
from everalign.evaluation.scoring import score_rows
from everalign.storage import Journal
from rewards_for_tests import reward_model

ROWS = [
    {"prompt": "one", "completions": ["a", "bb", "ccc"]},
    {"prompt": [{"role": "user", "content": "two"}], "completions": ["dddd"], "weight": 2.0},
    {"prompt": "three", "chosen": "good", "rejected": "bad"},
    {"prompt": "four", "completions": ["e", "e"]},
]
LENGTHS = [(1.0, 2.0, 3.0), (4.0,), (4.0, 3.0), (1.0, 1.0)]


def rows(items=ROWS):
    pairs = [Scored.from_preference(Preference(**item), rewards=None) if "chosen" in item else item for item in items]
    return ScoredSet.of(pairs, "answers")


class Lengths:
    """Scores an answer by its length; fails at its call number `fails`, and remembers what it was asked."""

    fingerprint = "lengths"

    def __init__(self, fails=0, error=KeyboardInterrupt):
        self.calls, self._fails, self._error = [], fails, error

    def score(self, prompts, completions):
        self.calls.append(list(zip(prompts, completions, strict=True)))
        if len(self.calls) == self._fails:
            raise self._error
        return [float(len(text)) for text in completions]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is read ----


def test_completions_and_pairs_are_read_from_one_file(tmp_path):
    found = load_unscored(write(tmp_path / "rows.jsonl", ROWS))
    assert found.fingerprint == rows().fingerprint
    assert [row.completions for row in found] == [("a", "bb", "ccc"), ("dddd",), ("good", "bad"), ("e", "e")]
    assert [row.weight for row in found] == [1.0, 2.0, 1.0, 1.0]


def test_a_pair_of_conversations_is_split_as_preferences_are(tmp_path):
    user = {"role": "user", "content": "hello"}
    pair = {name: [user, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (found,) = load_unscored(write(tmp_path / "rows.jsonl", [pair]))
    assert found.prompt == (user,)
    assert found.completions == ("chosen", "rejected")


def test_csv_holds_completions_as_json(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completions\np,"[""a"", ""b""]"\n')
    assert load_unscored(tmp_path / "rows.csv")[0].completions == ("a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, r":1: field 'completions': no such column \(found: 'prompt'; expected 'prompt' and 'compl"),
        ({"prompt": "p", "responses": ["a"]}, "rename 'responses'"),
        ({"completions": ["a"]}, ":1: field 'prompt': no such column"),
        ({"prompt": "p", "completions": []}, "the list is empty"),
        ({"prompt": "p", "completions": "a"}, "must be a list of texts"),
        ({"prompt": "p", "completions": ["a", 3]}, r"completions\[1\]"),
        ({"prompt": "p", "completions": ["a"], "chosen": "a", "rejected": "b"}, "the row has 'chosen' too"),
        ({"prompt": "p", "chosen": "a"}, ":1: field 'rejected': no such column"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equal to 'chosen'"),
        ({"prompt": "p", "completions": ["a"], "weight": -1}, "field 'weight'"),
        ([1], "must be an object"),
    ],
)
def test_a_bad_row_names_line_and_field(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_unscored(write(tmp_path / "rows.jsonl", [row]))


def test_rewards_are_only_ignored_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], {**ROWS[3], "rewards": [1, 2]}])
    with pytest.raises(
        InputError, match=r"rows.jsonl:2: field 'rewards': the row has rewards already; ask for --overwrite"
    ):
        load_unscored(path)
    assert [row.completions for row in load_unscored(path, overwrite=True)] == [("a", "bb", "ccc"), ("e", "e")]
    # A table gives a row the columns of the others, empty.
    assert len(load_unscored(write(tmp_path / "null.jsonl", [{**ROWS[0], "rewards": None, "chosen": None}]))) == 1


# ---- what is written ----


@pytest.mark.parametrize("answers", [1, 2, 4, 100])
def test_rows_keep_their_order_and_read_as_scored_ones(answers, tmp_path):
    scorer = Lengths()
    seen = []
    result = score_rows(
        rows(), scorer, tmp_path / "out.jsonl", answers_per_batch=answers, progress=lambda *step: seen.append(step)
    )
    found = load_scored(tmp_path / "out.jsonl")
    assert [row.rewards for row in found] == LENGTHS
    assert found.fingerprint == result.rows.fingerprint
    assert [row.prompt for row in found] == [row.prompt for row in rows()]
    assert found[1].weight == 2.0
    assert seen[-1] == ("scoring", 4, 4)
    assert all(len(call) <= max(answers, 3) for call in scorer.calls)
    assert left(tmp_path) == ["out.jsonl"]


def test_an_output_that_exists_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        score_rows(rows(), Lengths(), path)
    assert path.read_text() == "mine"
    score_rows(rows(), Lengths(), path, overwrite=True)
    assert len(load_scored(path)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "out.json"}, "must end in .jsonl"),
        ({"rows": ScoredSet((), "nothing")}, "nothing: no rows in it"),
        ({"answers_per_batch": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(change, message, tmp_path):
    arguments = {"rows": rows(), "scorer": Lengths(), **change}
    arguments["output"] = tmp_path / change.get("output", "out.jsonl")
    with pytest.raises(InputError, match=message):
        score_rows(**arguments)


# ---- going on ----


def test_a_killed_scoring_goes_on_and_asks_nothing_twice(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows(), Lengths(fails=3), path, answers_per_batch=1)
    assert not path.exists()
    said, scorer = [], Lengths()
    result = score_rows(rows(), scorer, path, answers_per_batch=1, log=said.append)
    assert result.resumed == 2
    assert said == ["  2 of 4 rows were scored by an earlier run"]
    assert [text for call in scorer.calls for _, text in call] == ["good", "bad", "e", "e"]
    assert [row.rewards for row in load_scored(path)] == LENGTHS
    assert left(tmp_path) == ["out.jsonl"]


def test_other_rows_and_another_scorer_begin_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows(), Lengths(fails=3), path, answers_per_batch=1)
    other = Lengths()
    other.fingerprint = "another"
    assert score_rows(rows(), other, path).resumed == 0
    assert score_rows(rows(ROWS[:3]), Lengths(), path, overwrite=True).resumed == 0


@pytest.mark.parametrize("kept", [{0: [1.0]}, {1: {}}, {2: 3}, {2: "oops"}, {0: [1.0, 2.0, 3.0, 4.0]}])
def test_damaged_rewards_of_an_earlier_run_are_refused(kept, tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows(), Lengths(fails=2), path, answers_per_batch=1)
    (partial,) = tmp_path.iterdir()
    Journal(partial).put(kept)
    with pytest.raises(InputError, match="damaged: delete this file"):
        score_rows(rows(), Lengths(), path)


def test_rows_without_numbers_of_an_earlier_format_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows(), Lengths(fails=2), path, answers_per_batch=1)
    (partial,) = tmp_path.iterdir()
    partial.write_text("[1.0, 2.0, 3.0]\n")
    with pytest.raises(InputError, match=r"partial: .* not written by this version .*: delete this file"):
        score_rows(rows(), Lengths(), path)


def test_rows_are_known_by_their_number_and_not_by_how_many_there_are(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score_rows(rows(), Lengths(fails=1), path)
    Journal.beside(path, "lengths", rows().fingerprint).put({2: [7.0, 8.0]})
    scorer = Lengths()
    result = score_rows(rows(), scorer, path)
    assert [row.rewards for row in result.rows] == [LENGTHS[0], LENGTHS[1], (7.0, 8.0), LENGTHS[3]]
    assert [text for batch in scorer.calls for _, text in batch] == ["a", "bb", "ccc", "dddd", "e", "e"]
    assert result.resumed == 1


# ---- functions ----


def scorer(function):
    return CallableScorer(function, "function")


def test_a_function_gets_lists_of_plain_values(tmp_path):
    def check(prompts, completions):
        assert prompts == ["one"] * 3 + [[{"role": "user", "content": "two"}]]
        assert isinstance(completions, list)
        return np.array([len(text) for text in completions], dtype=np.float32)

    result = score_rows(rows(ROWS[:2]), scorer(check), tmp_path / "out.jsonl")
    assert [row.rewards for row in result.rows] == LENGTHS[:2]


def test_an_exception_names_the_rows_of_its_batch_and_keeps_the_others(tmp_path):
    def moody(prompts, completions):
        if "good" in completions:
            raise TimeoutError("no answer")
        return [0.0 for _ in completions]

    match = r"rows 3 to 4: the function raised TimeoutError: no answer; what was scored before is kept"
    with pytest.raises(EveralignError, match=match) as caught:
        score_rows(rows(), scorer(moody), tmp_path / "out.jsonl", answers_per_batch=4)
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__.__cause__, TimeoutError)
    calm = scorer(lambda prompts, completions: [1.0 for _ in completions])
    assert score_rows(rows(), calm, tmp_path / "out.jsonl").resumed == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            [1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            r"row 1, completions\[1\]: the reward must be finite, found nan",
        ),
        (
            [10**400] + [1.0] * 7,
            r"row 1, completions\[0\]: the reward must be finite, found a whole number of over 300",
        ),
        ([1.0] * 5 + [-math.inf, 1.0, 1.0], r"row 3, completions\[1\]: the reward must be finite, found -inf"),
        ([1.0] * 3 + [None] + [1.0] * 4, r"row 2, completions\[0\]: the reward must be a number, found None"),
        ([1.0] * 7 + ["high"], r"row 4, completions\[1\]: the reward must be a number, found str"),
        ([True] * 8, r"row 1, completions\[0\]: the reward must be a number, found bool"),
        (
            [1.0] * 4,
            r"row 3, completions\[0\]: the first without a reward; the scorer returned 4 rewards for 8 answers",
        ),
        ([1.0] * 9, r"row 4, completions\[1\]: the last answer; the scorer returned 9 rewards for 8 answers"),
        (None, r"row 1, completions\[0\]: the scorer returned None, no list of rewards"),
        (0.5, r"the scorer returned float, no list of rewards"),
    ],
)
def test_what_is_no_reward_names_row_and_completion(returned, message, tmp_path):
    with pytest.raises(EveralignError, match=message):
        score_rows(rows(), scorer(lambda *_: returned), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    path = tmp_path / "my_scorers_for_tests.py"
    path.write_text("def lengths(prompts, completions):\n    return [len(c) for c in completions]\nnumber = 3\n")
    yield path
    sys.modules.pop("my_scorers_for_tests", None)


def test_a_function_is_imported_from_the_working_directory(module, tmp_path):
    found = make_scorer("my_scorers_for_tests:lengths")
    assert found.score(["p"], ["abc"]) == [3]
    assert [row.rewards for row in score_rows(rows(), found, tmp_path / "out.jsonl").rows] == LENGTHS


def test_an_edited_function_is_another_one(module):
    first = make_scorer("my_scorers_for_tests:lengths").fingerprint
    assert make_scorer("my_scorers_for_tests:lengths").fingerprint == first
    module.write_text(module.read_text() + "# changed\n")
    assert make_scorer("my_scorers_for_tests:lengths").fingerprint != first
    assert CallableScorer.from_name("math:fsum").fingerprint.startswith("math:fsum")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_at_all:f", "cannot import the module no_such_module_at_all"),
        ("my_scorers_for_tests:missing", "no attribute 'missing'"),
        ("my_scorers_for_tests:number", "is not a function but int"),
        ("my_scorers_for_tests:", "must be module:function"),
        (":f", "must be module:function"),
        ("nowhere", "not a reward model"),
    ],
)
def test_a_scorer_that_is_not_there_is_named(name, message, module):
    with pytest.raises(InputError, match=message):
        make_scorer(name)


def test_options_that_a_scorer_would_ignore_or_cannot_use_are_refused(module):
    with pytest.raises(InputError, match="would ignore it"):
        make_scorer("my_scorers_for_tests:lengths", 100)
    with pytest.raises(InputError, match="at least 1"):
        make_scorer(str(reward_model().path), 0)


# ---- a reward model ----


def test_a_reward_model_scores_its_own_kind_of_answers(tmp_path):
    items = [{"prompt": f"q{i}?", "completions": ["no. no.", "yes! yes!"]} for i in range(60, 70)]
    result = score_rows(rows(items), RewardModel.from_folder(reward_model().path), tmp_path / "out.jsonl")
    assert all(isinstance(row.preference(), Preference) for row in result.rows)
    assert all(row.preference().chosen == "yes! yes!" for row in result.rows)


def test_batches_of_any_size_give_the_same_rewards(tmp_path):
    model = RewardModel.from_folder(reward_model().path)
    found = [
        [
            reward
            for row in score_rows(rows(), model, tmp_path / f"{n}.jsonl", answers_per_batch=n).rows
            for reward in row.rewards
        ]
        for n in (1, 100)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
