"""The commands and the Python of README.md, docs/ and examples/: what is shown works as it is written.

Models are small ones in the place of those from the Hub, and a few flags make training quick. What needs a server, or
minutes, is parsed alone. The tutorials are in `test_tutorials.py`.
"""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from cli_for_tests import FAST, run, write_rows
from docs_for_tests import ROOT, Reader, blocks, commands, markdown_pages, verb, words
from everalign.learning.run_data import load_run
from everalign.serving.store import FeedbackStore
from learner_for_tests import held_out, save_model, task_rows
from models_for_tests import saved_model
from stores_for_tests import exchange, feedback

PAGES = markdown_pages()
LEARN, CORRECT = "docs/how-to/learn.md", "docs/how-to/correct.md"
# Pages that go on from one another; each list begins with the files of the workspace alone.
CHAINS = (
    ["README.md"],
    ["docs/index.md"],
    [LEARN, "docs/how-to/rewards.md", "docs/how-to/promote.md", "docs/how-to/evaluate.md", "docs/how-to/vllm.md"],
    ["docs/how-to/rewards.md", CORRECT, "docs/serving.md"],
    ["docs/how-to/data.md"],
)
HUB = re.compile(r"Qwen/[\w.-]+")
# A server answers, a random model would have to end its answers, or it takes minutes.
PARSED_ALONE = ("http://", "distill", "--rounds", "demo", "runs/killed")
SHORT = ["--max-length", "200", "--learning-rate", "2e-2"]
QUICK = {
    ("learn", "--from-feedback"): ["--minimum", "10", "--gate", "1", "--held-out", "0.3", "--no-report"],
    ("learn",): [*FAST, "--no-report", "--sample-answers", "0"],
    ("reward", "train"): SHORT,
    ("correct", "train"): SHORT,
    ("correct", "run"): ["--max-new-tokens", "8"],
    ("correct", "evaluate"): ["--max-new-tokens", "8"],
    ("evaluate",): ["--max-new-tokens", "8"],
}


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in commands(page)])
def test_a_command_has_the_flags_that_it_is_written_with(page, line):
    if "..." in line:
        pytest.skip("is not written out")
    command, left = verb(words(line))
    if left != ["--version"]:
        command.make_context("everalign", left)


@pytest.mark.parametrize(
    ("page", "line"),
    [
        (page, re.sub(r"\s+", " ", line))
        for page in PAGES
        for line in re.findall(r"(?<!`)`(everalign [^`]+)`(?!`)", (ROOT / page).read_text(encoding="utf-8"))
    ],
)
def test_a_command_within_the_text_is_there(page, line):
    known, left = verb([word for word in words(re.sub(r"\.\.\.|…", "", line)) if not word.isupper()] or ["--help"])
    flags = {flag for parameter in known.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in left if word.startswith("--")} <= flags | {"--help", "--version"}


@pytest.mark.parametrize("page", PAGES)
def test_python_in_a_page_is_python(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_data_in_a_page_can_be_read(page):
    for block in blocks(page):
        if block.language in ("yaml", "json"):
            assert (yaml.safe_load if block.language == "yaml" else json.loads)(block.code)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_of_a_page_are_there(page):
    """Those of the site are checked by its build, too, with their anchors."""
    text = re.sub(
        r"^```.*?^```$|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    made = {"docs/results.md": "bench/RESULTS.md", "docs/changelog.md": "CHANGELOG.md"}
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path = ((ROOT / page).parent / target).resolve().relative_to(ROOT)
        assert (ROOT / made.get(str(path), path)).exists() or str(path) == "docs/reference/command-line.md", target


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The files that the pages name."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", layers=2)
    for name, task in (("harmless", "warm"), ("helpful", "brief"), ("pairs", "calm")):
        write_rows(tmp_path / f"{name}.jsonl", task_rows(task))
        write_rows(tmp_path / f"{name}.test.jsonl", held_out(task))
    scored = [{"prompt": f"q{i}?", "completions": [f"yes {i}", "no"], "rewards": [1.0, 0.0]} for i in range(12)]
    write_rows(tmp_path / "scored.test.jsonl", scored[8:])
    write_rows(tmp_path / "scored.jsonl", scored[:8])
    corrections = [{"question": f"q{i}?", "answer": f"no {i}", "correction": f"yes {i}"} for i in range(8)]
    write_rows(tmp_path / "corrections.jsonl", corrections[:6])
    write_rows(tmp_path / "corrections.test.jsonl", corrections[6:])
    write_rows(tmp_path / "answers.jsonl", [{"question": f"q{i}?", "answer": "no"} for i in range(2)])
    for name, task in (("polite", "calm"), ("returns", "brief")):
        write_rows(tmp_path / f"{name}.jsonl", task_rows(task))
        write_rows(tmp_path / f"{name}.test.jsonl", held_out(task))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nHow?,Kindly.,No.\n")
    (tmp_path / "support.csv").write_text("question,better,worse\nHow?,Kindly.,No.\nWhen?,Soon.,Never.\n")
    write_rows(tmp_path / "completions.jsonl", [{"prompt": "q?", "completions": ["yes", "no"]}])
    for name, rows in (("customers", task_rows), ("customers.test", held_out)):
        named = (("acme", "warm"), ("globex", "brief"))
        write_rows(
            tmp_path / f"{name}.jsonl",
            [{**row.to_json(), "customer": customer} for customer, task in named for row in rows(task)],
        )
    with FeedbackStore.open("sqlite:///feedback.db") as store:
        for i in range(40):
            key, about = f"{i % 4:012d}", {"question": f"q{i}?", "original": f"no {i}", "returned": f"no {i}"}
            made = exchange(f"chatcmpl-{i}", key_id=key, **about)
            store.add_exchange(made)
            store.add_feedback(feedback(made.id, key_id=key, edited_text=f"yes {i}"))
    return tmp_path


@pytest.mark.parametrize("pages", CHAINS, ids=lambda pages: pages[0] if len(pages) == 1 else pages[1])
def test_what_a_page_shows_works(workspace, pages):
    for page in pages:
        reader = Reader(
            page,
            prepared=quickened,
            alone=PARSED_ALONE,
            # A random model learns nothing that could be shown: there is not enough evidence.
            codes={"--from-feedback": (0, 4), "--gate": (0, 3, 4)},
        )
        reader.replaced[HUB] = "model"
        reader.run()
        assert reader.done
    if "docs/serving.md" in pages:
        assert [version.task for version in load_run("runs/loop").all_versions] == ["feedback-1", "feedback-2"]


def quickened(arguments):
    """A command with a small model, and what makes it quick."""
    flags = next((more for names, more in QUICK.items() if set(names) <= set(arguments)), [])
    if "--resume" in arguments:
        flags = ["--no-report"]  # the rest is the run's
    corrects = "correct" in arguments or "reward" in arguments
    return [HUB.sub(str(saved_model()) if corrects else "model", word) for word in arguments] + flags


def test_a_run_goes_on_with_nothing_but_its_output(workspace, capsys):
    line = commands(LEARN)[0]
    arguments = quickened(words(line))
    assert run(capsys, *arguments, "--gate", "1.0")[0] == 0
    code, _, error = run(capsys, "learn", "--resume", "--output", "runs/assistant")
    assert code == 2
    assert "every task that it was given is learned" in error
    # The next task: settings and the gate are the run's.
    code, _, error = run(
        capsys, "learn", "--resume", "--output", "runs/assistant", "--task", "calm=pairs.jsonl,pairs.test.jsonl"
    )
    assert code == 0, error
    calm = load_run("runs/assistant").versions[-1].manifest
    assert (calm.name, calm.gate.tolerance) == ("calm", 1.0)


def test_an_interrupted_run_goes_on_with_the_tasks_that_are_left(workspace, capsys, monkeypatch):
    line = commands(LEARN)[0]
    from everalign.learning.learner import Learner

    learn, learned = Learner._learn, []

    def interrupted(self, task, *others):
        if task.name == "helpful" and not learned:
            learned.append(task.name)
            raise KeyboardInterrupt
        return learn(self, task, *others)

    monkeypatch.setattr(Learner, "_learn", interrupted)
    assert run(capsys, *quickened(words(line)))[0] == 130
    monkeypatch.chdir(workspace / "runs")  # its files are found from anywhere, too
    code, _, error = run(capsys, "learn", "--resume", "--output", "assistant", "--model", str(workspace / "model"))
    assert code == 0, error
    assert [version.task for version in load_run("assistant").versions] == ["harmless", "helpful"]


def test_a_run_that_python_has_begun_is_known_by_its_facts(workspace, capsys):
    from everalign.methods import ExperienceReplay
    from learner_for_tests import make_learner

    learner = make_learner(Path("model"), Path("runs/python"), ExperienceReplay(replay=0.3), "fpo", gate=0.9, seed=3)
    learner.learn(task_rows("warm"), "warm", held_out("warm"))
    arguments = ("--task", "helpful=helpful.jsonl,helpful.test.jsonl", "--no-report")
    code, _, error = run(capsys, "learn", "--resume", "--output", "runs/python", *arguments)
    assert code == 0, error
    assert [version.task for version in load_run("runs/python").versions] == ["warm", "helpful"]


def test_feedback_on_a_corrector_begins_with_no_model_that_is_none(workspace, capsys):
    store = ["--from-feedback", "sqlite:///feedback.db", "--minimum", "10", "--gate", "1", "--held-out", "0.3"]
    begun = ["learn", *store, "--model", str(saved_model()), "--objective", "correction", "--max-length", "200"]
    code, _, error = run(capsys, *begun, "--output", "runs/bare", "--no-report")
    assert code == 2
    assert "the feedback is on answers of the corrector 0003" in error
    assert "give the corrector in service as the model" in error
    first = commands(CORRECT)[0]
    assert run(capsys, *quickened(words(first)))[0] == 0
    code, _, error = run(capsys, "learn", *store, "--output", "runs/corrector")
    assert code == 2
    assert "begin with this corrector by --model runs/corrector" in error


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints(tmp_path, capsys):
    """A folder where the demo has been is taken from EVERALIGN_DEMO, which saves its two minutes."""
    folder = os.environ.get("EVERALIGN_DEMO", str(tmp_path / "demo"))
    code, printed, error = run(capsys, "demo", "--output", folder)
    assert code == 0, error
    printed = printed.split("\ntime ")[0]
    shown = next(block.code for block in blocks("README.md") if "courteous-kitchen" in block.code)
    assert [line.rstrip() for line in printed.strip().splitlines()] == shown.strip().splitlines()


def test_the_picture_is_small():
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 200_000
