"""`everalign bench`: a recipe of two contenders on a random model, tuned, rehearsed, tested, continued."""

import json
import os
from pathlib import Path

import pytest
import yaml

from cli_for_tests import run, write_rows
from everalign.bench import execution, worker
from everalign.bench.data import cut_validation, load_rows
from everalign.bench.recipe import Bench
from everalign.data import PreferenceSet
from everalign.errors import InputError
from learner_for_tests import ANSWERS, held_out, save_model, task_rows

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = {"batch_size": 4, "tokens_per_batch": 240, "max_length": 64, "warmup": 0.0, "learning_rate": 0.02}


def recipe(folder: Path, **changes) -> Path:
    content = {
        "models": {"small": "model"},
        "tasks": {
            name: {"train": f"{name}.jsonl.gz" if name == "warm" else f"{name}.jsonl", "test": f"{name}.test.jsonl"}
            for name in ("warm", "brief")
        },
        "orders": 1,
        "seeds": [0],
        "training": TRAINING,
        "adapter": {"rank": 4, "targets": "q_proj,v_proj"},
        "baseline": "seq",
        "validation_share": 0.3,
        "contenders": {
            "seq": {"method": "seqft", "objective": "dpo", "tune": {"learning_rate": [0.01, 0.02]}},
            "er": {
                "method": {"name": "er", "replay": 0.5},
                "objective": "dpo",
                "tune": {"learning_rate": [0.01, 0.02]},
            },
        },
        **changes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import gzip

    folder = tmp_path_factory.mktemp("bench")
    save_model(folder / "model")
    for name in ANSWERS:
        write_rows(folder / f"{name}.jsonl", task_rows(name))
        write_rows(folder / f"{name}.test.jsonl", held_out(name))
    with gzip.open(folder / "warm.jsonl.gz", "wb") as file:
        file.write((folder / "warm.jsonl").read_bytes())
    return folder


@pytest.fixture
def work(files, monkeypatch):
    monkeypatch.chdir(files)
    # This process has loaded the libraries, and no threads.
    monkeypatch.setattr(execution, "START", "fork")
    return files


def scored(rows, more=()):
    """Three answers to each prompt, of which the chosen one has the highest reward."""
    return [
        {"prompt": row.prompt, "completions": [row.chosen, row.rejected, "?"], "rewards": [1.0, -1.0, 0.0]}
        for row in [*rows, *more]
    ]


def test_contenders_learn_from_rewards_beside_others_that_learn_from_pairs(capsys, work, tmp_path):
    for name in ANSWERS:
        write_rows(work / f"{name}.scored.jsonl", scored(task_rows(name)[1:], held_out(name)))
    tasks = {
        name: {"train": f"{name}.jsonl", "test": f"{name}.test.jsonl", "scored": {"answers": f"{name}.scored.jsonl"}}
        for name in ("warm", "brief")
    }
    var = {"objective": "var", "scored": "answers", "weighting": {"temperature": 0.5}}
    contenders = {
        "dpo": {"method": {"name": "er", "replay": 1.0}, "objective": "dpo"},
        "var": {"method": {"name": "er", "replay": 1.0}, **var},
        "lifealign-var": {"method": "lifealign", **var},
        "snkl": {"method": "er", "objective": "snkl", "scored": "answers"},
    }
    path, out = str(recipe(work, tasks=tasks, contenders=contenders, baseline="dpo")), tmp_path / "out"
    code, printed, err = run(capsys, "bench", path, "--output", str(out), "--json", "--keep-runs")
    assert code == 0, err
    assert "prompts that are learned as pairs have no scored row" in err
    found = json.loads(printed)["models"][0]["contenders"]
    # All are scored on the same held-out pairs.
    assert {one["paired"] for name, one in found.items() if name != "dpo"} == {1}
    assert all(one["numbers"]["reward_accuracy"]["last"]["mean"] is not None for one in found.values())

    learned = load_rows(Bench.read(Path(path)), "test")["warm"]
    prompts = {row.prompt for row in learned.train}
    assert {row.prompt for row in learned.scored["answers"]} < prompts
    # Replay carries each answer's weight: exp(reward / temperature / deviation), its mean over the prompt's answers 1.
    (kept,) = (out / "runs").glob("var.*/versions/001-*/replay.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {row.prompt for row in learned.scored["answers"]}
    for row in rows:
        assert sum(row["weights"]) == pytest.approx(3)
        assert sorted(row["weights"], reverse=True)[0] == row["weights"][0]


def test_tuned_on_validation_rows_then_tested_once(capsys, work, tmp_path):
    path, out = str(recipe(work)), tmp_path / "out"
    arguments = ("bench", path, "--output", str(out))

    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "no settings are chosen yet: run the same command with --tune first" in err

    code, printed, err = run(capsys, *arguments, "--tune", "--json")
    assert code == 0, err
    chosen = json.loads((out / "chosen.json").read_text())
    assert set(chosen["chosen"]["small"]) == {"seq", "er"}
    for name, trials in chosen["trials"]["small"].items():
        best = max(trials, key=lambda trial: trial["score"])
        assert chosen["chosen"]["small"][name] == best["choice"]
    assert json.loads(printed)["chosen"] == chosen["chosen"]
    assert not (out / "tested.json").exists()
    assert not list((out / "runs").iterdir())

    code, printed, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert found["part"] == "test"
    er = found["models"][0]["contenders"]["er"]
    assert er["runs"] == er["paired"] == 1
    last = er["numbers"]["accuracy"]["last"]
    seq = found["models"][0]["contenders"]["seq"]["numbers"]["accuracy"]["last"]
    assert last["difference"]["value"] == pytest.approx(last["mean"] - seq["mean"])
    assert last["low"] <= last["mean"] <= last["high"]
    assert er["costs"]["buffer"] > 0
    assert er["costs"]["processor_seconds"] > 0
    assert "<svg" in (out / "test.html").read_text()

    records = sorted((out / "records").iterdir())
    stamps = [record.stat().st_mtime_ns for record in records]
    code, printed, err = run(capsys, *arguments)
    assert code == 0, err
    # It is the same test, of which nothing was scored anew.
    assert "test rows were first scored on" not in printed
    assert json.loads((out / "tested.json").read_text())["again"] == []
    assert "2 of 2 runs are finished already" in err
    assert [record.stat().st_mtime_ns for record in records] == stamps


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_project_can_be_made(path, monkeypatch):
    # Where recipes of real tasks find data that is no part of the project; nothing is read here.
    monkeypatch.setenv("EVERALIGN_BENCH_DATA", "data")
    bench = Bench.read(path)
    bench.check_contenders()
    assert all(len(order) == len(bench.tasks) for order in bench.task_orders())


def questions(*numbers):
    return PreferenceSet.of(
        [{"prompt": f"q{number}", "chosen": f"a{i}", "rejected": "b"} for number in numbers for i in range(3)]
    )


def test_validation_rows_are_cut_by_prompt():
    """Also over tasks: what is validated in one is not learned in another."""
    sides = [cut_validation(questions(*numbers), 0.25, 1) for numbers in (range(200), range(100, 300))]
    for kept, cut in sides:
        assert len(kept) + len(cut) == 600
        assert 90 < len(cut) < 210
    for kept, _ in sides:
        for _, cut in sides:
            assert not {row.prompt for row in kept} & {row.prompt for row in cut}
    assert cut_validation(questions(*range(200)), 0.25, 2)[1].fingerprint != sides[0][1].fingerprint
    assert [len(side) for side in cut_validation(questions(1, 2), 0.01, 0)] == [3, 3]
    assert [len(side) for side in cut_validation(questions(1, 2), 0.99, 0)] == [3, 3]
    with pytest.raises(InputError, match="has too few prompts to cut validation rows off: name a validation file"):
        cut_validation(questions(1), 0.5, 0)


def test_rows_are_filtered_and_labelled(work, tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "domain": "ab"[i % 2], "weight": 1.0} for i in range(40)
    ]
    rows[0]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q0"}]
    file = str(write_rows(tmp_path / "rows.jsonl", [{**row, "nobody": 1} for row in rows]))
    test = str(write_rows(tmp_path / "test.jsonl", [{**rows[2], "prompt": "q"}]))
    task = {"train": file, "test": test, "where": {"domain": ["a"]}, "limit": 10, "system": "[a]"}
    said: list[str] = []
    found = load_rows(Bench.read(recipe(work, tasks={"a": task, "b": task})), "validation", said.append)["a"]
    assert said == [f"note: {file}: columns that are not read: nobody"]
    assert len(found.train) == 10
    first = [row.prompt[0] for row in (*found.train, *found.held_out)]
    assert {message["role"] for message in first} == {"system"}
    assert {message["content"] for message in first} <= {"[a]", "[a]\n\nBe brief."}
    numbers = {int(row.prompt[1]["content"][1:]) for row in (*found.train, *found.held_out)}
    assert all(number % 2 == 0 for number in numbers)


def test_orders_are_seeded_and_different(work):
    bench = Bench.read(recipe(work, orders=2))
    assert bench.task_orders() == [("warm", "brief"), ("brief", "warm")]
    assert bench.task_orders(tuning=True) == [("warm", "brief")]


def test_settings_of_another_recipe_are_refused(capsys, work, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    facts = {"format": 1, "recipe": "0" * 16, "code": "", "created": "", "tune_on": [], "chosen": {}, "trials": {}}
    (out / "chosen.json").write_text(json.dumps(facts))
    code, _, err = run(capsys, "bench", str(recipe(work)), "--output", str(out))
    assert code == 2
    assert "was chosen for another recipe (0000000000000000, and this is " in err


def numbers(folder: Path):
    """What the records of a bench say of scores and pairs, without times."""
    found = {}
    for path in (folder / "records").iterdir():
        record = json.loads(path.read_text())
        found[path.name] = {key: record[key] for key in ("scores", "pairs", "choice", "order", "tasks")}
    return found


def test_runs_do_not_depend_on_those_beside_them_nor_on_a_kill(capsys, work, tmp_path, monkeypatch):
    path = str(recipe(work, seeds=[3], contenders={"er": {"method": "er"}, "seq": {"method": "seqft"}}))
    code, _, err = run(capsys, "bench", path, "--output", str(tmp_path / "two"), "--validation", "--jobs", "2")
    assert code == 0, err

    assert not (tmp_path / "two" / "tested.json").exists()

    learn, calls = worker.Learner._learn, []

    def killed_in_the_second_task(learner, *arguments):
        calls.append(learner)
        if len(calls) == 2:
            os._exit(9)
        return learn(learner, *arguments)

    one = ("bench", path, "--output", str(tmp_path / "one"), "--validation")
    with monkeypatch.context() as patched:
        patched.setattr(worker.Learner, "_learn", killed_in_the_second_task)
        code, _, err = run(capsys, *one)
        assert code == 1
        assert "er on small, seed 3: its process ended with code 9" in err
    assert not (tmp_path / "one" / "records").exists()
    code, _, err = run(capsys, *one)
    assert code == 0, err
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    resumed = {
        record["contender"]: record["cost"]["resumed"]
        for record in (json.loads(file.read_text()) for file in (tmp_path / "one" / "records").iterdir())
    }
    assert resumed == {"er": True, "seq": False}

    code, printed, err = run(capsys, *one, "--without", "brief", "--json")
    assert code == 0, err
    found = json.loads(printed)["models"][0]["contenders"]["seq"]
    assert list(found["tasks"]["accuracy"]) == ["warm"]
    assert found["numbers"]["accuracy"]["last"]["mean"] == found["tasks"]["accuracy"]["warm"]
    assert (tmp_path / "one" / "validation.without-brief.html").exists()


def test_training_that_diverges_is_a_result(capsys, work, tmp_path):
    """A trial that failed is not chosen; a run that failed is named, and missing from the numbers."""
    grid = {"learning_rate": [0.01, 1e30]}
    contenders = {"seq": {"method": "seqft", "objective": "dpo", "tune": grid}}
    path, out = str(recipe(work, contenders=contenders)), tmp_path / "out"
    code, printed, err = run(capsys, "bench", path, "--output", str(out), "--tune")
    assert code == 0, err
    assert "failed" in printed
    assert json.loads((out / "chosen.json").read_text())["chosen"]["small"]["seq"] == {"learning_rate": 0.01}
    contenders = {"seq": {"method": "seqft", "objective": "dpo", "training": {"learning_rate": 1e30}}}
    path = str(recipe(work, contenders={**contenders, "er": {"method": "er"}}))
    code, printed, err = run(capsys, "bench", path, "--output", str(out), "--validation")
    assert code == 1
    assert "1 runs failed, the first: seq on small, seed 0, warm > brief: " in err
    assert "lower the learning rate" in err
    assert "without seq, of which no run is finished" in printed


BAD = [
    ({"baseline": "erx"}, "baseline: unknown contender 'erx': did you mean 'er'?"),
    ({"seeds": [1, 1]}, "seeds: the seed 1 is given twice"),
    ({"orders": 3}, "orders: 2 tasks have 2 orders, not 3"),
    ({"orders": [["warm"]]}, "must name every task once: warm, brief"),
    ({"tune_on": ["acuracy.last"]}, "unknown measure 'acuracy.last': did you mean 'accuracy.last'?"),
    ({"training": {**TRAINING, "test_limit": 3}}, "training: test_limit stands outside"),
    ({"modles": ["x"]}, "modles is not an option of Bench: did you mean 'models'?"),
    ({"models": []}, "models: must be a list of models, or a mapping"),
    (
        {
            "baseline": None,
            "contenders": {
                "a": {"method": "er", "tune": {"learning_rate": [1.0]}},
                "b": {"method": "er"},
                "c": {"method": "er", "tune": {"replay": [0.1, 0.2]}},
            },
        },
        "contenders: every one must have equally many trials, found a 1, b 1, c 2",
    ),
    ({"contenders": {"seq": {"method": "er", "tune": {"repaly": [1]}}}}, "'repaly': did you mean 'replay'?"),
    ({"contenders": {"seq": {"method": "er", "tune": {"replay": 1}}}}, "replay needs a list of values to try, found 1"),
    ({"contenders": {"seq": {"method": "er", "objectiv": "dpo"}}}, "seq.objectiv is not an option of Contender"),
    ({"contenders": {"seq": {"method": "er", "objective": "correction"}}}, "a bench learns from preferences"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_recipe_is_refused_with_its_line(capsys, work, tmp_path, changes, message):
    code, _, err = run(capsys, "bench", str(recipe(work, **changes)), "--output", str(tmp_path / "out"))
    assert code == 2
    assert message in err
    assert "bench.yaml:" in err


REFUSED = [
    (
        {"seq": {"method": "er", "objective": "dpo", "tune": {"replay": [0.1, 2.0]}}},
        "replay must be a number from 0 to",
    ),
    (
        {"seq": {"method": "seqft", "tune": {"replay": [0.1, 0.2]}}},
        "contenders.seq: replay means nothing to the method",
    ),
    ({"seq": {"method": "noop"}}, "contenders.seq: unknown method 'noop'"),
    ({"seq": {"method": {"name": "lifealign", "gamma": 1.0}, "objective": "dpo"}}, "the objective 'dpo' would ignore"),
    ({"seq": {"method": "er", "objective": "sft", "training": {"beta": 0.1}}}, "would ignore beta"),
]


@pytest.mark.parametrize(("contenders", "message"), REFUSED)
def test_contenders_are_checked_before_anything_is_learned(capsys, work, tmp_path, contenders, message):
    path = str(recipe(work, contenders=contenders))
    code, _, err = run(capsys, "bench", path, "--output", str(tmp_path / "out"), "--tune")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / "records").exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"train": "nothing.jsonl", "test": "warm.test.jsonl"}, "tasks.warm.train: nothing.jsonl: no such file"),
        ({"train": "$NOWHERE/warm.jsonl", "test": "warm.test.jsonl"}, "the environment variable $NOWHERE is not set"),
        ({"train": "demo:x", "test": "warm.test.jsonl"}, "is no task of the demo, which has courteous-kitchen"),
        (
            {"train": "warm.jsonl", "test": "warm.test.jsonl", "where": {"domain": "a"}},
            "warm.jsonl:1: field 'domain': no such column, which `where` asks for",
        ),
        (
            {"train": "warm.jsonl", "validation": "warm.jsonl", "test": "warm.test.jsonl"},
            "tasks.warm.validation: 10 of 10 rows have a prompt that is trained on",
        ),
        ({"train": "warm.jsonl", "test": "half.jsonl"}, "half.jsonl:1: field 'rejected': no such column"),
        (
            {"train": "warm.jsonl", "test": "warm.test.jsonl", "where": {"rejected": "maybe"}},
            'where {"rejected": "maybe"}: no row is left',
        ),
    ],
)
def test_bad_files_are_refused_before_anything_is_learned(capsys, work, tmp_path, task, message):
    (work / "half.jsonl").write_text('{"prompt": "q?", "chosen": "a"}\n')
    path = str(recipe(work, tasks={"warm": task}))
    code, _, err = run(capsys, "bench", path, "--output", str(tmp_path / "out"), "--tune")
    assert code == 2
    assert message in err
