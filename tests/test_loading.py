"""Loading a base model and recognising it again; settings of the process."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from everalign.errors import InputError
from everalign.modeling import runtime
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint, resolve_model
from everalign.modeling.tiny import tiny_assistant_path
from models_for_tests import random_model, saved_model
from tokenizers_for_tests import byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A copy of a saved model, to be spoilt."""
    return shutil.copytree(saved_model(), tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_loaded_frozen_and_in_evaluation_mode():
    model = load_model(str(saved_model()))
    state = load_file(saved_model() / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert all(torch.equal(parameters[name], value) for name, value in state.items())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


def test_bf16_weights():
    model = load_model(str(saved_model()), "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tiny_is_the_embedded_assistant():
    assert resolve_model("tiny") == str(tiny_assistant_path())
    assert resolve_model("somebody/model") == "somebody/model"


def test_a_missing_folder_is_named(tmp_path):
    missing = str(tmp_path / "nowhere")
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=f"there is no model folder {missing}"):
            load(missing)


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    for what, load in (("model", load_model), ("tokenizer", load_tokenizer)):
        with pytest.raises(InputError, match=f"cannot load a {what} from the folder {tmp_path}"):
            load(str(tmp_path))


def test_a_config_of_an_unknown_architecture_is_refused(folder):
    edit_config(folder, model_type="nonesuch", architectures=["Nonesuch"])
    with pytest.raises(InputError, match=f"cannot load a model from the folder {folder}"):
        load_model(str(folder))


def test_an_encoder_decoder_is_no_causal_language_model(folder):
    edit_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(InputError, match=f"cannot load a model from the folder {folder}"):
        load_model(str(folder))


def test_cut_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"cannot load a model from the folder {folder}"):
        load_model(str(folder))


def test_weights_of_another_shape_are_refused(folder):
    edit_config(folder, intermediate_size=40)
    with pytest.raises(InputError, match=f"cannot load a model from the folder {folder}"):
        load_model(str(folder))


def test_missing_weights_are_not_replaced_by_random_ones(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 of the model's parameters, such as model\.layers\.1\.mlp\.up_proj"):
        load_model(str(folder))


def test_a_classifier_has_no_language_head(tmp_path):
    LlamaForSequenceClassification(random_model().config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lack 1 of the model's parameters, such as lm_head\.weight"):
        load_model(str(tmp_path))


def test_tied_weights_are_not_missing():
    model = load_model(str(saved_model("qwen3")))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    byte_tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"the tokenizer of {tmp_path} has no end-of-text token: set `eos_token`"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_is_loaded():
    assert load_tokenizer(str(saved_model())).eos_token == "</s>"


# ---- the fingerprint ----


def test_the_fingerprint_is_stable():
    first = model_fingerprint(load_model(str(saved_model())))
    assert model_fingerprint(load_model(str(saved_model()))) == first
    assert len(first) == 64


def test_the_fingerprint_tells_models_apart():
    seen = {
        model_fingerprint(model)
        for model in (
            random_model("llama"),
            random_model("llama", seed=1),
            random_model("mistral"),
            random_model("llama").bfloat16(),
        )
    }
    assert len(seen) == 4


def test_the_fingerprint_sees_every_value_of_a_small_matrix():
    model = random_model()
    before = model_fingerprint(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[-1, -1] += 1e-4
    assert model_fingerprint(model) != before


def test_the_fingerprint_samples_at_most_4096_values_a_parameter():
    """One parameter of twice that and one more: every third value, or it would be every second one: 4,097."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(8193))
    before = model_fingerprint(model)
    seen = 0
    for i in range(0, 8193, 97):
        with torch.no_grad():
            model.weight[i] = 1.0
        seen += model_fingerprint(model) != before
        with torch.no_grad():
            model.weight[i] = 0.0
    assert seen == len([i for i in range(0, 8193, 97) if i % 3 == 0])


# ---- the process ----


def test_subnormal_numbers_are_flushed():
    try:
        torch.set_flush_denormal(False)
        tiny = torch.full((4,), 1e-30)
        assert (tiny * 1e-10).abs().max() > 0
        runtime.prepare_process()
        assert (tiny * 1e-10).abs().max() == 0
    finally:
        torch.set_flush_denormal(False)


def test_other_systems_keep_their_allocator(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runtime.keep_freed_memory() is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: object())
    assert runtime.keep_freed_memory() is False
