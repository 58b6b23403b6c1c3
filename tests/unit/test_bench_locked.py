"""What a bench locks: choices of the same recipe, rows and models; one test for one recipe; records of one model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from everalign.bench import locked, phases
from everalign.bench.data import load_rows
from everalign.bench.execution import Settings
from everalign.bench.locked import ChosenFile, check_chosen, content_of, data_facts, merged, read_chosen, touch
from everalign.bench.recipe import Bench
from everalign.bench.records import Record, Records, plan
from everalign.errors import InputError
from everalign.storage import write_json

TOLD = {"method": "none", "tune": {"system": ["Be brief.", "Be kind."]}}


def bench(folder: Path, **changes) -> Bench:
    content = {
        "models": {"m": "tiny"},
        "tasks": {"a": {"train": "demo:careful", "test": "demo:careful", "limit": 4}},
        "seeds": [0],
        "contenders": {"told": TOLD, "other": TOLD},
        **changes,
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(content))
    return Bench.read(path)


def chosen(found: Bench, **changes) -> ChosenFile:
    values = {
        "format": 1,
        "recipe": found.digest,
        "created": "",
        "tune_on": [],
        "chosen": {"m": {"told": {"system": "Be kind."}}},
        "trials": {"m": {"told": []}},
        "codes": {"m": {"told": ["now"]}},
        "data": {"a": {"training": "1", "validation": "2"}},
        "models": {"m": "3"},
    }
    return ChosenFile.model_validate({**values, **changes})


@pytest.fixture
def code(monkeypatch):
    """The version of the code, which a test may change."""
    now = SimpleNamespace(value="now")
    monkeypatch.setattr(locked, "code_digest", lambda: now.value)
    return now


def test_a_test_is_one_recipe_with_one_version_of_the_code(tmp_path, code):
    found = bench(tmp_path)

    def again():
        return len(json.loads((tmp_path / "tested.json").read_text())["again"])

    assert touch(found, tmp_path, True) == []
    # Resumed, then repeated when all is finished.
    assert touch(found, tmp_path, True) == touch(found, tmp_path, False) == []
    code.value = "later"
    # Only a report is made anew.
    assert touch(found, tmp_path, False) == []
    assert again() == 0
    (note,) = touch(found, tmp_path, True)
    assert note.endswith("this is test 2 in this folder")
    assert touch(found, tmp_path, True) == [note]
    assert again() == 1
    other = bench(tmp_path, seeds=[1])
    (note,) = touch(other, tmp_path, False)
    assert f"with another recipe ({found.digest})" in note
    assert note.endswith("none is scored anew")
    assert touch(other, tmp_path, True)[0].endswith("this is test 3 in this folder")


def test_settings_that_were_chosen_from_other_rows_or_models_are_refused(tmp_path, code):
    file, path = chosen(bench(tmp_path)), tmp_path / "chosen.json"
    rows = {"a": SimpleNamespace(train=SimpleNamespace(fingerprint="1"), validation="2", scored={})}
    assert check_chosen(path, file, rows, {"m": "3"}, []) == []
    # What is not known cannot differ.
    assert check_chosen(path, file, rows, {"m": None}, []) == []
    with pytest.raises(InputError, match="was chosen with other files of the model m: run the same command with"):
        check_chosen(path, file, rows, {"m": "4"}, [])
    rows["a"].validation = "5"
    with pytest.raises(InputError, match="was chosen with other validation rows of a: run the same command with --tun"):
        check_chosen(path, file, rows, {"m": "3"}, [])


def test_settings_that_were_chosen_from_other_rewards_are_refused(tmp_path, code):
    task = {"train": "demo:careful", "test": "demo:careful", "limit": 4}
    pairs = load_rows(bench(tmp_path), "test")["a"].train
    var = {"method": "er", "objective": "var", "scored": "answers"}
    found = bench(
        tmp_path,
        tasks={"a": {**task, "scored": {"answers": str(tmp_path / "scored.jsonl")}}},
        contenders={"x": {**var, "tune": {"learning_rate": [1e-3, 2e-3]}}},
    )

    def facts(worst: float) -> dict:
        rows = [
            {"prompt": row.prompt, "completions": [row.chosen, row.rejected], "rewards": [1, worst]} for row in pairs
        ]
        (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_rows(found, "test")

    file = chosen(found, data=data_facts(facts(0.0)))
    assert check_chosen(tmp_path, file, facts(0.0), {"m": "3"}, ["told"]) == []
    with pytest.raises(InputError, match=r"was chosen with other scored \(answers\) rows of a"):
        check_chosen(tmp_path, file, facts(-1.0), {"m": "3"}, ["told"])


def test_the_code_of_chosen_settings_is_that_of_their_trials(tmp_path, code):
    codes = {"m": {"told": ["now"], "other": ["before", "now"]}}
    file, path = chosen(bench(tmp_path), codes=codes, data={}), tmp_path / "chosen.json"
    (note,) = check_chosen(path, file, {}, {}, [])
    assert note == "settings chosen by trials of another version of the code: other"
    assert check_chosen(path, file, {}, {}, ["told"]) == []


def test_only_choices_from_the_same_recipe_rows_and_models_stay(tmp_path):
    found, path = bench(tmp_path), tmp_path / "chosen.json"
    new = chosen(found, chosen={"m": {"other": {}}}, trials={"m": {"other": []}}, codes={"m": {"other": ["now"]}})
    write_json(path, chosen(found).model_dump())
    both = merged(path, new)
    assert both.chosen == {"m": {"told": {"system": "Be kind."}, "other": {}}}
    assert set(both.codes["m"]) == set(both.trials["m"]) == {"told", "other"}
    assert merged(path, chosen(found, chosen={"m": {}})).chosen == {"m": {}}  # tried anew, and nothing is chosen
    for changes in ({"recipe": "0"}, {"data": {"a": {"training": "9", "validation": "2"}}}, {"models": {"m": "9"}}):
        write_json(path, chosen(found, **changes).model_dump())
        assert merged(path, new) == new


def test_nothing_has_to_be_chosen_where_nothing_is_tuned(tmp_path):
    assert read_chosen(bench(tmp_path, contenders={"x": {"method": "none"}}), tmp_path / "chosen.json", []) is None
    with pytest.raises(InputError, match="no settings are chosen yet"):
        read_chosen(bench(tmp_path), tmp_path / "chosen.json", [])


def test_a_model_is_known_by_its_content(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = content_of(str(tmp_path))
    (tmp_path / "README.md").write_text("a card")
    assert content_of(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert content_of(str(tmp_path)) not in (before, None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    on_two = content_of(str(adapter))
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert content_of(str(adapter)) != on_two
    with pytest.raises(InputError, match="there is no model folder"):
        content_of(str(tmp_path / "gone"))


def record(run, **changes) -> dict:
    values = {"format": 1, "contender": run.contender, "model": run.model, "order": run.order, "seed": run.seed}
    values |= {"part": run.part, "choice": run.choice, "code": "c", "created": "", "model_content": run.model_content}
    return Record.model_validate({**values, **changes}).model_dump()


def test_records_of_a_model_that_has_changed_are_not_taken(tmp_path):
    found = bench(tmp_path, contenders={"x": {"method": "none"}})
    rows = load_rows(found, "validation")

    def runs(content):
        return plan(found, "validation", rows, {"m": {"x": {}}}, [], None, {"m": content})

    (run,) = runs("1")
    path = Records(tmp_path).path(run)
    path.parent.mkdir()
    write_json(path, record(run))
    assert Records(tmp_path).check_models(runs("1")) == Records(tmp_path).check_models(runs(None)) == []
    with pytest.raises(InputError, match=r"models\.m: its files are others than those of finished runs, such as "):
        Records(tmp_path).check_models(runs("2"))
    write_json(path, record(run, model_content=None))
    (note,) = Records(tmp_path).check_models(runs("2"))
    assert note.startswith("m: 1 records do not say which files of the model they were made with")


def quiet(*_):
    pass


def test_a_contender_without_a_choice_does_not_cost_the_others_theirs(tmp_path, monkeypatch):
    def make(runs, records, *_):
        for run in runs:
            records.path(run).parent.mkdir(exist_ok=True)
            score = {"zero_shot": [0.5], "matrix": [[0.9 if "kind" in run.choice["system"] else 0.1]]}
            scores = dict.fromkeys(("accuracy", "reward_accuracy"), score)
            failed = {"failed": "nan"} if run.contender == "told" else {}
            write_json(records.path(run), record(run, tasks=["a"], regime="joint", scores=scores, **failed))

    monkeypatch.setattr(phases, "run_all", make)
    found = bench(tmp_path)
    with pytest.raises(InputError, match=r"contenders\.told: no trial on m has a score: nan; what the others chose is"):
        phases.tune(found, Settings(tmp_path), quiet, quiet)
    file = ChosenFile.model_validate(json.loads((tmp_path / "chosen.json").read_text()))
    assert file.chosen == {"m": {"other": {"system": "Be kind."}}}
    assert file.codes["m"]["other"] == ["c"]
    assert file.data == data_facts(load_rows(found, "test"))
    assert file.models["m"] is not None


def test_what_is_refused_has_touched_no_test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "run_all", lambda *_: pytest.fail("began"))
    row = {"prompt": "q?", "chosen": "a", "rejected": "b"}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**row, "prompt": f"q{i}?"}) + "\n" for i in range(9)))
    (tmp_path / "test.jsonl").write_text('{"prompt": "q?", "chosen": "a"}\n')
    tasks = {"a": {key: str(tmp_path / f"{key}.jsonl") for key in ("train", "test")}}
    for make, contender in ((phases.tune, TOLD), (phases.confirm, {"method": "none"})):
        found = bench(tmp_path, tasks=tasks, contenders={"x": contender})
        part = ["test"] if make is phases.confirm else []
        with pytest.raises(InputError, match=r"test\.jsonl:1: field 'rejected': no such column"):
            make(found, Settings(tmp_path), *part, quiet, quiet)
    found = bench(tmp_path, models={"m": "tiny", "other": "/no/such/folder"}, contenders={"x": {"method": "none"}})
    with pytest.raises(InputError, match=r"bench\.yaml:\d+: models\.other: there is no model folder"):
        phases.confirm(found, Settings(tmp_path), "test", quiet, quiet)
    contenders = {"x": {"method": "er", "objective": "dpo", "tune": {"targets": ["q_proj", "all-linear", "qq_proj"]}}}
    found = bench(tmp_path, contenders=contenders)
    with pytest.raises(InputError, match=r"bench\.yaml:\d+: contenders\.x: on m: cannot adapt qq_proj: no module of "):
        phases.tune(found, Settings(tmp_path), quiet, quiet)
    assert not (tmp_path / "tested.json").exists()
