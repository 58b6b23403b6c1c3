"""A run directory is refused when it is not what it should be, with the reason; and it shows whole versions only."""

import json
import os
import shutil

import pytest

from everalign import AdapterOptions
from everalign.data.chat_template import DEFAULT_CHAT_TEMPLATE
from everalign.errors import InputError
from everalign.learning.run_data import load_run
from everalign.learning.run_store import version_name
from everalign.methods import ExperienceReplay, LifeAlign
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, task_rows, tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    make_learner(model, output, LifeAlign(space="product")).learn_all(tasks("warm", "brief"))
    return output


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run of two tasks, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def resume(model, run, method=None, objective="dpo", **arguments):
    return make_learner(model, run, method or LifeAlign(space="product"), objective, resume=True, **arguments)


# ---- beginning ----


def test_a_run_is_not_continued_by_accident(model, run):
    with pytest.raises(InputError, match="holds a run already: resume it, or choose another output directory"):
        make_learner(model, run, LifeAlign(space="product"))


def test_a_folder_with_other_files_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for again in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no run"):
            make_learner("no/such/model", tmp_path, resume=again)
    with pytest.raises(InputError, match=r"thesis\.tex is not a directory"):
        make_learner("no/such/model", tmp_path / "thesis.tex")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_a_resume_of_nothing_begin_a_run(model, tmp_path):
    make_learner(model, tmp_path, resume=True).learn(task_rows("warm"), "warm")
    assert load_run(tmp_path).current == "001-warm"


def test_a_model_that_cannot_be_used_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="there is no model folder"):
        make_learner(tmp_path / "nowhere", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "left", [["zero_shot.json"], ["zero_shot.json", "run.json.partial"], ["zero_shot.json.partial"]]
)
def test_a_begin_that_was_killed_can_be_repeated(model, tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("half")
    make_learner(model, tmp_path).learn(task_rows("warm"), "warm", held_out("warm"))
    assert load_run(tmp_path).current == "001-warm"


def test_run_json_tells_how_the_run_was_made(model, finished):
    facts = json.loads((finished / "run.json").read_text())
    assert facts["model"] == str(model)
    assert len(facts["model_fingerprint"]) == 64
    assert facts["settings"]["learning_rate"] == 2e-2
    assert facts["settings"]["rank"] == 4
    assert facts["method"] == {"name": "lifealign"} | LifeAlign(space="product").settings()
    assert {"torch", "transformers", "peft", "everalign"} <= set(facts["libraries"])
    assert {"cpu", "cores", "platform", "threads"} <= set(facts["machine"])


# ---- other settings ----


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"seed": 1}, r"seed \(0 then, 1 now\)"),
        ({"objective": "fpo"}, r"objective \('dpo' then, 'fpo' now\)"),
        ({"method": ExperienceReplay()}, r"method \(name: 'lifealign' then, 'er' now\)"),
        ({"method": LifeAlign(keep=0.25, space="product")}, r"method \(keep: 0.5 then, 0.25 now\)"),
        ({"method": LifeAlign(space="factors")}, r"method \(space: 'product' then, 'factors' now\)"),
        ({"options": {"beta": 0.2}}, r"settings \(beta: 0.1 then, 0.2 now\)"),
        ({"options": {"sft_epochs": 1.0}}, r"settings \(sft_epochs: 0.0 then, 1.0 now\)"),
        ({"adapter": AdapterOptions(rank=2, alpha=8.0, targets="q_proj,v_proj")}, r"settings \(rank: 4 then, 2 now\)"),
    ],
)
def test_other_settings_are_named_and_refused(model, run, arguments, difference):
    with pytest.raises(
        InputError, match=rf"was started with (a )?different {difference}: use the same settings, or another"
    ):
        resume(model, run, **arguments)


def test_another_model_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="was started with a different model_fingerprint"):
        resume(save_model(tmp_path / "other", seed=1), run)


def test_another_chat_template_is_refused(model, run, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    (other / "chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE + "!")
    with pytest.raises(InputError, match="was started with a different template"):
        resume(other, run)


def test_the_model_may_have_moved(model, run, tmp_path):
    resume(shutil.copytree(model, tmp_path / "elsewhere"), run)


def test_a_run_of_another_format_is_refused(model, run):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(InputError, match=r"run\.json: field format"):
        resume(model, run)


# ---- damage ----


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "method.safetensors",
        "replay.jsonl",
        "scores.json",
        "training.jsonl",
        "consolidation.json",
    ],
)
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_damaged_version_is_refused_by_the_name_of_the_file(model, run, name, how):
    path = run / "versions" / "002-brief" / name
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"002-brief/{name}.* missing or (has )?changed since it was written"):
        resume(model, run)


@pytest.mark.parametrize("name", ["run.json", "zero_shot.json", "versions/002-brief/manifest.json"])
@pytest.mark.parametrize("how", ["cut", "empty", "a list"])
def test_a_damaged_record_is_refused_by_the_name_of_the_file(model, run, name, how):
    text = (run / name).read_text()
    (run / name).write_text({"cut": text[: len(text) // 2], "empty": "", "a list": "[]"}[how])
    with pytest.raises(InputError, match=name):
        resume(model, run)


def test_a_run_that_does_not_tell_its_test_sets_cannot_go_on(model, run):
    written = json.loads((run / "zero_shot.json").read_text())
    (run / "zero_shot.json").write_text(json.dumps({"scores": written["scores"]}))
    assert load_run(run).scores().tasks == ["warm", "brief"]
    with pytest.raises(InputError, match=r"zero_shot\.json: field tests"):
        resume(model, run)


def test_a_version_without_its_manifest_is_refused(model, run):
    (run / "versions" / "002-brief" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"002-brief/manifest\.json: no such file"):
        resume(model, run)


def test_a_missing_parent_is_refused(model, run):
    shutil.rmtree(run / "versions" / "001-warm")
    with pytest.raises(
        InputError, match=r"002-brief/manifest\.json: field parent: '001-warm' is not an earlier version"
    ):
        resume(model, run)


def test_a_version_being_written_is_no_version(model, run):
    shutil.copytree(run / "versions" / "002-brief", run / "versions" / "003-calm.partial")
    assert [version.id for version in load_run(run).versions] == ["001-warm", "002-brief"]
    again = resume(model, run)
    again.learn_all(tasks())
    assert sorted(entry.name for entry in (run / "versions").iterdir()) == ["001-warm", "002-brief", "003-calm"]


# ---- test sets ----


def test_zero_shot_scores_are_measured_once(model, run, monkeypatch):
    before = (run / "zero_shot.json").read_bytes()
    resume(model, run).learn_all(tasks("warm", "brief"))
    assert (run / "zero_shot.json").read_bytes() == before


def test_other_test_rows_after_a_resume_are_refused(model, run):
    again = resume(model, run)
    with pytest.raises(InputError, match=r"task 'warm' has other test rows in this run \(warm\.jsonl\): use those"):
        again.learn(task_rows("warm"), "warm", held_out("warm", 4))


def test_a_resumed_run_scores_a_new_task_on_all_earlier_ones(model, run):
    """Else a learned task would have no score after the next one; nobody has to give its test set again."""
    again = resume(model, run)
    again.learn(task_rows("calm"), "calm", held_out("calm"))
    assert again.scores.learned == ["warm", "brief", "calm"]
    assert None not in again.scores.matrix[-1]


def test_kept_test_rows_that_were_changed_are_refused(model, run):
    kept = sorted((run / "tests").iterdir())[0]
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=f"{kept.name}: changed since it was written"):
        resume(model, run).learn(task_rows("calm"), "calm")


def test_kept_test_rows_that_are_missing_are_refused(model, run):
    kept = sorted((run / "tests").iterdir())[0]
    kept.unlink()
    with pytest.raises(InputError, match=f"{kept.name}"):
        resume(model, run).learn(task_rows("calm"), "calm")


# ---- what a kill leaves ----


def test_other_rows_do_not_go_on_from_an_interrupted_tasks_weights(model, tmp_path, monkeypatch):
    """The interrupted task's finished stage belongs to its rows; the same name with other rows starts over."""

    def die(*_):
        raise KeyboardInterrupt

    first = make_learner(model, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(first._run, "write_version", die)
        with pytest.raises(KeyboardInterrupt):
            first.learn(task_rows("warm"), "warm")
    assert len(list((tmp_path / "run" / "work").rglob("done"))) == 1
    more = task_rows("warm", 12)
    make_learner(model, tmp_path / "run", resume=True).learn(more, "warm")
    make_learner(model, tmp_path / "fresh").learn(more, "warm")
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "fresh"))


def test_a_promotion_that_was_killed_is_made_up_for(model, run):
    (run / "current").write_text("001-warm\n")
    (run / "work" / "002-brief" / "deep").mkdir(parents=True)
    resume(model, run)
    assert load_run(run).current == "002-brief"
    assert not (run / "work").exists()


def test_a_promotion_by_hand_is_left_alone(model, run):
    (run / "current").write_text("001-warm\n")
    resume(model, run)
    assert load_run(run).current == "001-warm"


def test_leftovers_of_a_broken_off_version_are_replaced(model, tmp_path, monkeypatch):
    output = tmp_path / "run"
    failing = make_learner(model, output)
    replace = os.replace

    def full_disk(source, target):
        if str(target).endswith("001-warm"):
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="disk full"):
            failing.learn(task_rows("warm"), "warm")
    assert not list((output / "versions").iterdir())
    assert not (output / "current").exists()
    # As a kill would leave it.
    (output / "versions" / "001-warm.partial").mkdir()
    (output / "versions" / "001-warm.partial" / "junk").write_text("x")
    again = make_learner(model, output, resume=True)
    assert again.run.versions == []
    again.learn(task_rows("warm"), "warm")
    assert [entry.name for entry in (output / "versions").iterdir()] == ["001-warm"]
    assert not (output / "versions" / "001-warm" / "junk").exists()


# ---- names ----


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("harmless", "007-harmless"),
        ("Be kind / be brief!", "007-Be-kind-be-brief"),
        ("../../etc", "007-etc"),
        ("日本語", "007-task"),
        ("a.partial", "007-a-partial"),
        ("x" * 300, "007-" + "x" * 60),
    ],
)
def test_version_folders_are_safe_names(task, folder):
    assert version_name(7, task) == folder


def test_strange_task_names_survive(model, tmp_path):
    names = ["日本語", "a/b.partial", "a/b partial"]
    learner = make_learner(model, tmp_path / "run")
    for name, (_, rows, test) in zip(names, tasks(), strict=True):
        learner.learn(rows, name, test)
    assert learner.scores.tasks == names
    again = make_learner(model, tmp_path / "run", resume=True)
    assert [version.task for version in again.run.versions] == names
    assert [version.id for version in again.run.versions] == ["001-task", "002-a-b-partial", "003-a-b-partial"]


def test_a_new_version_never_takes_the_number_of_one_beside_the_line(model, run):
    """Version 2 hangs on version 1 and so does version 3, which is beside the line: the next is 4."""
    shutil.copytree(run / "versions" / "002-brief", run / "versions" / "003-other")
    path = run / "versions" / "003-other" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"index": 3, "name": "other"}))
    again = resume(model, run)
    assert [one.id for one in again.run.off_lineage] == ["003-other"]
    for name in ("warm", "brief"):
        again.register_test(name, held_out(name))
    again.learn(task_rows("calm"), "calm")
    newest = load_run(run).versions[-1]
    assert (newest.id, newest.manifest.parent) == ("004-calm", "002-brief")
