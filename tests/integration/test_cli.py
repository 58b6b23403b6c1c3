"""The command line on good input: what it prints where, what it writes, and how flags, recipe and preset rank."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cli_for_tests import learn, make_workspace, run, run_forked, settings, task, write_rows
from everalign import __version__
from everalign.cli import console as display
from everalign.cli import main
from everalign.cli.console import Display
from everalign.cli.learn import parse_task
from everalign.errors import EveralignError
from learner_for_tests import adapter_weights, held_out, same_weights, swapped, task_rows
from runs_for_tests import LIFEALIGN, SEQUENTIAL, write_run

TASKS = [*task("warm"), *task("brief")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def work(workspace, tmp_path, monkeypatch):
    """A copy of the workspace, which is the working directory."""
    shutil.copytree(workspace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def scores_of(version: str, name: str, metric: str = "accuracy") -> float:
    return json.loads(Path("run/versions", version, "scores.json").read_text())["scores"][name][metric]


# ---- learn ----


def test_json_is_all_that_a_process_writes_to_standard_output(work, monkeypatch):
    arguments = [*learn(*TASKS, *task("calm"), "--report"), "--json"]
    monkeypatch.setenv("FORCE_COLOR", "")
    code, out, err = run_forked(*arguments)
    assert code == 0, err
    result = json.loads(out)
    assert result["tasks"] == ["warm", "brief", "calm"]
    versions = ["001-warm", "002-brief", "003-calm"]
    assert result["matrix"] == [[scores_of(version, name) for name in result["tasks"]] for version in versions]
    last, diagonal = result["matrix"][2], [result["matrix"][i][i] for i in range(3)]
    assert result["last"] == pytest.approx(sum(last) / 3)
    assert result["backward_transfer"] == pytest.approx(sum(a - b for a, b in zip(last, diagonal, strict=True)) / 2)
    assert {"zero_shot", "average_performance", "forward_transfer"} <= result.keys()
    assert [version["version"] for version in result["versions"]] == versions
    assert [version["then"] for version in result["versions"]] == diagonal
    assert [version["now"] for version in result["versions"]] == last
    assert result["output"] == "run"
    assert result["report"] == "run/report.html"
    assert 0 < result["seconds"] < 600
    assert "calm" in Path(result["report"]).read_text()
    assert "task 3: calm" in err
    assert "\x1b" not in out + err


def test_people_get_the_table_and_the_path_of_the_report_last(work, capsys):
    code, out, err = run(capsys, *learn(*TASKS, "--report"))
    assert code == 0
    assert "after learning" in out
    assert "BWT" in out
    assert "After 2 tasks, lifealign prefers the chosen response in" in out
    assert out.splitlines()[-1].split() == ["report", "run/report.html"]
    assert "  warm: 10 rows to learn, 5 held out\n" in err
    assert "reference = stage_start, margin at step 0 = 0" in err


def test_no_report_writes_none_and_says_so_in_json(work, capsys):
    code, out, _ = run(capsys, *learn(*task("warm"), "--json"))
    assert code == 0
    assert json.loads(out)["report"] is None
    assert not Path("run/report.html").exists()


def test_a_task_without_test_set_is_announced_as_such(work, capsys):
    code, out, err = run(capsys, *learn("--task", "warm=warm.jsonl", "--json"))
    assert code == 0
    assert "warm: 10 rows to learn, no held-out rows, so it is not scored" in err
    assert json.loads(out)["matrix"] == [[None]]


def test_a_joint_run_prints_its_only_row(work, capsys):
    code, out, _ = run(capsys, *learn(*TASKS, "--method", "mtl", "--objective", "dpo", "--json"))
    assert code == 0
    result = json.loads(out)
    assert result["matrix"][0] == [None, None]
    assert None not in result["matrix"][1]
    assert [version["task"] for version in result["versions"]] == ["all-tasks"]


def test_resume_learns_only_what_is_new(work, capsys):
    assert run(capsys, *learn(*task("warm")))[0] == 0
    first = adapter_weights(Path("run"), 0)
    code, _, err = run(capsys, *learn(*TASKS, "--resume"))
    assert code == 0
    assert "task 1: warm (learned already)" in err
    assert "task 2: brief\n" in err
    assert same_weights(first, adapter_weights(Path("run"), 0))
    assert sorted(path.name for path in Path("run/versions").iterdir()) == ["001-warm", "002-brief"]


def test_an_interrupted_run_exits_130_and_resumes_to_the_same_weights_past_a_damaged_checkpoint(
    work, capsys, monkeypatch
):
    arguments = learn(*task("warm"), "--checkpoint-steps", "1")

    def interrupt(_, stage, done, total):
        if stage == "fpo" and done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "progress", interrupt)
        code, out, err = run(capsys, *arguments)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the same command with --resume continues from here"

    newest = max(Path("run/work").rglob("checkpoint-*"))
    (newest / "optimizer.pt").write_bytes(b"cut")
    code, _, err = run(capsys, *arguments, "--resume")
    assert code == 0
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    reason = "optimizer.pt is cut or missing"
    assert warned == [f"warning: {newest} is not a complete checkpoint ({reason}): resuming from before it"]

    assert run(capsys, *arguments, "--output", "whole")[0] == 0
    assert same_weights(adapter_weights(Path("run")), adapter_weights(Path("whole")))


def test_a_cut_prompt_is_reported_and_learned(work, capsys):
    write_rows(work / "long.jsonl", [{"prompt": "word " * 200, "chosen": "yes", "rejected": "no"}])
    code, _, err = run(capsys, *learn("--task", "long=long.jsonl"))
    assert code == 0
    assert "1 rows of at most 64 tokens: 1 prompts and 0 answers truncated" in err


def test_bad_rows_left_out_on_request_are_counted_with_the_first_reason(work, capsys):
    write_rows(work / "mixed.jsonl", [*task_rows("warm"), {"prompt": "p", "chosen": "a"}, "{"])
    code, _, err = run(capsys, *learn("--task", "mixed=mixed.jsonl", "--skip-bad-rows"))
    assert code == 0
    assert "warning: mixed.jsonl: 2 bad rows left out; the first: mixed.jsonl:11: field 'rejected'" in err
    assert "mixed: 10 rows to learn" in err


def test_an_overlap_is_learned_on_request(work, capsys):
    assert run(capsys, *learn(*task("warm", test="warm.jsonl"), "--allow-overlap"))[0] == 0


def test_reference_log_probabilities_go_into_the_named_cache(work, capsys):
    assert run(capsys, *learn(*task("warm"), "--cache", "shared"))[0] == 0
    assert list(Path("shared").glob("reference-*.sqlite"))
    assert not Path("run/cache").exists()


# ---- the gate ----


def poison(work):
    """Rows of `warm` with the preferences exchanged."""
    write_rows(work / "poison.jsonl", swapped("warm", 40))
    return ["--task", "poison=poison.jsonl"]


def test_a_task_that_the_gate_refuses_exits_3_after_the_report_and_those_behind_it_are_not_learned(work, capsys):
    for name in ("warm", "calm"):
        write_rows(work / f"{name}.test.jsonl", held_out(name, 12))
    given = [*task("warm"), *poison(work), *task("calm")]
    gate = ["--objective", "dpo", "--warmup", "0", "--gate", "0.25"]
    code, out, err = run(capsys, *learn(*given, *gate, "--report"))
    assert code == 3
    assert out.splitlines()[-1].split() == ["report", "run/report.html"]
    assert err.splitlines()[-1].startswith("error: 002-poison was refused by the gate, which lets accuracies fall by")
    page = Path("run/report.html").read_text()
    assert "refused by the gate" in page
    assert "warm fell from 100.0% to 0.0%" in page
    assert sorted(path.name for path in Path("run/versions").iterdir()) == ["001-warm", "002-poison"]

    code, out, _ = run(capsys, *learn(*given[2:], *gate, "--resume", "--json"))
    assert code == 3
    result = json.loads(out)
    assert (result["refused"], result["tasks"]) == ("003-poison", ["warm", "calm"])
    assert [(row["version"], row["status"]) for row in result["versions"]] == [
        ("001-warm", "promoted"),
        ("002-poison", "refused by the gate"),
        ("003-poison", "refused by the gate"),
    ]
    verdict = result["versions"][1]["gate"]
    assert (verdict["outcome"], verdict["fell"], verdict["compared"]["warm"]["rows"]) == (
        "refused",
        {"warm": [1.0, 0.0]},
        12,
    )

    code, out, _ = run(capsys, *learn(*task("warm"), *task("calm"), *gate, "--resume", "--json"))
    assert (code, json.loads(out)["refused"]) == (0, None)
    out = run(capsys, "versions", "run")[1]
    assert "002-poison: warm fell from 100.0% to 0.0% (change" in out


@pytest.mark.parametrize("tolerance", ["-0.1", "2", "nan"])
def test_a_tolerance_that_is_no_share_exits_2_and_begins_no_run(work, capsys, tolerance):
    code, out, err = run(capsys, *learn(*task("warm"), "--gate", tolerance))
    assert (code, out) == (2, "")
    assert "gate" in err
    assert not Path("run").exists()


# ---- flags, recipe, preset ----


def test_flags_go_before_the_recipe_that_before_the_preset_that_before_the_default(work, capsys):
    recipe = {
        "model": "model",
        "output": "run",
        "preset": "paper",
        "method": {"name": "er", "replay": 0.5, "capacity": 7},
        "objective": "dpo",
        "seed": 3,
        "report": False,
        "tasks": [{"name": "warm", "train": "warm.jsonl", "test": "warm.test.jsonl"}],
        "training": {"epochs": 2, "max_length": 32, "sft_epochs": 0, "learning_rate": 1e-3},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--learning-rate", "2e-3", "--capacity", "5", "--rank", "2"]
    code, _, err = run(capsys, "learn", "--recipe", "recipe.yaml", *flags)
    assert code == 0, err
    facts = json.loads(Path("run/run.json").read_text())
    assert facts["method"] == {"name": "er", "replay": 0.5, "capacity": 5}
    assert (facts["objective"], facts["seed"]) == ("dpo", 3)
    chosen = settings(Path("run"))
    assert (chosen["learning_rate"], chosen["rank"]) == (2e-3, 2)  # flags
    assert (chosen["epochs"], chosen["max_length"]) == (2.0, 32)  # recipe
    assert (chosen["reference"], chosen["targets"]) == ("base", "q_proj,v_proj")  # preset
    assert (chosen["beta"], chosen["alpha"]) == (0.1, 16.0)  # default
    assert not Path("run/report.html").exists()


def test_tasks_given_by_flags_replace_those_of_the_recipe(work, capsys):
    Path("recipe.yaml").write_text("tasks: [{name: calm, train: calm.jsonl}]")
    code, out, _ = run(capsys, *learn("--recipe", "recipe.yaml", *task("warm"), "--json"))
    assert code == 0
    assert json.loads(out)["tasks"] == ["warm"]


def test_a_printed_recipe_is_what_is_run(work, capsys):
    flags = learn(*task("warm"), "--objective", "dpo", "--preset", "paper", "--sft-epochs", "0.5", "--keep", "0.25")
    code, printed, _ = run(capsys, *flags, "--print-recipe")
    assert code == 0
    assert not Path("run").exists()
    Path("recipe.yaml").write_text(printed)
    assert run(capsys, "learn", "--recipe", "recipe.yaml", "--print-recipe")[:2] == (0, printed)
    assert run(capsys, *flags)[0] == 0
    facts, recipe = json.loads(Path("run/run.json").read_text()), yaml.safe_load(printed)
    # What `auto` is depends on the machine.
    assert recipe["training"]["precision"] == "auto"
    assert facts["settings"] == {**recipe["training"], **recipe["adapter"], "precision": "fp32"}
    assert {key: facts[key] for key in ("model", "method", "objective", "seed")} == {
        key: recipe[key] for key in ("model", "method", "objective", "seed")
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=b", {"name": "a", "train": "b"}),
        ("a=b,c", {"name": "a", "train": "b", "test": "c"}),
        ("a=b=1.jsonl,c=2.jsonl", {"name": "a", "train": "b=1.jsonl", "test": "c=2.jsonl"}),
        ("a b=dir/x.jsonl", {"name": "a b", "train": "dir/x.jsonl"}),
    ],
)
def test_a_task_is_its_name_and_one_or_two_files(text, expected):
    assert parse_task(text) == expected


# ---- versions and report ----


@pytest.fixture
def runs(tmp_path):
    long_term = write_run(tmp_path / "lifealign")
    plain = write_run(tmp_path / "seqft", SEQUENTIAL, method="seqft")
    return long_term, plain


def test_versions_shows_each_score_then_and_now_and_marks_the_promoted_one(runs, capsys):
    code, out, _ = run(capsys, "versions", str(runs[0]))
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells[0][:2] == ["001-1", "harmless"]
    assert [row[3:] for row in cells] == [
        ["81.0", "78.0", "−3.0", ""],
        ["84.0", "82.5", "−1.5", ""],
        ["77.0", "77.0", "0.0", "promoted"],
    ]


def test_versions_as_json(runs, capsys):
    code, out, _ = run(capsys, "versions", str(runs[0]), "--json")
    assert code == 0
    result = json.loads(out)
    assert result["current"] == "003-3"
    assert [(row["index"], row["task"], row["then"], row["now"], row["promoted"]) for row in result["versions"]] == [
        (1, "harmless", 0.81, 0.78, False),
        (2, "helpful", 0.84, 0.825, False),
        (3, "truthful", 0.77, 0.77, True),
    ]


def test_now_is_what_the_promoted_version_scores_not_the_newest(runs, capsys):
    (runs[0] / "current").write_text("002-2\n")
    result = json.loads(run(capsys, "versions", str(runs[0]), "--json")[1])
    assert [row["now"] for row in result["versions"]] == [LIFEALIGN["harmless"][1][1], 0.84, 0.5]
    (runs[0] / "current").write_text("000\n")
    result = json.loads(run(capsys, "versions", str(runs[0]), "--json")[1])
    assert [row["now"] for row in result["versions"]] == [0.52, 0.55, 0.48]
    assert not any(row["promoted"] for row in result["versions"])


def test_versions_that_do_not_build_on_each_other_have_no_score_now(tmp_path, capsys):
    path = write_run(tmp_path / "stl", method="stl", parents=["000", "000", "000"])
    result = json.loads(run(capsys, "versions", str(path), "--json")[1])
    assert [row["then"] for row in result["versions"]] == [0.81, 0.84, 0.77]
    assert [row["now"] for row in result["versions"]] == [None, None, None]


def test_versions_beside_the_line_are_listed_with_what_became_of_them(tmp_path, capsys):
    path = write_run(tmp_path / "run", parents=["000", "000", "002-2"])
    lines = [line for line in run(capsys, "versions", str(path))[1].splitlines() if line.startswith("│")]
    assert [line.strip("│").split("│")[-1].strip() for line in lines] == ["rolled back", "", "promoted"]


def test_report_on_several_runs_compares_them(runs, tmp_path, capsys):
    page = tmp_path / "comparison.html"
    code, out, _ = run(capsys, "report", *map(str, runs), "--output", str(page))
    assert code == 0
    assert "seqft" in page.read_text()
    table = [line for line in out.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in table] == ["lifealign", "seqft"]
    assert "lifealign kept more of what it had learned" in out
    assert out.splitlines()[-1].split() == ["report", str(page)]


def test_report_as_json(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "report", str(runs[1]), "--json")
    assert code == 0
    result = json.loads(out)
    assert result["report"] == "report.html"
    assert Path("report.html").exists()
    assert result["runs"][0]["run"] == str(runs[1])
    assert result["runs"][0]["last"] == pytest.approx((0.605 + 0.74 + 0.79) / 3)


def test_many_tasks_are_not_squeezed_where_there_is_no_terminal(tmp_path, capsys):
    names = [f"a task with quite a long name {i}" for i in range(8)]
    path = write_run(tmp_path / "run", {name: [0.5, [0.6] * 8] for name in names})
    out = run(capsys, "report", str(path), "--output", str(tmp_path / "r.html"))[1]
    assert all(name in out.splitlines()[1] for name in names)


# ---- around the verbs ----


def test_version_and_help(capsys):
    assert run(capsys, "--version")[:2] == (0, f"everalign {__version__}\n")
    assert run(capsys, "--help")[0] == 0
    code, out, _ = run(capsys)
    assert code == 2
    assert "learn" in out


@pytest.mark.parametrize("verb", ["learn", "report", "versions", "rollback", "export"])
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: everalign {verb} " in out
    assert "--json" in out


def test_expected_failures_exit_1_in_one_line_and_bugs_keep_their_traceback(monkeypatch, capsys, runs):
    def fail_with(error):
        def fail(*_):
            raise error

        monkeypatch.setattr("everalign.learning.run_data.load_run", fail)
        return run(capsys, "versions", str(runs[0]))

    assert fail_with(EveralignError("the model burned down")) == (1, "", "error: the model burned down\n")
    code, _, err = fail_with(OSError(28, "No space left on device", "run/x"))
    assert code == 1
    assert err.startswith("error: run/x: cannot be written (No space left on device): the disk is full: free some")
    assert fail_with(OSError(5, "Odd", "run/x"))[2].count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        fail_with(ZeroDivisionError())


def test_a_long_label_stays_apart_from_its_value(capsys):
    display.show_line("correctors", "out/fbc2")
    display.show_line("run", "out")
    assert capsys.readouterr().out == "correctors out/fbc2\nrun     out\n"


# ---- the display ----


@pytest.fixture
def terminal(monkeypatch):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system="standard", legacy_windows=False)
    monkeypatch.setattr(display, "notes", console)
    return stream


def test_a_terminal_has_a_bar_with_steps_and_time_left_that_goes_away(terminal, monkeypatch):
    seconds = iter(range(10_000))
    with Display() as shown:
        monkeypatch.setattr(shown._bar, "get_time", lambda: float(next(seconds)))
        shown.log("task 1: warm")
        shown.figures("fpo", 0, {})
        for done in range(1, 6):
            shown.progress("fpo", done, 10)
        shown.figures("fpo", 5, {"loss": 0.51234, "accuracy": 0.8125, "learning_rate": 1e-4})
        shown._bar.refresh()
        before = len(terminal.getvalue())
        shown.progress("fpo", 10, 10)
        shown.figures("fpo", 10, {"loss": 0.4})
        shown._bar.refresh()
        assert "left" not in terminal.getvalue()[before:]
        assert "working" in terminal.getvalue()[before:]
    text = terminal.getvalue()
    assert "task 1: warm" in text
    assert "5/10 steps, loss 0.512, accuracy 81%" in text
    assert " left" in text[:before]
    assert text.rstrip().endswith("\x1b[2K")  # the bar's line is erased at the end


def test_a_resumed_stage_does_not_count_the_steps_before_as_fast_ones(terminal, monkeypatch):
    with Display() as shown:
        clock = [0.0]
        monkeypatch.setattr(shown._bar, "get_time", lambda: clock[0])
        for done in range(901, 906):
            clock[0] += 1.0
            shown.progress("fpo", done, 1000)
        assert shown._bar.tasks[0].time_remaining == pytest.approx(95, abs=1)


def test_without_a_terminal_there_are_lines_of_the_first_step_the_last_and_every_half_minute(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    with Display() as shown:
        monkeypatch.setattr(shown._bar, "get_time", lambda: clock[0])
        shown.log("task 1: warm")
        shown.progress("evaluating warm", 40, 40)  # a quick pass says nothing
        shown.figures("fpo", 0, {})
        for done in range(1, 11):
            clock[0] += 8.0
            shown.progress("fpo", done, 10)
            if done in (1, 5, 10):
                shown.figures("fpo", done, {"loss": 1 / done, "accuracy": done / 10})
        shown.progress("scoring", 0, 900)
        for done in (300, 600, 900):
            clock[0] += 40.0
            shown.progress("scoring", done, 900)
    assert capsys.readouterr().err.splitlines() == [
        "task 1: warm",
        "  fpo: 1/10 steps, loss 1, accuracy 10%",
        "  fpo: 5/10 steps, loss 1, accuracy 10%, 40 s left",
        "  fpo: 9/10 steps, loss 0.2, accuracy 50%, 8 s left",
        "  fpo: 10/10 steps, loss 0.1, accuracy 100%",
        "  scoring: 300/900 rows",
        "  scoring: 600/900 rows, 40 s left",
        "  scoring: 900/900 rows",
    ]


def test_main_without_arguments_takes_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["everalign", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"everalign {__version__}\n"


def test_run_as_a_module_it_returns_the_exit_code_too():
    done = subprocess.run([sys.executable, "-m", "everalign", "versions", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
