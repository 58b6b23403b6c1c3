"""What is lost on its way to being learned: a tenth passes, more is told, more than half is refused before training."""

import json

import pytest

from cli_for_tests import FAST, make_workspace, run, write_rows
from corrections_for_tests import corrections
from everalign.data import PreferenceSet, ScoredSet
from everalign.errors import InputError, ShortfallError, check_shortfall
from everalign.evaluation.scorers import RewardModel
from everalign.evaluation.scoring import score_rows
from everalign.learning import task_training as lesson
from everalign.learning.options import RolloutOptions
from everalign.learning.rollouts import check_losses
from everalign.learning.run_data import load_run
from everalign.reporting.report import render_report
from everalign.training.options import RewardOptions
from everalign.training.reward_model import train_reward_model
from learner_for_tests import make_learner, save_answering_model, save_model
from models_for_tests import saved_model
from rewards_for_tests import reward_model


@pytest.mark.parametrize(("lost", "said"), [(0, False), (4, False), (5, True), (20, True)])
def test_more_than_a_tenth_is_said(lost, said):
    found = check_shortfall(lost, 40, "rows are cut", "raise it")
    assert found == ((f"{lost} of 40 rows are cut: raise it",) if said else ())


def test_more_than_half_is_refused_unless_the_rest_is_as_good():
    with pytest.raises(InputError, match="21 of 40 rows are cut, more than half: raise it"):
        check_shortfall(21, 40, "rows are cut", "raise it")
    assert check_shortfall(40, 40, "rows are cut", "raise it", refuse=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("work"))
    save_answering_model(folder / "answering")
    write_rows(folder / "prompts.jsonl", [{"prompt": f"q{i}?"} for i in range(8)])
    (folder / "rewards.py").write_text("def length(p, c):\n    return [float(len(text)) for text in c]\n")
    return folder


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    return work


def sampled(capsys, output, tokens, *more):
    return run(
        capsys, "learn", "--model", "answering", "--task", "long=prompts.jsonl", "--objective", "var", "--reward",
        "rewards:length", "--samples", "4", "--max-new-tokens", str(tokens), *FAST, "--output", str(output), *more,
    )  # fmt: skip


def test_too_few_new_tokens_are_refused_before_training(here, tmp_path, capsys):
    code, _, err = sampled(capsys, tmp_path / "run", 2)
    assert code == 2
    told = " ".join(err.split())
    assert "of 32 sampled answers did not end or are empty, more than half: raise --max-new-tokens" in told
    assert "2 now" in told
    assert not list((tmp_path / "run").glob("versions/*"))


def test_some_unfinished_answers_are_told_of_in_log_manifest_report_and_json(here, tmp_path, capsys):
    """Of this seed's 32 answers, between a tenth and half have not ended by then."""
    code, out, err = sampled(capsys, tmp_path / "run", 16, "--json")
    assert code == 0, err
    told, *_ = load_run(tmp_path / "run").versions[0].manifest.warnings
    assert "of 32 sampled answers did not end or are empty: raise --max-new-tokens (max_new_tokens), 16 now" in told
    warning = told.removeprefix("round 1: ")
    assert f"warning: prompts.jsonl: {warning}" in " ".join(err.split())
    assert told in render_report([load_run(tmp_path / "run")])
    assert json.loads(out)["versions"][0]["warnings"][0] == told


def losses(unfinished, answered):
    return check_losses("p", RolloutOptions(samples=4, max_new_tokens=8), 40, unfinished, 10, answered, 2)


def test_what_counts_of_a_rollout():
    assert losses(4, 9) == ()
    assert len(losses(12, 8)) == 2
    with pytest.raises(InputError, match="p: 21 of 40 sampled answers"):
        losses(21, 10)
    with pytest.raises(InputError, match="p: 6 of 10 prompts have fewer than 2 answers that ended"):
        losses(20, 4)


def test_a_later_round_that_writes_too_long_keeps_what_was_learned(here, tmp_path, capsys, monkeypatch):
    sample_and_score = lesson.sample_and_score

    def longer(setup, prompts, folder, number, *arguments):
        if number == 2:
            raise ShortfallError("31 of 32 sampled answers did not end")
        return sample_and_score(setup, prompts, folder, number, *arguments)

    monkeypatch.setattr(lesson, "sample_and_score", longer)
    code, _, err = sampled(capsys, tmp_path / "run", 24, "--rounds", "3")
    assert code == 0, err
    (version,) = load_run(tmp_path / "run").versions
    assert len(version.manifest.rollouts) == 1
    assert version.manifest.warnings[-1] == "round 2 is not learned: 31 of 32 sampled answers did not end"


# ---- rows that the limit cuts ----


def pairs(same, cut, count=20):
    """Pairs of answers that begin alike for 200 bytes (`same`), are long (`cut`), or are short."""
    long = "x" * 200
    equal, tails = [(f"{long}a{i}", f"{long}b{i}") for i in range(same)], [(f"a{i}{long}", f"b{i}") for i in range(cut)]
    rows = [*equal, *tails, *((f"a{i}", "b") for i in range(count - same - cut))]
    rows = [{"prompt": f"q{i}?", "chosen": chosen, "rejected": rejected} for i, (chosen, rejected) in enumerate(rows)]
    return PreferenceSet.of(rows, "pairs.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_pairs_that_the_cut_makes_equal_are_refused_before_the_first_task_is_trained(model, tmp_path):
    learner = make_learner(model, tmp_path / "run")
    message = r"pairs\.jsonl: 11 of 20 pairs have identical answers as tokens, more than half: raise --max-length"
    with pytest.raises(InputError, match=message):
        learner.learn_all([("fine", pairs(0, 0), None), ("cut", pairs(11, 0), None)])
    assert not learner.run.versions
    with pytest.raises(InputError, match=message):
        learner.register_test("cut", pairs(11, 0))


def test_cut_answers_are_told_of(model, tmp_path):
    lines = []
    learner = make_learner(model, tmp_path / "run", lines=lines)
    learner.learn(pairs(3, 10), "cut")
    same, cut = learner.run.versions[0].manifest.warnings
    assert same.startswith("3 of 20 pairs have identical answers as tokens: raise --max-length (max_length), 64 now")
    assert cut.startswith("16 of 40 answers are cut and lose their end: raise --max-length")
    assert sum("warning: pairs.jsonl" in line for line in lines) == 2


def test_a_reward_model_refuses_equal_pairs_and_tells_of_cut_answers(tmp_path):
    options = RewardOptions(max_length=64, epochs=0.1)
    with pytest.raises(InputError, match=r"pairs\.jsonl: 11 of 20 pairs have identical answers as tokens"):
        train_reward_model(str(saved_model()), pairs(11, 0), tmp_path / "reward", options=options)
    lines = []
    train_reward_model(str(saved_model()), pairs(0, 12), tmp_path / "reward", options=options, log=lines.append)
    assert any("warning: pairs.jsonl: 12 of 40 answers are cut and lose their end" in line for line in lines)


def test_answers_that_are_scored_without_their_ends_are_told_of(tmp_path):
    lines, scorer = [], RewardModel.from_folder(reward_model().path)
    rows = ScoredSet.of([{"prompt": "q", "completions": ["short", "x" * 500]} for _ in range(3)], "answers")
    score_rows(rows, scorer, tmp_path / "out.jsonl", log=lines.append)
    assert any("warning: answers: 3 of 6 answers with their prompts were cut" in line for line in lines)


def test_corrections_that_do_not_fit_are_refused_or_told_of(here, tmp_path, capsys):
    long = [{"question": f"q{i}", "answer": "a" * 150, "correction": "b" * 150} for i in range(30)]
    short = [row.to_json() for row in corrections(40)]
    for rows, expected in ((long + short[:20], 2), (long[:10] + short, 0)):
        write_rows(tmp_path / "edits.jsonl", rows)
        code, _, err = run(
            capsys, "correct", "train", "--model", str(saved_model()), "--data", str(tmp_path / "edits.jsonl"),
            "--output", str(tmp_path / "corrector"), "--max-length", "200", "--epochs", "0.1",
        )  # fmt: skip
        assert code == expected, err
        assert "rows are too long and left out" in " ".join(err.split())


def test_a_corrector_that_does_not_come_to_an_end_is_told_of(here, tmp_path, capsys):
    write_rows(tmp_path / "answers.jsonl", [row.to_json() for row in corrections(5)])
    code, _, err = run(
        capsys, "correct", "run", "--corrector", str(saved_model()), "--template", "aligner-1", "--data",
        str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "3",
    )  # fmt: skip
    assert code == 0
    told = "warning: 5 of 5 corrections did not end, and the answers are returned: raise --max-new-tokens"
    assert told in " ".join(err.split())
