"""An approver has the last word on corrections."""

import json

import pytest

from chat_server_for_tests import ChatServer
from cli_for_tests import run, write_rows
from corrections_for_tests import corrections, corrector
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector
from everalign.errors import EveralignError, InputError
from everalign.evaluation.judge import JudgeScorer
from everalign.evaluation.scorers import CallableScorer
from everalign.evaluation.scoring import ScorerApprover, compare_answers
from everalign.llm_client import ChatClient

FREE = CorrectionOptions(guards=NO_GUARDS)
PAIRS = [(row.question, row.answer) for row in corrections(12, 200)]


def by_length(sign, margin=0.0):
    """Finds longer answers better, or shorter ones."""
    return ScorerApprover(
        CallableScorer(lambda _, texts: [sign * float(len(text)) for text in texts], f"{sign}"), margin
    )


def corrected(approver=None):
    return Corrector.from_pretrained(corrector().path, approver=approver, options=FREE).correct_batch(PAIRS)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_correction_is_returned_only_where_it_is_better(sign):
    free, judged = corrected(), corrected(by_length(sign))
    assert any(one.changed for one in free)
    for (_, answer), before, after in zip(PAIRS, free, judged, strict=True):
        if not before.changed or sign * len(before.text) > sign * len(answer):
            assert after == before
        else:
            assert (after.text, after.changed, after.reason) == (answer, False, "not_better")
            assert after.forward_passes == before.forward_passes


def test_it_has_to_be_better_by_the_margin():
    assert all(not one.changed for one in corrected(by_length(1, 1000.0)))


def test_nothing_of_a_refused_correction_is_streamed():
    approver = by_length(1, 1000.0)
    working = Corrector.from_pretrained(corrector().path, approver=approver, options=FREE)
    for question, answer in PAIRS:
        assert "".join(working.stream(question, answer)) == answer


def test_who_approves_is_part_of_the_fingerprint():
    prints = {
        Corrector.from_pretrained(corrector().path, approver=approver).fingerprint
        for approver in (None, by_length(1), by_length(-1), by_length(1, 2.0))
    }
    assert len(prints) == 4


def test_margins():
    scorer = CallableScorer(lambda _, texts: [float(len(text)) for text in texts], "length")
    assert compare_answers(scorer, ["q"] * 3, ["a", "aa", "a"], ["bb", "b", "bbb"], 1.0) == [0, 0, 1]
    for margin in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="margin: must be a finite number of at least 0"):
            ScorerApprover(scorer, margin)
    with ChatServer(lambda _: "") as server:
        judge = JudgeScorer(ChatClient(server.url, "m"))
        with pytest.raises(InputError, match="margin: a judge names the better answer"):
            ScorerApprover(judge, 0.5)


def test_a_reward_that_is_no_number_is_told():
    nan = ScorerApprover(CallableScorer(lambda _, texts: [float("nan")] * len(texts), "nan"))
    with pytest.raises(EveralignError, match="the reward must be finite, found nan"):
        corrected(nan)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "taste.py").write_text("def shorter(prompts, answers):\n    return [-len(text) for text in answers]\n")
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", [{"question": question, "answer": answer} for question, answer in PAIRS])
    given = ["--corrector", str(corrector().path), "--data", str(data)]
    approved = [*given, "--approve", "taste:shorter", "--no-guards", "--json"]
    code, out, _ = run(capsys, "correct", "run", *approved, "--margin", "1000", "--output", str(tmp_path / "a.jsonl"))
    assert code == 0
    assert json.loads(out)["kept_because"] == {"not_better": sum(one.changed for one in corrected())}
    code, out, _ = run(capsys, "correct", "evaluate", *approved, "--scorer", "taste:shorter")
    assert code == 0
    assert json.loads(out)["overall"]["win"]["losses"] == 0
    code, _, error = run(capsys, "correct", "run", *given, "--margin", "1", "--output", str(tmp_path / "b.jsonl"))
    assert code == 2
    assert "--approve" in error
