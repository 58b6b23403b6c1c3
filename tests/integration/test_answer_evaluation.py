"""Evaluating a run's answers: every metric, answers kept, an LLM judge, and what is refused before any is written."""

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from chat_server_for_tests import ChatServer, refused
from cli_for_tests import run as run_verb
from everalign.data.chat_tokens import ChatFormat
from everalign.errors import InputError
from everalign.evaluation.answers import Answer, HeldOutPrompt, kl_to_base, response_log_probs
from everalign.evaluation.scorers import CallableScorer
from everalign.learning.answer_evaluation import (
    AnswerSettings,
    _Runner,
    evaluate_run,
    load_held_out_prompts,
    worst_tasks,
)
from everalign.learning.run_data import load_run
from everalign.methods import LifeAlign, SingleTask
from everalign.reporting import write_report
from learner_for_tests import make_learner, save_answering_model, tasks

SETTINGS = AnswerSettings(max_new_tokens=6, limit=3, standard=False, compat=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    model = save_answering_model(folder / "model")
    make_learner(model, folder / "run", LifeAlign(space="product")).learn_all(tasks("warm", "brief"))
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def runner(run):
    return _Runner(run, SETTINGS, lambda _: None, lambda *_: None)


def longest(prompts, answers):
    return [float(len(answer)) for answer in answers]


def test_every_version_is_measured_on_every_task_and_answers_are_written_once(run, monkeypatch):
    settings = AnswerSettings(max_new_tokens=6, limit=3, standard=False, compat=True, every=True)
    found = evaluate_run(run, settings=settings, reward=CallableScorer(longest, "length"))
    versions = ["000", *(version.id for version in run.versions)]
    assert [(row["version"], row["task"]) for row in found["results"]] == [
        (version, task) for version in versions for task in ("warm", "brief")
    ]
    for row in found["results"]:
        metrics = row["metrics"]
        expected = {"unfinished", "length", "compat_bleu", "compat_rouge_l", "perplexity", "reward"}
        assert expected | {"chosen_change", "rejected_change"} <= metrics.keys()
        assert all(low <= value <= high for value, low, high in metrics.values())
        if row["version"] == "000":
            assert metrics["chosen_change"] == [0.0, 0.0, 0.0]
        assert metrics["reward"] == metrics["length"]
    assert found["worst"]["reward_win_rate"]["task"] in ("warm", "brief")
    assert json.loads((run.path / "evaluation" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert {len(shown) for shown in found["answers"].values()} == {3}

    monkeypatch.setattr("everalign.evaluation.answers.greedy_answers", lambda *_: pytest.fail("written twice"))
    assert evaluate_run(run, settings=settings, reward=CallableScorer(longest, "length")) == found

    monkeypatch.setattr("everalign.evaluation.answers.sequence_logprobs", lambda *_: pytest.fail("not asked for"))
    monkeypatch.setattr("everalign.evaluation.answers.mean_kl", lambda *_: pytest.fail("not asked for"))
    fewer = evaluate_run(run, settings=replace(settings, likelihoods=False), reward=CallableScorer(longest, "length"))
    left_out = {"perplexity", "chosen_change", "rejected_change", "kl"}
    for row, all_of_it in zip(fewer["results"], found["results"], strict=True):
        assert row["metrics"] == {name: v for name, v in all_of_it["metrics"].items() if name not in left_out}


def test_log_likelihoods_and_perplexity_are_those_of_the_model(run, runner):
    prompts, answers = ["q1?", "q2?"], ["yes, gladly! 1", "ok"]
    runner.switch(run.versions[-1].id, "warm")
    scored = response_log_probs(runner.policy, runner.tokenizer, prompts, answers, max_length=64, tokens_per_batch=64)
    expected = []
    for prompt, (ids, (answer,)) in zip(
        prompts, ChatFormat(runner.tokenizer).encode(prompts, [(a,) for a in answers]), strict=True
    ):
        assert prompt
        logits = runner.policy.peft(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        expected.append(logits[range(len(ids) - 1, len(ids) + len(answer) - 1), answer].mean().item())
    assert scored.values == pytest.approx(expected, abs=1e-4)
    total = sum(value * count for value, count in zip(expected, scored.tokens, strict=True))
    assert scored.perplexity().value == pytest.approx(math.exp(-total / sum(scored.tokens)), rel=1e-4)
    runner.switch("000", "warm")
    base = response_log_probs(runner.policy, runner.tokenizer, prompts, answers, max_length=64, tokens_per_batch=64)
    expected_change = sum(now - then for now, then in zip(scored.values, base.values, strict=True)) / 2
    assert expected_change != 0
    assert scored.change_since(base).value == pytest.approx(expected_change)


def test_the_kl_is_that_of_the_distributions_and_zero_for_the_base_model(run, runner):
    answers = [Answer("yes", True), Answer("", True), Answer("no 1", False)]
    arguments = (runner.tokenizer, ["q1?", "q2?", "q3?"], answers)
    runner.switch("000", "warm")
    assert kl_to_base(runner.policy, *arguments, max_length=64).value == pytest.approx(0, abs=1e-6)
    runner.switch(run.versions[-1].id, "warm")
    found = kl_to_base(runner.policy, *arguments, max_length=64)
    expected = []
    encoded = ChatFormat(runner.tokenizer).encode(["q1?", "q3?"], [("yes",), ("no 1",)])
    for ids, (answer,) in encoded:
        tokens, places = torch.tensor([ids + answer]), slice(len(ids) - 1, len(ids) + len(answer) - 1)
        now = runner.policy.peft(tokens).logits[0, places].log_softmax(-1)
        with runner.policy.as_base():
            base = runner.policy.peft(tokens).logits[0, places].log_softmax(-1)
        expected.append((now.exp() * (now - base)).sum(-1).mean().item())
    assert found.value == pytest.approx(sum(expected) / 2, rel=1e-3)
    with pytest.raises(InputError, match="written nothing"):
        kl_to_base(runner.policy, runner.tokenizer, ["q"], [Answer("", True)], max_length=64)


def test_a_judge_scores_and_compares_by_the_tasks_rubric(run, tmp_path, capsys):
    file = tmp_path / "truthful.jsonl"
    file.write_text('{"prompt": "q1?"}\n{"prompt": "q2?"}\n')

    def reply(messages):
        assert "tells the truth" in messages[0]["content"]
        return '{"better": 2}' if "<answer 1>" in messages[1]["content"] else "6"

    with ChatServer(reply) as server:
        arguments = ["evaluate", str(run.path), "--prompts", f"truthful={file}", "--judge", f"{server.url}#judge"]
        arguments += ["--max-new-tokens", "6", "--json"]
        code, out, error = run_verb(capsys, *arguments)
        assert code == 0, error
        asked = len(server.requests)
        assert run_verb(capsys, *arguments)[1] == out
        assert len(server.requests) == asked
    metrics = json.loads(out)["results"][-1]["metrics"]
    assert metrics["judge"] == [6.0, 6.0, 6.0]
    # Whatever stands second wins: verdicts that change with the order are ties.
    assert metrics["judge_win_rate"] == [0.5, 0.5, 0.5]
    assert "bleu" not in metrics


def test_a_judge_that_fails_is_asked_on_and_what_it_cannot_say_is_counted_and_kept(run, tmp_path, capsys):
    """The longer answer wins, whatever its place; of two prompts no reply can be read; the key expires on the way."""
    file, left = tmp_path / "prompts.jsonl", [7]
    file.write_text("".join(f'{{"prompt": "q{number}?"}}\n' for number in range(6)))
    other = tmp_path / "other"
    make_learner(run.facts.model, other).learn_all(tasks("brief", "warm"))

    def reply(messages):
        if left[0] == 0:
            return refused(401, "this key has expired")
        left[0] -= 1
        text = messages[1]["content"]
        if "q0?" in text or "q1?" in text:
            return "Both are fine."
        found = re.findall(r"<answer \d>\n(.*?)\n</answer", text, re.DOTALL)
        if not found:
            return '{"score": 6}'
        return f'{{"better": {1 + (len(found[1]) > len(found[0]))}}}'

    with ChatServer(reply) as server:
        arguments = ["evaluate", str(run.path), "--prompts", f"mine={file}", "--judge", f"{server.url}#judge"]
        arguments += ["--max-new-tokens", "6", "--against", str(other)]
        code, _, error = run_verb(capsys, *arguments)
        assert (code, "this key has expired" in error) == (1, True), error
        left[0] = 10**6
        code, out, error = run_verb(capsys, *arguments)
        assert code == 0, error
        asked = [json.dumps(request.messages) for request in server.requests]
        again = run_verb(capsys, *arguments)
        assert again[:2] == (0, out)
        assert len(server.requests) == len(asked)
    assert "judged wins %: 2 of 6 prompts are left out, because the judge's replies could not be read" in out
    assert f"000 is the base model; wins are those over {other}, ties count half" in out
    found = json.loads((run.path / "evaluation" / "results.json").read_text())
    row = found["results"][-1]
    assert row["failed"] == {"judge": 2, "judge_win_rate": 2}
    mine, its = (
        _Runner(one, replace(SETTINGS, max_new_tokens=6), lambda _: None, lambda *_: None)
        for one in (run, load_run(other))
    )
    rows = [HeldOutPrompt(f"q{number}?") for number in range(2, 6)]
    pairs = zip(*(runner.answers(runner.versions[-1], "mine", rows) for runner in (mine, its)), strict=True)
    expected = [0.5 if a.text == b.text else float(len(a.text) > len(b.text)) for a, b in pairs]
    assert row["metrics"]["judge_win_rate"][0] == sum(expected) / 4
    # Nothing that the judge answered was asked for twice, but by the one that refused.
    repeated = {text: asked.count(text) for text in asked if asked.count(text) > 1}
    assert sum(repeated.values()) <= 2 * len(repeated)


def test_against_another_run(run):
    found = evaluate_run(run, settings=SETTINGS, reward=CallableScorer(longest, "length"), against=run)
    last = [row for row in found["results"] if row["version"] == run.versions[-1].id]
    assert all(row["metrics"]["reward_win_rate"] == [0.5, 0.5, 0.5] for row in last)
    # The opponent is the other run's last version, whichever versions of this one are measured.
    every = replace(SETTINGS, every=True)
    found = evaluate_run(run, settings=every, reward=CallableScorer(longest, "length"), against=run)
    assert [row for row in found["results"] if row["version"] == run.versions[-1].id] == last


def test_a_run_with_a_model_for_each_task_is_measured_by_each_tasks_own(run, tmp_path):
    make_learner(run.facts.model, tmp_path / "run", SingleTask()).learn_all(tasks("warm", "brief"))
    separate = load_run(tmp_path / "run")
    first, second = (version.id for version in separate.versions)
    runner = _Runner(separate, SETTINGS, lambda _: None, lambda *_: None)
    answering = [runner.switch(*which) for which in ((first, "brief"), (first, "warm"), (second, "warm"))]
    assert [folder and folder.parent.name for folder in answering] == [None, first, first]
    with pytest.raises(InputError, match="has a model for each task, and 'other' is none of them"):
        evaluate_run(separate, {"other": [HeldOutPrompt("q?")]}, SETTINGS)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--prompts", "nothing"], "must be NAME=FILE"),
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1"),
        (["--rubric", "helpful"], "--rubric: is for a judge"),
        (["--judge", "http://127.0.0.1:9/v1#m", "--rubric", "nice"], "rubric: must be one of"),
        (["--prompts", "a=missing.jsonl"], "missing.jsonl"),
        (["--prompts", "a=one.jsonl", "--prompts", "a=two.jsonl"], "two files are called 'a'"),
        (["--against", "missing"], "missing"),
    ],
)
def test_what_cannot_be_used_is_refused(run, flags, problem, capsys):
    code, _, error = run_verb(capsys, "evaluate", str(run.path), *flags)
    assert (code, problem in error) == (2, True), error


def test_missing_packages_are_named_with_the_flag_that_needs_none(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    code, _, error = run_verb(capsys, "evaluate", str(run.path))
    assert code == 2
    assert "pip install 'everalign[text-metrics]', or leave BLEU-4 and ROUGE-L out with --no-standard" in error


def test_a_task_without_all_references_says_what_it_goes_without(run):
    lines: list[str] = []
    rows = [HeldOutPrompt("q1?", "yes"), HeldOutPrompt("q2?")]
    found = evaluate_run(run, {"warm": rows}, SETTINGS, log=lines.append)
    assert "  warm: 1 of 2 prompts have no reference: no BLEU-4, ROUGE-L and likelihoods" in lines
    assert not {"compat_bleu", "perplexity"} & found["results"][0]["metrics"].keys()


def test_prompts_with_and_without_references(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0]}\n')
    (row,) = load_held_out_prompts(file)
    assert (row.prompt, row.reference, row.rejected) == ("q", "a", None)
    file.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (row,) = load_held_out_prompts(file)
    assert (row.reference, row.rejected) == ("a", "b")


def test_the_worst_task_is_the_one_with_the_least():
    rows = [
        {"version": "001", "task": task, "metrics": {"bleu": [value, 0, 1]}} for task, value in (("a", 2), ("b", 1))
    ]
    assert worst_tasks(rows, "001") == {"bleu": {"task": "b", "value": 1}}


def test_the_report_shows_intervals(run, tmp_path):
    evaluate_run(run, settings=SETTINGS)
    page = write_report([run.path], tmp_path / "report.html").read_text()
    section = page[page.index('id="evaluation"') :].partition("</section>")[0]
    assert all(text in section for text in ("ROUGE-L compat", "KL to base", run.versions[-1].id, "3 prompts"))
    (run.path / "evaluation" / "results.json").write_text('{"results": [{"version": 1}]}')
    with pytest.raises(InputError, match=r"results\.json"):
        write_report([run.path], tmp_path / "report.html")
    (run.path / "evaluation" / "results.json").unlink()
    assert 'id="evaluation"' not in write_report([run.path], tmp_path / "report.html").read_text()
