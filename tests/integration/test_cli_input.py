"""Bad input on the command line: exit code 2, one clear error, no traceback, and no run left behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_for_tests import learn, make_workspace, run, task, write_rows
from runs_for_tests import write_run

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
NAN = '{"prompt": "p", "chosen": "a", "rejected": "b", "weight": NaN}'


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def work(workspace, tmp_path, monkeypatch):
    """A working directory with the workspace's files in it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for entry in workspace.iterdir():
        Path(entry.name).symlink_to(entry)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one error that a command ends with, on standard error only."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err[err.index("error: ") :]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "rows.jsonl: no rows in it"),
        ([GOOD, '{"prompt": "x",'], "rows.jsonl:2: broken JSON at character 16"),
        ([{"question": "x", "better": "a", "worse": "b"}], "rows.jsonl:1: field 'chosen': no such column"),
        ([GOOD, {**GOOD, "rejected": " a"}], "rows.jsonl:2: field 'rejected': equal to 'chosen'"),
        ([NAN], "rows.jsonl:1: field 'weight': must be positive and finite"),
        ([{**GOOD, "prompt": ""}], "rows.jsonl:1: field 'prompt': is empty"),
    ],
    ids=["empty", "broken", "columns", "equal", "nan", "no prompt"],
)
def test_bad_rows(rows, expected, work, capsys):
    write_rows(work / "rows.jsonl", rows)
    assert f"error: {expected}" in refused(capsys, *learn("--task", "a=rows.jsonl"))
    assert f"error: {expected}" in refused(capsys, *learn("--task", "a=warm.jsonl,rows.jsonl"))
    assert not Path("run").exists()


def test_a_missing_file(work, capsys):
    assert refused(capsys, *learn("--task", "a=nowhere.jsonl")) == "error: nowhere.jsonl: no such file\n"


def test_a_real_process_exits_with_the_code_and_prints_nothing_else(tmp_path):
    command = [Path(sys.executable).parent / "everalign", "learn", "--task", "warm.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --task warm.jsonl: must be NAME=TRAIN or NAME=TRAIN,TEST\n"


@pytest.mark.parametrize("text", ["warm.jsonl", "=warm.jsonl", " =x", "a=", "a=x,", "a=,x", "a=x,y,z"])
def test_a_malformed_task(text, work, capsys):
    error = refused(capsys, *learn("--task", text))
    assert error.startswith(f"error: --task {text}: must be NAME=TRAIN or NAME=TRAIN,TEST")
    assert ("recipe" in error) == (text == "a=x,y,z")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (task("warm"), "--task: the name 'warm' is given twice"),
        (["--method", "lifealing"], "unknown method 'lifealing' (did you mean 'lifealign'?)"),
        (["--objective", "ppo"], "unknown objective 'ppo' (did you mean 'fpo'?): choose one of sft, dpo, fpo"),
        (["--preset", "papr"], "unknown preset 'papr': choose one of default, paper"),
        (["--reference", "bse"], "--reference must be one of base, stage_start, previous_task, found 'bse'"),
        (["--space", "x"], "--space must be one of none, product, factors, found 'x'"),
        (["--checkpointing", "yes"], "--checkpointing must be one of auto, on, off, found 'yes'"),
        (["--precision", "fp16"], "--precision must be one of auto, fp32, bf16, found 'fp16'"),
        (["--gamma", "2", "--objective", "dpo"], "gamma is the focusing exponent of fpo"),
        (["--beta", "0.2", "--objective", "sft"], "the objective sft has no margin and would ignore beta"),
        (["--gamma", "2", "--method", "seqft"], "gamma means nothing to the method 'seqft'"),
        (["--keep", "0.5", "--method", "er"], "keep means nothing to the method 'er'"),
        (["--keep", "1.5"], "--keep must be a number from 0 to 1, found 1.5"),
        (["--max-length", "4"], "--max-length must be a whole number of at least 8, found 4"),
        (["--rank", "0"], "--rank must be a whole number of at least 1, found 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a number above 0, found nan"),
        (["--beta", "inf"], "--beta must be a number above 0, found inf"),
        (["--targets", "nothing"], "cannot adapt nothing: no module of LlamaForCausalLM has this name"),
        (["--model", "elsewhere"], "there is no folder elsewhere, and no tokenizer of that name could be loaded"),
        (["--model", "./elsewhere/model"], "there is no model folder ./elsewhere/model"),
        (["--output", "warm.jsonl"], "warm.jsonl is not a directory: choose another output directory"),
        (["--output", "model"], "model is not empty and holds no run: choose another output directory"),
        (["--model", ""], "--model must be text that is not empty"),
        (["--seed", "one"], "Invalid value for '--seed'"),
        (["--metod", "er"], "No such option"),
        (["extra"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(flags, expected, work, capsys):
    assert expected in refused(capsys, *learn(*task("warm"), *flags))
    assert not Path("run").exists()


def test_a_wrong_flag_says_where_its_verb_is_explained(capsys):
    assert refused(capsys, "learn", "--metod", "er").endswith("See: everalign learn --help\n")
    assert refused(capsys, "lern").endswith("See: everalign --help\n")


@pytest.mark.parametrize(
    ("missing", "name"), [("--model", "model"), ("--output", "output"), ("--task", "tasks")], ids=lambda value: value
)
def test_what_must_be_given(missing, name, capsys):
    given = {"--model": "tiny", "--output": "run", "--task": "a=b.jsonl"}
    flags = [word for flag, value in given.items() if flag != missing for word in (flag, value)]
    assert f"no {name} given: add {missing}, or the key '{name}' to the recipe" in refused(capsys, "learn", *flags)


def test_rows_in_both_training_and_test_set_even_of_different_tasks(work, capsys):
    assert "10 rows are in both the training and the test set" in refused(
        capsys, *learn(*task("warm", test="warm.jsonl"))
    )
    error = refused(capsys, *learn(*task("warm"), *task("other", "calm.jsonl", "warm.jsonl")))
    assert "warm.jsonl and warm.jsonl: 10 rows are in both" in error
    assert not Path("run").exists()


def test_an_output_that_holds_a_run_is_not_written_over(work, capsys):
    write_run(work / "run")
    before = (work / "run" / "run.json").read_bytes()
    assert "run holds a run already: resume it" in refused(capsys, *learn(*task("warm")))
    assert (work / "run" / "run.json").read_bytes() == before


def test_resume_refuses_other_settings_other_rows_and_a_damaged_version(work, capsys):
    assert run(capsys, *learn(*task("warm")))[0] == 0
    error = refused(capsys, *learn(*task("warm"), "--resume", "--beta", "0.3"))
    assert "was started with different settings (beta: 0.1 then, 0.3 now)" in error
    error = refused(capsys, *learn(*task("warm", "calm.jsonl"), "--resume"))
    assert "task 'warm' was learned from other rows already" in error
    weights = work / "run/versions/001-warm/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights.relative_to(work)) in refused(capsys, *learn(*task("warm"), "--resume"))


@pytest.mark.parametrize("verb", ["report", "versions"])
def test_what_is_no_run_and_a_damaged_run(verb, work, capsys):
    assert "model is not a run directory" in refused(capsys, verb, "model")
    assert "nowhere is not a run directory" in refused(capsys, verb, "nowhere")
    write_run(work / "run")
    (work / "run/run.json").write_text("{")
    assert "run/run.json: damaged JSON" in refused(capsys, verb, "run")
    (work / "run/versions/002-2/scores.json").write_text("{")
    assert "run/versions/002-2/scores.json is missing or has changed" in refused(capsys, verb, "run")
    assert not Path("report.html").exists()


def test_a_report_on_the_same_run_twice_or_into_a_folder(work, capsys):
    write_run(work / "run")
    assert "the same run is given twice" in refused(capsys, "report", "run", "run")
    taken = "run: cannot be written (Is a directory): a folder has this name"
    assert taken in refused(capsys, "report", "run", "--output", "run")


def test_a_recipe_s_mistake_names_the_file(work, capsys):
    Path("recipe.yaml").write_text("modle: tiny")
    error = refused(capsys, *learn(*task("warm"), "--recipe", "recipe.yaml"))
    assert error == "error: recipe.yaml:1: unknown key 'modle': did you mean 'model'?\n"
    assert "error: no.yaml: no such file" in refused(capsys, *learn(*task("warm"), "--recipe", "no.yaml"))


def test_an_argument_of_another_method_in_the_recipe_is_refused_not_dropped(work, capsys):
    Path("recipe.yaml").write_text("method: {name: lifealign, energy: 0.8}")
    error = refused(capsys, *learn(*task("warm"), "--recipe", "recipe.yaml", "--method", "er"))
    assert "energy means nothing to the method 'er'" in error


def test_a_folder_that_holds_no_model(work, capsys):
    shutil.copytree("model", "half")
    Path("half/config.json").unlink()
    assert "the folder half" in refused(capsys, *learn(*task("warm"), "--model", "half"))
