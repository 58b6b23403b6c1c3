"""The commands of README.md and docs/: each is run as it is written, in the order in which it stands there.

Models are small ones in the place of those from the Hub, and a few flags make training quick. What needs a server, or
minutes, is parsed alone.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer

from cli_for_tests import FAST, run, write_rows
from everalign.cli import app
from everalign.learning.run_data import load_run
from everalign.serving.store import FeedbackStore
from learner_for_tests import held_out, save_model, task_rows
from models_for_tests import saved_model
from stores_for_tests import exchange, feedback

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/serving.md")
HUB = re.compile(r"Qwen/[\w.-]+")
# A server answers, or a random model would have to end its answers.
PARSED_ALONE = ("http://", "distill", "--rounds", "demo")
SHORT = ["--max-length", "200", "--learning-rate", "2e-2"]
QUICK = {
    ("learn", "--from-feedback"): ["--minimum", "10", "--gate", "1", "--held-out", "0.3", "--no-report"],
    ("learn",): [*FAST, "--no-report", "--sample-answers", "0"],
    ("reward", "train"): SHORT,
    ("correct", "train"): SHORT,
    ("correct", "run"): ["--max-new-tokens", "8"],
    ("correct", "evaluate"): ["--max-new-tokens", "8"],
}


def blocks(page, language):
    """The blocks of code of a page that are in a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


def commands(page):
    """The command lines in a page's blocks of code, without comments."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s#\s.*", "", line) for line in lines if line.startswith("everalign ")]


def words(line):
    return shlex.split(line.replace("[VERSION]", ""))[1:]


def verb(arguments):
    """The command's object and what is left for it."""
    command, left = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands") and left:
        command = command.commands[left.pop(0)]
    return command, left


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_a_command_has_the_flags_that_it_is_written_with(line):
    command, left = verb(words(line))
    command.make_context("everalign", left)


@pytest.mark.parametrize(
    "line", re.findall(r"`(everalign [^`]+)`", "".join((ROOT / page).read_text() for page in PAGES))
)
def test_a_command_within_the_text_is_there(line):
    known, left = verb([word for word in words(line.replace("...", "")) if not word.isupper()] or ["--help"])
    flags = {flag for parameter in known.params for flag in parameter.opts}
    assert {word for word in left if word.startswith("--")} <= flags


@pytest.mark.parametrize("page", PAGES)
def test_python_in_a_page_is_python(page):
    for block in blocks(page, "python"):
        compile(block, page, "exec")


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


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work_one_after_another(workspace, capsys, page):
    if page != "README.md":
        # It goes on from where the README has come to.
        first = next(line for line in commands("README.md") if line.startswith("everalign correct train"))
        assert run(capsys, *quickened(words(first)))[0] == 0
    done = []
    for line in commands(page):
        if any(text in line for text in PARSED_ALONE):
            continue
        code, _, error = run(capsys, *quickened(words(line)))
        # A random model learns nothing that could be shown: there is not enough evidence.
        assert code in ((0, 4) if "--from-feedback" in line else (0,)), f"{line}\n{error}"
        done.append(line)
    assert len(done) >= {"README.md": 10, "docs/serving.md": 4}[page]
    assert [version.task for version in load_run("runs/loop").all_versions] == ["feedback-1", "feedback-2"]
    if page == "README.md":
        assert load_run("runs/assistant").current == "001-harmless"


def quickened(arguments):
    """A command with a small model, and what makes it quick."""
    flags = next((more for names, more in QUICK.items() if set(names) <= set(arguments)), [])
    corrects = "correct" in arguments
    small = str(saved_model()) if corrects or "reward" in arguments else "model"
    return [HUB.sub(small, word) for word in arguments] + flags


def test_a_run_goes_on_with_nothing_but_its_output(workspace, capsys):
    line = next(line for line in commands("README.md") if line.startswith("everalign learn --model"))
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
    line = next(line for line in commands("README.md") if line.startswith("everalign learn --model"))
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
    first = next(line for line in commands("README.md") if line.startswith("everalign correct train"))
    assert run(capsys, *quickened(words(first)))[0] == 0
    code, _, error = run(capsys, "learn", *store, "--output", "runs/corrector")
    assert code == 2
    assert "begin with this corrector by --model runs/corrector" in error
