"""Answers before and after learning: what greedy decoding writes, kept with the run, shown in report and --json."""

import json

import pytest
import torch

from cli_for_tests import FAST, make_workspace, run, task
from everalign.data import PreferenceSet
from everalign.data.chat_tokens import encode_prompt
from everalign.errors import InputError
from everalign.learning.evaluation_suite import LONGEST_ANSWER
from everalign.learning.run_data import load_run
from everalign.methods import SingleTask
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.reporting.answers import answer_pairs
from everalign.reporting.report import render_report
from learner_for_tests import make_learner, save_answering_model, task_rows

SHORT = {"max_length": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr("everalign.learning.evaluation_suite.LONGEST_ANSWER", 24)


def spread_rows(name, count=9):
    return task_rows(name, count, start=100)


def generated(folder, prompt):
    """What transformers' own greedy decoding writes, and whether it ended."""
    tokenizer, network = load_tokenizer(str(folder)), load_model(str(folder))
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    end = tokenizer.eos_token_id
    new = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    ended = end in new
    return tokenizer.decode(new, skip_special_tokens=True), ended


def test_answers_are_those_of_greedy_decoding_before_and_after_each_task(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", sample_answers=3)
    learner.learn_all([(name, task_rows(name), spread_rows(name)) for name in ("warm", "brief")])
    found = load_run(tmp_path / "run")
    assert [answer.prompt for answer in found.first_answers["warm"]] == ["q100?", "q103?", "q106?"]
    for answers in found.first_answers.values():
        assert [(answer.answer, answer.ended) for answer in answers] == [generated(model, a.prompt) for a in answers]
    for version in found.versions:
        folder = learner.export(tmp_path / version.id, version.id)
        assert set(version.answers) == {"warm", "brief"}
        for answers in version.answers.values():
            assert [(one.answer, one.ended) for one in answers] == [generated(folder, one.prompt) for one in answers]
    pairs = answer_pairs(found)["warm"]
    assert [pair.after for pair in pairs] == [answer.answer for answer in found.versions[-1].answers["warm"]]
    first = found.versions[0].answers["warm"]
    by_then = [("warm", one.answer if one.ended else f"{one.answer} …") for one in first]
    assert [list(pair.course) for pair in pairs] == [[one] for one in by_then]
    assert any(pair.before != pair.after for pair in pairs)
    assert LONGEST_ANSWER > 24


def test_none_are_written_unless_asked_for(model, tmp_path):
    learner = make_learner(model, tmp_path / "run")
    learner.learn(task_rows("warm"), "warm", spread_rows("warm"))
    assert (learner.run.first_answers, learner.run.versions[0].answers) == ({}, {})
    assert "Answers before and after" not in render_report([learner.run])
    with pytest.raises(InputError, match="sample_answers must be at least 0"):
        make_learner(model, tmp_path / "other", sample_answers=-1)


@pytest.mark.parametrize("moment", [pytest.param("answers", marks=pytest.mark.slow), "write_version"])
def test_a_run_that_was_killed_has_the_same_answers(model, tmp_path, monkeypatch, moment):
    def learn(name, **options):
        learner = make_learner(model, tmp_path / name, sample_answers=2, **options)
        learner.learn_all([(task, task_rows(task), spread_rows(task)) for task in ("warm", "brief")])
        return learner.run

    whole = learn("whole")
    owner = {"answers": "evaluation_suite.EvaluationSuite", "write_version": "run_store.RunDirectory"}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(f"everalign.learning.{owner}.{moment}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learn("run")
    resumed = learn("run", resume=True)
    assert resumed.first_answers == whole.first_answers
    assert [version.answers for version in resumed.versions] == [version.answers for version in whole.versions]


def test_a_run_that_goes_on_keeps_its_prompts(model, tmp_path):
    make_learner(model, tmp_path / "run", sample_answers=2).learn(task_rows("warm"), "warm", spread_rows("warm"))
    later = make_learner(model, tmp_path / "run", sample_answers=5, resume=True)
    later.learn(task_rows("brief"), "brief", spread_rows("brief"))
    counts = {task: len(answers) for task, answers in later.run.versions[-1].answers.items()}
    assert counts == {"warm": 2, "brief": 5}


def test_prompts_are_distinct_and_short_enough(model, tmp_path, monkeypatch):
    monkeypatch.setattr("everalign.learning.evaluation_suite._LONGEST_PROMPT", 20)
    rows = [{"prompt": prompt, "chosen": f"a{i}", "rejected": "b"} for i, prompt in enumerate(["q"] * 4 + ["x" * 30])]
    learner = make_learner(model, tmp_path / "run", sample_answers=4)
    learner.register_test("warm", PreferenceSet.of(rows, "test"))
    assert [answer.prompt for answer in learner.run.first_answers["warm"]] == ["q"]


def test_each_of_separate_policies_shows_its_own_task(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", SingleTask(), sample_answers=1)
    learner.learn_all([(name, task_rows(name), spread_rows(name)) for name in ("warm", "brief")])
    versions = {version.task: version for version in learner.run.versions}
    for task_name, (pair,) in answer_pairs(learner.run).items():
        assert pair.after == versions[task_name].answers[task_name][0].answer


def test_a_model_that_cannot_be_sampled_from_is_told_of_and_learns(model, tmp_path, monkeypatch):
    monkeypatch.setattr("everalign.modeling.decoding.attention_windows", lambda _: None)
    lines = []
    learner = make_learner(model, tmp_path / "run", sample_answers=2, lines=lines)
    learner.learn(task_rows("warm"), "warm", spread_rows("warm"))
    assert learner.run.first_answers == {}
    assert any("no answers are written for the report: answers cannot be sampled" in line for line in lines)


def test_report_and_json_show_them(tmp_path, monkeypatch, capsys):
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        capsys, "learn", "--model", "model", *task("warm"), "--output", "run", *FAST, "--sample-answers", "2", "--json"
    )
    assert code == 0, err
    found = json.loads(out)["answers"]["warm"]
    assert len(found) == 2
    assert set(found[0]) == {"prompt", "draft", "before", "after", "ended_before", "ended_after", "course", "last"}
    page = (tmp_path / "run" / "report.html").read_text()
    section = page[page.index('id="answers"') :].partition("</section>")[0]
    changed = sum(pair["before"] != pair["after"] for pair in found)
    assert section.count("<h5>Before</h5>") == section.count("<h5>After</h5>") == changed
    assert section.count("<h5>Before and after</h5>") == 2 - changed
    assert "ended within the limit of tokens" in section
    assert '<a href="#answers">' in page


def test_marks_in_answers_are_escaped_and_belong_to_their_side():
    from everalign.reporting.answers import AnswerPair

    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "q?"},
    ]
    pair = AnswerPair(messages, None, "an <b>old</b> word", "a new word", True, False)
    assert pair.before_html == "<del>an &lt;b&gt;old&lt;/b&gt;</del> word"
    assert pair.after_html == "<ins>a new</ins> word …"
    assert (pair.question, pair.note) == ("q?", "after 2 earlier messages; one of the answers was cut at the limit")
    same = AnswerPair("q", None, "x", "x", False, False)
    anew = AnswerPair("q", None, "All of this is gone now.", "Nothing here stays as it was before", True, True)
    assert (anew.before_html, anew.note) == ("All of this is gone now.", "rewritten completely: no words are marked")
    assert same.note == "neither answer ended within the limit of tokens; unchanged"
