"""Whole datasets: bounded memory, parts, files of every kind, going on after a kill; each row once and in order."""

import errno
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli_for_tests import run, write_rows
from everalign.bulk import BulkOptions, join_files, run_bulk
from everalign.bulk import job as jobs
from everalign.bulk.files import OutputFile
from everalign.bulk.job import numbered_rows
from everalign.correction import CorrectionOptions
from everalign.correction.batch import CorrectionWork, journal_facts
from everalign.correction.corrector import Corrected
from everalign.data import CorrectionSet, load_scored
from everalign.data.file_formats import cut, raw_rows
from everalign.data.readers import UNCORRECTED, UNSCORED_SCHEMA, unscored_reader
from everalign.data.streams import RowStream
from everalign.errors import EveralignError, InputError
from everalign.evaluation.scoring import ScoringWork, score_rows
from everalign.storage import Journal


class Lengths:
    """Scores an answer by its length; fails at its call number `fails`, and remembers what it was asked."""

    fingerprint = "lengths"

    def __init__(self, fails=0, error=KeyboardInterrupt):
        self.calls, self._fails, self._error = [], fails, error

    def score(self, prompts, completions):
        self.calls.append(list(completions))
        if len(self.calls) == self._fails:
            raise self._error
        return [float(len(text)) for text in completions]


def items(count):
    """Rows of many lengths."""
    return [{"prompt": f"q{i:05}?", "completions": ["x" * (1 + i * 7 % 13), f"{i}"]} for i in range(count)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Every batch is on disk, as it is with batches that take a second.
    monkeypatch.setattr(jobs, "KEEP_SECONDS", 0.0)
    write_rows(tmp_path / "rows.jsonl", items(50))
    return tmp_path


def stream(source="rows.jsonl", skip=False):
    return RowStream(source, unscored_reader(False), skip)


def score(source="rows.jsonl", output="out.jsonl", scorer=None, answers=4, skip=False, overwrite=False, **options):
    work = partial(ScoringWork, scorer or Lengths(), answers)
    options = BulkOptions(**{"window": 10, **options})
    return run_bulk(stream(source, skip), work, output, ScoringWork.words, options=options, overwrite=overwrite)


def rewards(path="out.jsonl"):
    return [list(row.rewards) for row in load_scored(path)]


EXPECTED = [[float(1 + i * 7 % 13), float(len(f"{i}"))] for i in range(50)]


# ---- windows ----


@pytest.mark.parametrize("window", [1, 7, 50, 4096])
def test_rows_keep_their_order_and_are_batched_by_length(window, here):
    scorer = Lengths()
    done = score(scorer=scorer, window=window)
    assert rewards() == EXPECTED
    assert [row.prompt for row in load_scored("out.jsonl")] == [f"q{i:05}?" for i in range(50)]
    assert (done.rows, done.resumed, done.totals["answers"]) == (50, 0, 100)
    assert done.totals["sum"] == sum(map(sum, EXPECTED))
    assert done.totals["squares"] == sum(reward**2 for pair in EXPECTED for reward in pair)
    if window == 50:
        longest = [max(map(len, call)) for call in scorer.calls]
        assert longest == sorted(longest, reverse=True)
    assert sorted(path.name for path in here.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_the_output_is_that_of_rows_in_memory(here):
    score()
    rows = stream().reader.rows("rows.jsonl")
    kind = type(load_scored("out.jsonl"))
    score_rows(kind(tuple(rows), "rows.jsonl"), Lengths(), "memory.jsonl")
    assert Path("out.jsonl").read_bytes() == Path("memory.jsonl").read_bytes()


def test_memory_does_not_grow_with_the_rows(here):
    """Peaks of Python's own memory, in bytes, for few rows and for eight times as many."""

    class Forgetful(Lengths):
        def score(self, prompts, completions):
            self.calls.clear()
            return super().score(prompts, completions)

    peaks = []
    for count in (400, 3200):
        with Path(f"{count}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in items(count))
        tracemalloc.start()
        score(f"{count}.jsonl", f"{count}.out.jsonl", Forgetful(), answers=100, window=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]


PEAK = """
import re, sys
from everalign.bulk import run_bulk
from everalign.data.readers import unscored_reader
from everalign.data.streams import RowStream
from everalign.evaluation.scoring import ScoringWork

class Lengths:
    fingerprint = "lengths"

    def score(self, prompts, completions):
        return [float(len(text)) for text in completions]

stream = RowStream(sys.argv[1], unscored_reader(False))
run_bulk(stream, lambda: ScoringWork(Lengths()), sys.argv[1] + ".out.jsonl", ScoringWork.words)
# What getrusage says may be a peak of the process that started this one.
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the memory that Linux tells of a process")
def test_ten_times_the_rows_take_no_more_memory(here):
    """Peaks of a whole process, in MiB, journal and Python included."""
    peaks = []
    for count in (20_000, 200_000):
        with Path(f"{count}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in items(count))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, f"{count}.jsonl"], capture_output=True, text=True, check=True
        )
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 10, peaks


# ---- going on ----


@pytest.mark.parametrize("fails", [1, 2, 8, 25])
def test_an_interrupted_job_goes_on_and_computes_nothing_twice(fails, here):
    first = Lengths(fails)
    with pytest.raises(KeyboardInterrupt):
        score(scorer=first)
    assert not Path("out.jsonl").exists()
    second = Lengths()
    assert score(scorer=second).resumed == 2 * (fails - 1)
    assert rewards() == EXPECTED
    asked = [text for calls in (first.calls[:-1], second.calls) for call in calls for text in call]
    assert sorted(asked) == sorted(text for row in items(50) for text in row["completions"])


def test_an_interrupt_keeps_what_was_not_written_yet(here, monkeypatch):
    monkeypatch.setattr(jobs, "KEEP_SECONDS", 3600.0)
    with pytest.raises(KeyboardInterrupt):
        score(scorer=Lengths(10))
    assert score().resumed == 18
    assert rewards() == EXPECTED


KILLED = """
import os, sys
from functools import partial
from everalign.bulk import BulkOptions, run_bulk
from everalign.data.readers import unscored_reader
from everalign.data.streams import RowStream
from everalign.evaluation.scoring import ScoringWork

class Killed:
    fingerprint, calls = "lengths", 0

    def score(self, prompts, completions):
        self.calls += 1
        if self.calls == int(sys.argv[1]):
            os.kill(os.getpid(), 9)
        return [float(len(text)) for text in completions]

from everalign.bulk import job
job.KEEP_SECONDS = 0.0
stream, options = RowStream("rows.jsonl", unscored_reader(False)), BulkOptions(window=10)
run_bulk(stream, partial(ScoringWork, Killed(), 4), "out.jsonl", ScoringWork.words, options=options)
"""


def test_a_job_killed_again_and_again_writes_every_row_once(here):
    for calls in (2, 9, 5):
        dead = subprocess.run([sys.executable, "-c", KILLED, str(calls)], capture_output=True, text=True, check=False)
        assert dead.returncode == -9, dead.stderr
    assert score().resumed == 2 * (1 + 8 + 4)
    assert rewards() == EXPECTED


def test_damaged_results_and_another_input_are_noticed(here):
    with pytest.raises(KeyboardInterrupt):
        score(scorer=Lengths(5))
    (journal,) = here.glob("*.partial")
    Journal(journal).put({3: "oops"})
    with pytest.raises(InputError, match="damaged: delete this file"):
        score()
    write_rows(here / "rows.jsonl", items(49))
    assert score().resumed == 0


def test_an_input_that_changes_meanwhile_is_refused(here):
    class Changing(Lengths):
        def score(self, prompts, completions):
            with open("rows.jsonl", "a") as file:
                file.write(json.dumps(items(1)[0]) + "\n")
            return super().score(prompts, completions)

    with pytest.raises(InputError, match="has changed since the start"):
        score(scorer=Changing())
    assert not Path("out.jsonl").exists()


# ---- bad input ----


def test_a_bad_row_is_found_before_anything_is_computed(here):
    write_rows(here / "rows.jsonl", [*items(30), {"prompt": "q", "completions": [3]}])
    scorer = Lengths()
    with pytest.raises(InputError, match=r"rows.jsonl:31: field 'completions\[0\]'"):
        score(scorer=scorer)
    assert scorer.calls == []
    done = score(skip=True)
    assert (done.rows, done.checked.skipped) == (30, 1)
    assert done.checked.first.startswith("rows.jsonl:31: field")
    write_rows(here / "rows.jsonl", ["[]", "{"])
    with pytest.raises(InputError, match=r"all 2 rows are bad, the first: rows\.jsonl:1"):
        score(output="other.jsonl", skip=True)


def test_a_failure_names_its_rows_wherever_they_stand(here):
    with pytest.raises(
        EveralignError, match=r"^shard 2/2: 2 rows \(\d+, \d+, \.\.\.\): no power; what was scored before"
    ):
        score(scorer=Lengths(1, EveralignError("no power")), shard="2/2")
    assert [numbered_rows(rows) for rows in ([4], [5, 4, 6], [9, 4, 7, 1])] == [
        "row 4", "rows 4 to 6", "4 rows (1, 4, 7, ...)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "0/3"}, "shard: must be I/N, such as 3/8, found '0/3'"),
        ({"shard": "4/3"}, "shard: 4 of 3 parts"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"engine": "spark"}, "engine must be one of local, ray"),
        ({"engine": "ray", "shard": "1/2"}, "shard: Ray shares the rows"),
        ({"workers": 2}, "workers: is for --engine ray"),
        ({"gpus_per_worker": 1.0}, "gpus-per-worker: is for --engine ray"),
        ({"output": "out.csv"}, "out.csv: the output's name must end in .jsonl or .parquet"),
        ({"output": "rows.jsonl"}, "rows.jsonl exists"),
        ({"output": "nowhere://out.jsonl"}, "nowhere://out.jsonl: Protocol not known"),
        ({"source": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"source": "memory://missing.jsonl"}, "memory://missing.jsonl: no such file"),
        ({"source": "missing.jsonl", "shard": "1/2"}, "missing.jsonl: no such file"),
        ({"shard": "50/99", "source": "one.jsonl"}, "one.jsonl: no rows in it"),
        ({"answers": 0}, "batch size: must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message, here):
    write_rows(here / "one.jsonl", items(1))
    with pytest.raises(InputError, match=message):
        score(**options)


# ---- parts ----


def written(kind, count):
    """A file of rows, of which those of JSON Lines have blank lines and multi-byte characters between."""
    rows = [{"prompt": f"é{i}" * (1 + i % 5), "completions": ["a"]} for i in range(count)]
    path = Path(f"parts.{kind}")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif kind == "csv":
        path.write_text("prompt,completions\n" + "".join(f'{row["prompt"]},"[""a""]"\n' for row in rows))
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" * (i % 3 == 0) + "\n" for i, row in enumerate(rows))
        path.write_bytes(gzip.compress(text.encode()) if kind == "jsonl.gz" else text.removesuffix("\n").encode())
    return str(path), [row["prompt"] for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz", "csv"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_parts_hold_every_row_once_and_in_order(kind, count, here):
    path, prompts = written(kind, count)
    whole = list(raw_rows(path, "train", UNSCORED_SCHEMA))
    assert [row["prompt"] for _, row in whole] == prompts
    for parts in (1, 2, 3, 7, 100):
        found = [
            list(raw_rows(path, "train", UNSCORED_SCHEMA, part)) for part in cut(path, "train", UNSCORED_SCHEMA, parts)
        ]
        assert len(found) == parts
        # The same places too: an error in a part names the line of the file.
        assert [row for part in found for row in part] == whole
        if kind != "jsonl":
            assert max(map(len, found)) - min(map(len, found)) <= 1


def test_shards_are_joined_to_what_one_job_writes(here):
    score()
    names = [score(shard=f"{i}/3").output for i in (3, 1, 2)]
    assert sorted(names) == [f"out-0000{i}-of-00003.jsonl" for i in (1, 2, 3)]
    join_files(sorted(names), "joined.jsonl")
    assert Path("joined.jsonl").read_bytes() == Path("out.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"joined\.jsonl exists"):
        join_files(sorted(names), "joined.jsonl")
    with pytest.raises(InputError, match=r"out-4\.jsonl: no such file; finish this part first"):
        join_files([*names, "out-4.jsonl"], "all.jsonl")
    with pytest.raises(InputError, match="of another kind"):
        join_files(names, "all.parquet")


def test_a_bad_row_of_a_shard_has_the_line_of_the_file(here):
    write_rows(here / "rows.jsonl", [*items(30), "", {"prompt": "q"}, *items(3)])
    with pytest.raises(InputError, match=r"rows.jsonl:32: field 'completions'"):
        score(shard="4/4")


# ---- files ----


def test_parquet_holds_what_json_lines_hold(here):
    chat = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "now", "description": "the time", "parameters": {}}}]
    rows = [*items(20), {"prompt": chat, "completions": ["a", "bb"], "weight": 2.0, "tools": tools}]
    write_rows(here / "rows.jsonl", rows)
    score()
    score(output="out.parquet")
    assert load_scored("out.parquet").fingerprint == load_scored("out.jsonl").fingerprint
    assert pq.ParquetFile("out.parquet").num_row_groups == 3
    score(output="out.parquet", shard="1/2")
    score(output="out.parquet", shard="2/2")
    join_files(["out-00001-of-00002.parquet", "out-00002-of-00002.parquet"], "joined.parquet")
    assert load_scored("joined.parquet").fingerprint == load_scored("out.jsonl").fingerprint
    # Scored anew from Parquet.
    pq.write_table(pq.read_table("out.parquet").drop(["rewards"]), "again.parquet")
    score("again.parquet", "again.jsonl")
    assert load_scored("again.jsonl").fingerprint == load_scored("out.jsonl").fingerprint
    call = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "now"}}]}]
    write_rows(here / "calls.jsonl", [{"prompt": chat, "completions": [call], "tools": tools}])
    with pytest.raises(InputError, match="completions: a Parquet output holds answers of plain text"):
        score("calls.jsonl", "calls.parquet")


def test_files_at_urls_are_read_and_written(here):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/rows.jsonl", Path("rows.jsonl").read_bytes())
    score()
    with pytest.raises(KeyboardInterrupt):
        score("memory://bucket/rows.jsonl", "memory://bucket/out.jsonl", Lengths(9))
    assert not memory.exists("/bucket/out.jsonl")
    assert score("memory://bucket/rows.jsonl", "memory://bucket/out.jsonl").resumed == 16
    assert memory.cat("/bucket/out.jsonl") == Path("out.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"memory://bucket/out\.jsonl exists"):
        score("memory://bucket/rows.jsonl", "memory://bucket/out.jsonl")
    names = [score("memory://bucket/rows.jsonl", "memory://bucket/p.parquet", shard=f"{i}/2").output for i in (1, 2)]
    join_files(names, "memory://bucket/joined.parquet", overwrite=True)
    memory.get("/bucket/joined.parquet", "joined.parquet")
    assert rewards("joined.parquet") == EXPECTED
    assert sorted(path.name for path in here.iterdir()) == ["joined.parquet", "out.jsonl", "rows.jsonl"]


def test_a_file_system_that_fails_is_named(here, monkeypatch):
    def full(self, *_, **__):
        raise OSError("quota exceeded")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", full)
    with pytest.raises(EveralignError, match=r"memory://bucket/full\.jsonl: cannot be written: quota exceeded"):
        score(output="memory://bucket/full.jsonl")
    monkeypatch.undo()


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_a_full_disk_is_said_and_the_same_command_goes_on(output, here, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("everalign.bulk.files.json_line", full)
    monkeypatch.setattr("everalign.bulk.files.ParquetRows.write", full)
    with pytest.raises(EveralignError, match=rf"{output}: cannot be written \(No space left .*: the disk is full"):
        score(output=output)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert score(output=output).resumed == 10
    assert rewards(output) == EXPECTED
    assert sorted(path.name for path in here.iterdir()) == sorted([output, "rows.jsonl"])


# ---- progress ----


def test_progress_says_how_fast(here, monkeypatch):
    clock, seen = iter(range(1000)), []
    monkeypatch.setattr(jobs.time, "monotonic", lambda: float(next(clock)))
    work, options = partial(ScoringWork, Lengths(), 20), BulkOptions(window=25)
    run_bulk(stream(), work, "out.jsonl", ScoringWork.words, options=options, progress=lambda *step: seen.append(step))
    assert [step[:3] for step in seen] == [("scoring", done, 50) for done in (10, 20, 25, 35, 45, 50)]
    assert all(re.fullmatch(r"rows, \d+\.\d rows/s", step[3]) for step in seen)


# ---- the command line ----


def test_the_verbs_take_shards_parquet_and_bad_rows(here, capsys):
    (here / "lengths_of_bulk.py").write_text("def f(prompts, completions):\n    return [len(c) for c in completions]\n")
    write_rows(here / "rows.jsonl", [*items(8), {"prompt": "q", "completions": []}])
    arguments = ["reward", "score", "--model", "lengths_of_bulk:f", "--data", "rows.jsonl", "--output", "out.parquet"]
    code, _, err = run(capsys, *arguments)
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: rows.jsonl:9: field 'completions': the list is empty; give at least one completion or remove the row",
    )
    for i in (1, 2):
        code, out, err = run(capsys, *arguments, "--skip-bad-rows", "--shard", f"{i}/2", "--window", "3", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert (found["output"], found["skipped"]) == (f"out-0000{i}-of-00002.parquet", i - 1)
    assert "rows.jsonl: 1 bad rows left out; the first: rows.jsonl:9" in err
    assert run(capsys, *arguments, "--shard", "3/2")[0] == 2
    assert run(capsys, *arguments, "--workers", "2")[0] == 2


# ---- corrections ----


class Shouting:
    """Corrects answers into capitals, keeps those with a 7, and fails at its call number `fails`."""

    fingerprint = "shouting"

    def __init__(self, fails=0):
        self.calls, self._fails = 0, fails

    def correct_batch(self, pairs, options):
        self.calls += 1
        if self.calls == self._fails:
            raise EveralignError("hoarse")
        return [
            Corrected(answer, False, "gate") if "7" in answer else Corrected(answer.upper(), True, None, 1, 0, 0, 3)
            for _, answer in pairs
        ]


def test_answers_are_corrected_in_windows_and_counted(here):
    rows = [{"question": f"q{i}", "answer": "no " * (1 + i % 4) + f"{i}"} for i in range(30)]
    write_rows(here / "answers.jsonl", rows)
    answers = RowStream("answers.jsonl", UNCORRECTED)

    def correct(output, corrector):
        work, options = partial(CorrectionWork, corrector, None, 4), BulkOptions(window=8)
        return run_bulk(answers, work, output, CorrectionWork.words, options=options)

    with pytest.raises(EveralignError, match=r"^4 rows \(11, 12, 15, \.\.\.\): hoarse; what was corrected before"):
        correct("out.jsonl", Shouting(3))
    done = correct("out.jsonl", Shouting())
    assert (done.rows, done.resumed) == (30, 8)
    assert done.totals == {
        "changed": 27, "kept gate": 3, "forward_passes": 27, "accepted_draft_tokens": 0, "rejected_draft_tokens": 0,
        "output_tokens": 81, "written": 60,
    }  # fmt: skip
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("question", "answer")} for row in found] == rows
    kept = [row for row in found if row["reason"] == "gate"]
    assert [row["correction"] for row in kept] == [row["answer"] for row in rows if "7" in row["answer"]]
    correct("out.parquet", Shouting())
    columns = ["question", "answer", "correction", "changed", "reason"]
    assert pq.read_table("out.parquet", columns=columns).to_pylist() == found
    rows = CorrectionSet.of([{"question": "q", "answer": "a"}])
    assert CorrectionWork(Shouting()).facts == journal_facts(Shouting(), CorrectionOptions(), rows)[:2]


# ---- Ray ----


def test_without_ray_its_absence_is_said(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        InputError, match=r"--engine ray needs Ray Data, which is not installed: pip install 'everalign\[ray"
    ):
        score(engine="ray")


def make_lengths():
    return ScoringWork(Lengths(), 4)


def test_a_partition_is_begun_again_only_so_often(here, monkeypatch):
    """What a worker does, called here: finished partitions are kept, one that kills its process is given up."""
    from everalign.bulk.run import _Job, _Worker

    Path("out.jsonl.parts").mkdir()
    job = _Job(OutputFile(os.path.abspath("out.jsonl")), 2, ScoringWork.words, 10, make_lengths, os.getcwd())
    part = stream().parts(2)[1]
    task = (part, part.check(), None)

    def do(task):
        (result,) = _Worker(job)({"number": [1], "task": [pickle.dumps(task)]})["result"]
        return pickle.loads(result)

    done = do(task)
    assert done["rows"] == part.check().rows
    assert done["output"].endswith(".jsonl")
    kept = do((*task[:2], done))
    assert kept == {**done, "resumed": done["rows"]}
    Path(done["output"]).rename("moved.jsonl")
    attempts = Path(f"{done['output']}.attempts")
    attempts.write_text("x" * 6)
    assert "has lost its worker 6 times" in str(do(task))
    attempts.unlink()
    assert do((*task[:2], done)) == done
    assert Path(done["output"]).read_bytes() == Path("moved.jsonl").read_bytes()
    Path("out.jsonl.parts").rename("elsewhere")
    assert "all machines need a file system in common" in str(do(task))


def test_a_worker_writes_partitions_at_urls(here):
    from everalign.bulk.run import _Job, _Worker

    job = _Job(OutputFile("memory://bucket/all.jsonl"), 2, ScoringWork.words, 10, make_lengths, os.getcwd())
    tasks = [(part, part.check(), None) for part in stream().parts(2)]
    batch = {"number": [0, 1], "task": [pickle.dumps(task) for task in tasks]}
    done = [pickle.loads(result) for result in _Worker(job)(batch)["result"]]
    assert all(one["output"].startswith("memory://bucket/all.jsonl.parts/0000") for one in done)
    join_files([one["output"] for one in done], "all.jsonl")
    assert rewards("all.jsonl") == EXPECTED
    assert sorted(path.name for path in here.iterdir()) == ["all.jsonl", "rows.jsonl"]


MOODY = """
import os


def lengths(prompts, completions):
    # The first worker that comes here dies, and with it the second partition's first attempt.
    if "killed" not in os.listdir() and any(prompt.startswith("q00012") for prompt in prompts):
        open("killed", "w").close()
        os.kill(os.getpid(), 9)
    if "refuse" in os.listdir():
        raise ValueError("refused")
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_ray_workers_write_every_row_once_though_one_is_killed(here, capsys, monkeypatch):
    """Killed worker, failing function, resumed command: Ray takes long to start, so one test tries all."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'everalign[ray]'")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr("sys.path", list(sys.path))
    (here / "moody_for_bulk.py").write_text(MOODY)
    (here / "refuse").touch()
    arguments = [
        "reward",
        "score",
        "--model",
        "moody_for_bulk:lengths",
        "--data",
        "rows.jsonl",
        "--output",
        "out.jsonl",
    ]
    arguments += [
        "--engine",
        "ray",
        "--workers",
        "2",
        "--partitions",
        "5",
        "--batch-size",
        "4",
        "--window",
        "6",
        "--json",
    ]
    code, _, err = run(capsys, *arguments)
    assert code == 1, err
    assert "of 5: " in err.splitlines()[-1]
    assert "the function raised ValueError: refused; what was scored before is kept" in err.splitlines()[-1]
    assert not Path("out.jsonl").exists()
    (here / "refuse").unlink()
    (here / "killed").unlink(missing_ok=True)
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert Path("killed").exists()
    assert (json.loads(out)["rows"], json.loads(out)["answers"]) == (50, 100)
    assert rewards() == EXPECTED
    assert sorted(path.name for path in here.iterdir() if path.name.startswith("out")) == ["out.jsonl"]
    write_rows(here / "rows.jsonl", [*items(30), {"prompt": "q"}, *items(3)])
    code, _, err = run(capsys, *arguments, "--overwrite")
    assert (code, "rows.jsonl:31: field 'completions'" in err.splitlines()[-1]) == (2, True), err
