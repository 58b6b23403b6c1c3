"""Labels from files to served adapters: `learn --label`, `export --label`, `evaluate`, recipes of `bench`."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cli_for_tests import learn, run, task, write_rows
from everalign.bench.data import load_rows
from everalign.bench.recipe import Bench
from everalign.bench.records import Run
from everalign.bench.worker import results
from everalign.errors import InputError
from everalign.evaluation.answers import HeldOutPrompt
from everalign.learning.answer_evaluation import AnswerSettings, _Runner, evaluate_run
from everalign.learning.recipe import Recipe
from everalign.learning.run_data import load_run
from everalign.learning.self_training import distill
from everalign.methods import LabelledExperts
from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.feedback.loop import learn_from_feedback
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, swapped, task_rows

EXPERTS = ("--method", "experts", "--objective", "dpo")


def with_label(rows, label, column="customer"):
    return [{**row.to_json(), column: label} for row in rows]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two customers in one file, who want the opposite of each other, and more of one of them."""
    folder = tmp_path_factory.mktemp("labels")
    save_model(folder / "model")
    both = [*with_label(task_rows("warm"), "acme"), *with_label(swapped("warm", 10), "globex")]
    tests = [*with_label(held_out("warm"), "acme"), *with_label(held_out("warm", 4), "globex")]
    write_rows(folder / "both.jsonl", both)
    write_rows(folder / "both.test.jsonl", tests)
    write_rows(folder / "more.jsonl", with_label(task_rows("brief"), "acme"))
    write_rows(folder / "more.test.jsonl", with_label(held_out("brief"), "acme"))
    return folder


@pytest.fixture(scope="module")
def learned(workspace, tmp_path_factory):
    """The run of both files, begun with the first and continued with the second."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(workspace, folder, dirs_exist_ok=True)
        patch.chdir(folder)
        from everalign.cli import main

        assert main(learn(*task("both"), *EXPERTS, "--label", "customer")) == 0
        assert main(learn(*task("more"), "--resume")) == 0
    return folder


@pytest.fixture
def work(learned, monkeypatch):
    monkeypatch.chdir(learned)
    return learned


def test_a_file_of_several_labels_is_a_task_for_each(work, capsys):
    found = load_run("run")
    assert [(version.id, version.task, version.manifest.label) for version in found.versions] == [
        ("001-both-acme", "both/acme", "acme"),
        ("002-both-globex", "both/globex", "globex"),
        ("003-more", "more", "acme"),
    ]
    assert found.tasks == ["both/acme", "both/globex", "more"]
    assert [found.zero_shot[name].pairs for name in found.tasks] == [5, 4, 5]
    assert found.versions[0].manifest.train.source == "both.jsonl (acme)"
    code, out, _ = run(capsys, "versions", "run")
    assert code == 0
    assert "more (label acme)" in " ".join(out.split())
    code, out, _ = run(capsys, "versions", "run", "--json")
    assert [version["label"] for version in json.loads(out)["versions"]] == ["acme", "globex", "acme"]


def test_parts_of_a_file_that_were_not_learned_are_learned_on_resume(work, tmp_path, capsys):
    shutil.copytree("run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "versions" / "003-more")
    shutil.rmtree(tmp_path / "run" / "versions" / "002-both-globex")
    (tmp_path / "run" / "current").write_text("001-both-acme\n")
    code, _, err = run(capsys, "learn", "--output", str(tmp_path / "run"), "--resume", "--no-report")
    assert code == 0, err
    assert [version.task for version in load_run(tmp_path / "run").versions] == ["both/acme", "both/globex", "more"]
    for place in range(3):
        assert same_weights(adapter_weights(tmp_path / "run", place), adapter_weights(Path("run"), place))
    code, _, err = run(capsys, "learn", "--output", str(tmp_path / "run"), "--resume", "--no-report")
    assert code == 2
    assert "every task that it was given is learned, or was not promoted" in err


def test_each_label_is_exported_by_its_name(work, tmp_path, capsys):
    code, _, err = run(capsys, "export", "run", str(tmp_path / "out"), "--adapter")
    assert code == 2
    assert "keeps an adapter for each label: name one with label: acme, globex" in " ".join(err.split())
    for label, version in (("acme", "003-more"), ("globex", "002-both-globex")):
        folder = tmp_path / f"{label}-adapter"
        arguments = ("export", "run", str(folder), "--adapter", "--label", label, "--json")
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        shown = json.loads(out)
        assert (shown["version"], shown["label"]) == (version, label)
        assert f"--lora-modules {label}={folder} " in shown["vllm"]
        kept = load_file(f"run/versions/{version}/adapter/adapter_model.safetensors")
        assert same_weights(load_file(folder / "adapter_model.safetensors"), kept)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--label", "costumer", *EXPERTS), "both.jsonl:1: field 'costumer': no such column; rename 'customer'?"),
        (("--label", "chosen", *EXPERTS), "label: 'chosen' is read as a part of every row"),
        (("--label", "customer", "--method", "er"), "the method er would ignore label: leave it out"),
        (("--label", "customer"), "the method lifealign would ignore label"),
        (("--label", "", *EXPERTS), "--label"),
        (("--replay", "0.2", *EXPERTS), "replay means nothing to the method 'experts'"),
        (("--label", "customer", "--from-feedback", "sqlite:///x.db", *EXPERTS), "label: feedback has no labels"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_learned(work, tmp_path, capsys, arguments, problem):
    tasks = [] if "--from-feedback" in arguments else task("both")
    code, _, err = run(capsys, *learn(*tasks, *arguments, "--output", str(tmp_path / "run")))
    assert code == 2
    assert problem in " ".join(err.split())
    assert not (tmp_path / "run" / "versions").exists()


@pytest.mark.parametrize(
    ("train", "test", "problem"),
    [
        (["acme", None], None, "train.jsonl:2: field 'customer': must be text, found null"),
        (["acme", "globex"], ["globex", ""], "test.jsonl:2: field 'customer': is empty"),
        (["acme"], ["globex"], "test.jsonl: has rows of the label 'globex', of which train.jsonl has none"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_learned(
    workspace, tmp_path, monkeypatch, capsys, train, test, problem
):
    monkeypatch.chdir(tmp_path)
    for name, labels, start in (("train", train, 0), ("test", test or ["acme"], 50)):
        rows = task_rows("warm", len(labels), start)
        named = zip(rows, labels, strict=True)
        write_rows(Path(f"{name}.jsonl"), [{**row.to_json(), "customer": label} for row, label in named])
    arguments = learn("--task", "one=train.jsonl,test.jsonl", *EXPERTS, "--label", "customer")
    code, _, err = run(capsys, *arguments, "--model", str(workspace / "model"))
    assert code == 2
    assert problem in " ".join(err.split())
    assert not Path("run/versions").exists()


def test_two_tasks_must_not_get_one_name(work, tmp_path, capsys):
    tasks = [*task("both"), "--task", "both/acme=more.jsonl"]
    code, _, err = run(capsys, *learn(*tasks, *EXPERTS, "--label", "customer", "--output", str(tmp_path / "run")))
    assert code == 2
    assert "two tasks are called 'both/acme' once they are split by label: rename one" in " ".join(err.split())


def test_answers_are_those_of_the_labels_adapter(work):
    found = load_run("run")
    runner = _Runner(found, AnswerSettings(every=True), lambda _: None, lambda *_: None)
    expected = {
        "001-both-acme": {"both/acme": 0, "both/globex": None, "more": 0, "globex": None},
        "002-both-globex": {"both/acme": 0, "both/globex": 1, "more": 0, "acme": 0},
        "003-more": {"both/acme": 2, "both/globex": 1, "more": 2, "globex": 1},
    }
    for version, tasks in expected.items():
        for name, place in tasks.items():
            runner.switch(version, name)
            total = runner.policy.total()
            assert (place is None) == all(update.norm() == 0 for update in total.values())
            if place is not None:
                weights = adapter_weights(Path("run"), place)
                for module, update in total.items():
                    left, right = (weights[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
                    assert (update.dense() - 4 * left @ right).abs().max() < 1e-6  # α / rank is 16 / 4 here
                    break


def test_prompts_of_no_task_are_refused_before_anything_is_written(work):
    found = load_run("run")
    with pytest.raises(InputError, match=r"'other' is none of its tasks and labels.*acme, globex, both/acme"):
        evaluate_run(found, {"other": [HeldOutPrompt("q")]}, AnswerSettings(standard=False))
    assert not Path("run/evaluation").exists()


# ---- where there are no labels ----


def test_feedback_and_rounds_of_self_training_have_no_labels(workspace, tmp_path):
    learner = make_learner(workspace / "model", tmp_path / "run", LabelledExperts())
    with pytest.raises(InputError, match="feedback has no labels, and experts keeps an adapter for each"):
        learn_from_feedback(None, learner)
    with pytest.raises(InputError, match="experts does not go on from round to round"):
        distill(str(workspace / "model"), None, [object()], tmp_path / "other", method=LabelledExperts())


def test_a_gateway_is_told_to_serve_one_label(work, tmp_path):
    shutil.copytree("run", tmp_path / "run")
    facts = json.loads(Path("run/run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "objective": "correction"}))
    with pytest.raises(InputError, match="keeps a corrector for each label: export the one to serve"):
        CorrectorReloader(tmp_path / "run", lambda folder: None)


# ---- bench ----


def bench(folder: Path, **changes) -> Bench:
    tasks = {
        "first": {"train": "both.jsonl", "test": "both.test.jsonl", "where": {"customer": "acme"}},
        "second": {"train": "both.jsonl", "test": "both.test.jsonl", "where": {"customer": "globex"}},
        "third": {"train": "more.jsonl", "test": "more.test.jsonl"},
    }
    content = {
        "models": {"small": "model"},
        "tasks": tasks,
        "seeds": [0],
        "validation_share": 0.3,
        "contenders": {"experts": {"method": "experts", "objective": "dpo"}},
        **changes,
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    found = Bench.read(path)
    found.check_contenders()
    return found


def named(recipe, rows):
    contender = next(iter(recipe.contenders))
    made = recipe.learn_recipe(contender, {}, "small", 0)
    return Run(contender, "small", tuple(recipe.tasks), 0, "test", {}, made, rows).name


def test_a_bench_reads_labels_from_a_column_or_takes_the_tasks_names(work, tmp_path):
    plain, labelled = (load_rows(bench(tmp_path, label=label), "test") for label in (None, "customer"))
    assert all(rows.train.labels == rows.held_out.labels == [] for rows in plain.values())
    assert [rows.train.labels for rows in labelled.values()] == [["acme"], ["globex"], ["acme"]]
    assert [rows.held_out.labels for rows in labelled.values()] == [["acme"], ["globex"], ["acme"]]
    # Labels change what is learned, so they are a part of a run's name.
    recipe = bench(tmp_path)
    assert named(recipe, plain) != named(recipe, labelled)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label": "chosen"}, "label: 'chosen' is read as a part of every row"),
        ({"label": "client"}, "both.jsonl:1: field 'client': no such column"),
        (
            {"label": "customer", "tasks": {"all": {"train": "both.jsonl", "test": "both.test.jsonl"}}},
            r"tasks.all: its rows have several labels in 'customer' \(acme, globex\).*`where: {customer: acme}`",
        ),
        (
            {"label": "customer", "tasks": {"demo": {"train": "demo:careful", "test": "demo:careful"}}},
            "tasks.demo.train: the demo's tasks have no column 'customer': leave label out",
        ),
    ],
)
def test_bad_labels_of_a_bench_are_refused(work, tmp_path, changes, problem):
    with pytest.raises(InputError, match=problem):
        load_rows(bench(tmp_path, **changes), "test")


def test_what_a_run_keeps_are_the_adapters_of_all_labels(work):
    size = Path("run/versions/001-both-acme/adapter/adapter_model.safetensors").stat().st_size
    found = results(load_run("run"), resumed=False)
    assert [kept["adapter"] for kept in found["cost"]["kept"]] == [size, 2 * size, 2 * size]
    assert found["regime"] == "sequential"


def test_a_recipe_file_names_the_column(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: tiny\noutput: run\nmethod: experts\nlabel: customer\n")
    recipe = Recipe.read(tmp_path / "recipe.yaml")
    assert recipe.label == "customer"
    assert recipe.learner_arguments(needs_tasks=False)["method"].name == "experts"
    assert recipe.complete()["label"] == "customer"
