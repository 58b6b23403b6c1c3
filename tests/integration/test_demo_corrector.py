"""The demo's corrector: rows that follow its rule, figures that are measured, and how they are shown."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from test_reporting import HOSTILE, Page

from everalign.cli import main
from everalign.correction import Corrected
from everalign.demo import run
from everalign.demo import run as correcting
from everalign.demo.run import OPTIONS, demo_answers, keeps_rule, show_corrector
from everalign.errors import InputError
from everalign.learning.scores import Scores
from everalign.reporting.answers import CorrectedAnswer, CorrectorShow, corrector_texts
from everalign.reporting.report import write_report
from runs_for_tests import write_run

QUICK = OPTIONS.replace(epochs=1.0, identity=0.2)


def silent(*_, **__):
    return None


def example(**changes):
    return replace(CorrectedAnswer("How?", "Do it now.", "Please do it.", 3, 5), **changes)


def show(*examples):
    return CorrectorShow("answers are kind", "runs/corrector", 20, 8, 4, 0.5, 0.875, 0.25, 3, 1234, 5678, examples)


def printed(*lines, **options):
    console = Console(width=200, **options)
    with console.capture() as captured:
        console.print(*lines, sep="\n")
    return captured.get()


def test_every_other_answer_breaks_the_rule_and_every_correction_keeps_it():
    rows = demo_answers("test", 20)
    assert [keeps_rule(row.question, row.answer) for row in rows] == [False, True] * 10
    assert all(keeps_rule(row.question, row.correction) for row in rows)
    assert all(row.answer == row.correction for row in rows[1::2])


def test_rows_depend_on_the_seed_and_never_mix_the_splits():
    assert demo_answers("train", 40, 1) == demo_answers("train", 40, 1) != demo_answers("train", 40, 2)
    assert {row.question.held_out for row in demo_answers("train", 40)} == {False}
    assert {row.question.held_out for row in demo_answers("test", 40)} == {True}


def test_more_rows_than_the_world_has_are_refused():
    with pytest.raises(InputError, match=r"'test': kitchen has \d+ questions, not 10000; ask for fewer"):
        demo_answers("test", 10_000)


def test_a_text_that_only_looks_right_does_not_keep_the_rule():
    row = demo_answers("test", 2)[1]
    assert not keeps_rule(row.question, row.answer + " ")
    assert not keeps_rule(row.question, row.answer.replace("!", ".", 1))


def test_figures_are_measured_on_what_the_corrector_returns(tmp_path, monkeypatch):
    """Four answers, wrong and right in turn: one mended, one spoiled, one made other nonsense, one left alone."""
    rows = demo_answers("test", 4)
    texts = [rows[0].correction, "No.", "Nonsense.", rows[3].answer]
    found = [
        Corrected(text, text != row.answer, None, passes, 0, 0, 10)
        for row, text, passes in zip(rows, texts, (6, 4, 3, 1), strict=True)
    ]

    class Fake:
        def correct_batch(self, pairs):
            assert pairs == [(row.question.text, row.answer) for row in rows]
            return found

    monkeypatch.setattr(correcting, "train_corrector", silent)
    monkeypatch.setattr(correcting.Corrector, "from_pretrained", lambda folder: Fake())
    made = show_corrector(tmp_path / "corrector", silent, silent, held_out_rows=4)
    assert (made.answers, made.right, made.kept_before, made.kept_after) == (4, 2, 0.5, 0.5)
    assert (made.over_edit_rate, made.verified, made.forward_passes, made.tokens) == (0.5, 1, 14, 40)
    assert [one.correction for one in made.examples] == texts
    assert made.examples[3].effort == "left as it was: verified in 1 forward pass"
    assert made.examples[0].effort == "6 forward passes for 10 tokens"


def test_a_corrector_is_trained_once_and_taken_again(tmp_path):
    folder, said = tmp_path / "corrector", []
    first = show_corrector(folder, silent, silent, 0, 16, 4, QUICK)
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    again = show_corrector(folder, said.append, silent, 0, 16, 4, QUICK)
    assert again == first
    assert "  trained already" in said
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    for other in ({"seed": 1}, {"training_rows": 18}):
        with pytest.raises(InputError, match="other rows or with another seed: choose another output directory"):
            show_corrector(folder, silent, silent, **{"training_rows": 16, "held_out_rows": 4, **other})


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="no corrector"):
        show_corrector(tmp_path, silent, silent, 0, 4, 2, QUICK)


def test_the_terminal_shows_colours_or_marks():
    lines = corrector_texts(show(example()))
    coloured = printed(*lines, force_terminal=True, color_system="standard")
    assert "\x1b[9;31m" in coloured
    assert "\x1b[32m" in coloured
    plain = printed(*corrector_texts(show(example()), marks=True))
    assert "[-Do it now-]{+Please do it+}." in plain
    assert "3 forward passes for 5 tokens" in plain
    for figure in ("50.0%", "87.5%", "25.0%", "1\u202f234", "5\u202f678"):
        assert figure in plain


def test_the_report_has_a_section_with_escaped_diffs(tmp_path):
    runs = [write_run(tmp_path / "run")]
    path = write_report(runs, tmp_path / "report.html", show(example(question=HOSTILE, correction=HOSTILE)))
    text = path.read_text()
    page = Page(text)
    assert "<del>Do it now.</del>" in text
    assert text.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;" in text
    assert "corrector" in page.ids
    assert ("a", {"href": "#corrector"}) in page.tags
    assert ["keep the rule after", "87.5%", "of the same answers, corrected"] in page.rows


def test_a_report_without_a_corrector_has_no_such_section(tmp_path):
    text = write_report([write_run(tmp_path / "run")], tmp_path / "report.html").read_text()
    assert "corrector" not in Page(text).ids
    assert "#corrector" not in text


def test_the_demo_tells_of_the_corrector_in_json_and_in_words(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path / "run")
    made = show(example())
    result = run.DemoResult(tmp_path / "report.html", {"lifealign": path}, {"lifealign": Scores((), (), ())}, made, 1.0)
    monkeypatch.setattr(run, "run_demo", lambda *_: result)
    assert main(["demo", "--output", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["corrector"]
    assert facts["kept_after"] == 0.875
    assert facts["examples"][0]["correction"] == "Please do it."
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert "[-Do it now-]{+Please do it+}." in capsys.readouterr().out
