"""An exported model is the base model with what was learned, in one piece."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from everalign.errors import EveralignError, InputError
from everalign.methods import METHODS, LifeAlign
from learner_for_tests import make_learner, save_model, task_rows, tasks

PROBE = torch.tensor([[5, 17, 80, 3, 3, 42, 9]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_model_is_base_plus_adapter(model, tmp_path, name):
    learner = make_learner(model, tmp_path / "run", METHODS[name]())
    for task, rows, _ in tasks("warm", "brief"):
        learner.learn(rows, task)
    folder = learner.export(tmp_path / "out")
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
    learner = make_learner(model, tmp_path / "run", LifeAlign())
    learner.learn_all(tasks("warm", "brief"))
    exported = AutoModelForCausalLM.from_pretrained(learner.export(tmp_path / "out"))
    torch.testing.assert_close(logits(exported), logits(learner.policy.peft), rtol=1e-4, atol=1e-4)


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
