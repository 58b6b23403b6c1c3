"""A folder with a tiny model and preference files, and the command line called in this process."""

import json
import os
import sys
import tempfile
from pathlib import Path

from everalign.cli import main
from learner_for_tests import ANSWERS, held_out, save_model, task_rows

FAST = [
    "--learning-rate",
    "2e-2",
    "--batch-size",
    "4",
    "--max-length",
    "64",
    "--rank",
    "4",
    "--targets",
    "q_proj,v_proj",
]


def write_rows(path: Path, rows) -> Path:
    """One JSON object a line; a row may be a dictionary, a preference, or a line as it is."""
    lines = (
        row if isinstance(row, str) else json.dumps(getattr(row, "to_json", lambda row=row: row)()) for row in rows
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def make_workspace(folder: Path) -> Path:
    """The model, and NAME.jsonl and NAME.test.jsonl of three tasks."""
    save_model(folder / "model")
    for name in ANSWERS:
        write_rows(folder / f"{name}.jsonl", task_rows(name))
        write_rows(folder / f"{name}.test.jsonl", held_out(name))
    return folder


def task(name: str, train: str | None = None, test: str | None = None) -> list[str]:
    """The flag of one task of the workspace."""
    return ["--task", f"{name}={train or f'{name}.jsonl'},{test or f'{name}.test.jsonl'}"]


def learn(*arguments: str) -> list[str]:
    """Arguments of a quick `everalign learn` into the folder `run`, without a report unless --report is among them."""
    report = [] if "--report" in arguments else ["--no-report"]
    # A random model never ends an answer; those that are about answers ask for some.
    answers = [] if "--sample-answers" in arguments else ["--sample-answers", "0"]
    return ["learn", "--model", "model", "--output", "run", *FAST, *report, *answers, *arguments]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    capsys.readouterr()
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def run_forked(*arguments: str) -> tuple[int, str, str]:
    """As `run`, in a process forked from this one, with all that it or a library writes to its two streams."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            code = 99
            try:
                for stream, number in ((out, 1), (err, 2)):
                    os.dup2(stream.fileno(), number)
                sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))  # noqa: SIM115
                code = main(list(arguments))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
        return code, texts[0], texts[1]


def settings(folder: Path):
    """The settings of a run as run.json has them."""
    return json.loads((folder / "run.json").read_text())["settings"]
