"""An exported model is the base model with what was learned, in one piece."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli_for_tests import run as cli
from everalign.errors import EveralignError, InputError
from everalign.learning.export import export_version
from everalign.learning.run_data import load_run
from everalign.methods import METHODS, LifeAlign
from learner_for_tests import make_learner, save_model, task_rows, tasks
from tiers_for_tests import slow_but

PROBE = torch.tensor([[5, 17, 80, 3, 3, 42, 9]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


@pytest.mark.parametrize("name", slow_but(["lifealign", "stl"], METHODS))
def test_the_exported_model_is_base_plus_adapter(model, tmp_path, name):
    learner = make_learner(model, tmp_path / "run", METHODS[name]())
    for task, rows, _ in tasks("warm", "brief"):
        learner.learn(rows, task)
    folder = learner.export(tmp_path / "out", label="brief" if name == "experts" else None)
    assert folder == tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(model)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    untouched = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(tmp_path / "run" / "versions" / "002-brief" / "adapter")))
    assert next(exported.parameters()).dtype == torch.float32
    torch.testing.assert_close(logits(exported), adapted, rtol=1e-5, atol=1e-5)
    assert (adapted - untouched).abs().max() > 1e-2
    assert not any("lora" in key for key, _ in exported.named_parameters())
    assert AutoTokenizer.from_pretrained(folder)("wörd")["input_ids"] == learner.tokenizer("wörd")["input_ids"]


def test_the_learned_policy_and_the_exported_model_agree(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", LifeAlign(space="product"))
    learner.learn_all(tasks("warm", "brief"))
    exported = AutoModelForCausalLM.from_pretrained(learner.export(tmp_path / "out"))
    torch.testing.assert_close(logits(exported), logits(learner.policy.peft), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    make_learner(model, output, LifeAlign(space="product")).learn_all(tasks("warm", "brief", "calm"))
    return output


def adapted(model, run, version):
    base = AutoModelForCausalLM.from_pretrained(model)
    return logits(PeftModel.from_pretrained(base, str(run / "versions" / version / "adapter")))


def exported(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def test_what_is_exported_is_the_current_version_or_one_of_its_line(model, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    learner = make_learner(model, run, LifeAlign(space="product"), resume=True)
    learner.rollback()
    expected = {version: adapted(model, run, version) for version in ("001-warm", "002-brief", "003-calm")}
    assert (expected["002-brief"] - expected["001-warm"]).abs().max() > 1e-3
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(exported(learner.export(tmp_path / "a")), expected["002-brief"], **close)
    torch.testing.assert_close(exported(learner.export(tmp_path / "b", "001-warm")), expected["001-warm"], **close)
    code, out, _ = cli(capsys, "export", str(run), str(tmp_path / "c"), "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            **{"run": str(run), "version": "002-brief", "model": str(tmp_path / "c"), "corrector": False},
            **{"dtype": "fp32", "rounding": 0.0},
        },
    )
    torch.testing.assert_close(exported(tmp_path / "c"), expected["002-brief"], **close)
    code, out, _ = cli(capsys, "export", str(run), str(tmp_path / "d"), "--version", "001")
    assert (code, [line.split() for line in out.splitlines()]) == (
        0,
        [["version", "001-warm"], ["model", str(tmp_path / "d")], ["dtype", "fp32"]],
    )
    torch.testing.assert_close(exported(tmp_path / "d"), expected["001-warm"], **close)
    assert AutoTokenizer.from_pretrained(tmp_path / "d")("wörd")["input_ids"] == learner.tokenizer("wörd")["input_ids"]
    with pytest.raises(InputError, match="003-calm was left out of the run's line: roll back to it first"):
        learner.export(tmp_path / "e", "003-calm")
    with pytest.raises(InputError, match="has no version '7': choose one of 001-warm, 002-brief"):
        learner.export(tmp_path / "e", "7")


def test_a_base_model_that_was_moved_is_named_and_another_refused(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    moved = shutil.copytree(facts["model"], tmp_path / "moved")
    (run / "run.json").write_text(json.dumps(facts | {"model": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="there is no model folder"):
        export_version(load_run(run), tmp_path / "out")
    with pytest.raises(InputError, match=r"is not the model that .* was started with"):
        export_version(load_run(run), tmp_path / "out", model=str(save_model(tmp_path / "other", seed=1, layers=2)))
    assert not (tmp_path / "out").exists()
    assert export_version(load_run(run), tmp_path / "out", model=str(moved)).version == "003-calm"


def test_a_model_in_bf16_is_recognised(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", options={"precision": "bf16"})
    learner.learn(task_rows("warm"), "warm")
    assert learner.export(tmp_path / "out").is_dir()


def test_a_damaged_version_is_not_exported(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "versions" / "003-calm" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    code, _, err = cli(capsys, "export", str(run), str(tmp_path / "out"))
    assert code == 2
    assert "adapter_model.safetensors: missing or changed since it was written" in err
    assert not (tmp_path / "out").exists()


def test_a_second_export_to_the_same_folder_is_refused(model, tmp_path):
    learner = make_learner(model, tmp_path / "run")
    learner.learn(task_rows("warm"), "warm")
    learner.export(str(tmp_path / "deep" / "out"))
    config = json.loads((tmp_path / "deep" / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    with pytest.raises(InputError, match="out exists: choose another folder to export to"):
        learner.export(tmp_path / "deep" / "out")


def test_a_resumed_learner_exports_too(model, tmp_path):
    make_learner(model, tmp_path / "run").learn(task_rows("warm"), "warm")
    assert make_learner(model, tmp_path / "run", resume=True).export(tmp_path / "out").is_dir()


def test_nothing_learned_is_nothing_to_export(model, tmp_path):
    with pytest.raises(InputError, match="nothing to export: learn a task first"):
        make_learner(model, tmp_path / "run").export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_changes_the_model_is_not_handed_out(model, tmp_path, monkeypatch):
    learner = make_learner(model, tmp_path / "run")
    learner.learn(task_rows("warm"), "warm")
    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
    with pytest.raises(EveralignError, match="the merged model's logits differ from the adapter's by"):
        learner.export(tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]
