"""Loading a base model and recognising it again; settings of the process."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_mistral_common_available

from everalign import AdapterOptions
from everalign.cli import main
from everalign.errors import InputError
from everalign.modeling import base_weights, loading, runtime
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint, resolve_model, tiny_assistant_path
from learner_for_tests import held_out, make_learner, task_rows
from models_for_tests import random_model, saved_model
from tokenizer_kinds_for_tests import mistral_file
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


@pytest.mark.parametrize("named", [5, [5, 6]])
def test_a_tokenizer_without_an_end_has_its_models(tmp_path, named):
    byte_tokenizer(eos=None).save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300, eos_token_id=named).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_token_id == 5


@pytest.mark.parametrize("named", [None, 100_000])
def test_what_no_tokenizer_has_is_no_end(tmp_path, named):
    byte_tokenizer(eos=None).save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300, eos_token_id=named).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(not is_mistral_common_available(), reason="needs mistral-common as new as transformers wants it")
def test_a_tekken_file_alone_is_a_tokenizer(tmp_path):
    """Read as transformers' own, with the tokens of Mistral's."""
    shutil.copy(mistral_file("tekken_240911.json"), tmp_path / "tekken.json")
    MistralConfig(eos_token_id=2).save_pretrained(tmp_path)
    tokenizer, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast
    assert tokenizer.eos_token == "</s>"
    for text in ("I'm 'tis café 1234567 x=3;\n\n\tdef f():", "日本語 🙂", "   lead  trail   "):
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


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


# ---- code of their own, quantised weights ----

MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd_llama"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(folder):
    """A model that brings its own code along, which notes that it was run."""
    (folder / "modeling_odd.py").write_text(f"{MODELING}\nopen({str(folder / 'was_run')!r}, 'w').close()\n")
    classes = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    edit_config(folder, model_type="odd_llama", architectures=["OddForCausalLM"], auto_map=classes)
    yield folder
    loading.allow_remote_code(False)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(odd, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(InputError, match=r"comes with Python code of its own.*give --trust-remote-code"):
        load_model(str(odd))
    # Its tokenizer has none.
    assert load_tokenizer(str(odd)).eos_token == "</s>"
    assert not (odd / "was_run").exists()
    assert capsys.readouterr().out == ""


def test_code_that_is_trusted_is_run(odd):
    loading.allow_remote_code()
    model = load_model(str(odd))
    assert type(model).__name__ == "OddForCausalLM"
    assert (odd / "was_run").exists()
    state = load_file(saved_model() / "model.safetensors")
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in state.items())
    assert load_tokenizer(str(odd)).eos_token == "</s>"


def test_the_flag_trusts(odd, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    flags = ["learn", "--model", str(odd), "--task", f"a={tmp_path / 'rows.jsonl'}", "--output", str(tmp_path / "run")]
    assert main(flags) == 2
    assert "give --trust-remote-code" in capsys.readouterr().err
    assert main([*flags, "--no-report", "--trust-remote-code"]) == 0
    assert "trust_remote_code" not in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize("broken", ["import a_package_that_is_not_there", "raise AttributeError('gone since 5.0')"])
def test_code_that_does_not_run_here_is_named(odd, broken):
    (odd / "modeling_odd.py").write_text(f"{MODELING}\n{broken}\n")
    loading.allow_remote_code()
    with pytest.raises(InputError, match=r"(a_package_that_is_not_there|gone since 5\.0)"):
        load_model(str(odd))


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "pip install compressed-tensors"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    ],
)
def test_a_missing_library_of_quantised_weights_is_named(folder, settings, hint):
    packages = {"bitsandbytes": "bitsandbytes", "gptq": "optimum", "awq": "gptqmodel", "hqq": "hqq"}
    package = packages.get(settings["quant_method"], "compressed_tensors")
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    edit_config(folder, quantization_config=settings)
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder} is quantised with {settings['quant_method']}, and cannot be loaded here: ")
    assert hint in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"quant_method": "nonesuch"}, "nonesuch"), ({"bits": 4, "group_size": 64}, "a method that it does not name")],
)
def test_weights_of_an_unknown_kind_are_not_taken_for_plain_ones(folder, settings, name):
    edit_config(folder, quantization_config=settings)
    with pytest.raises(InputError, match=f"is quantised with {name}, which transformers does not know"):
        load_model(str(folder))


def test_an_unfit_quantiser_is_refused_before_training(folder):
    model = load_model(str(folder))
    model.config.quantization_config = {"quant_method": "spqr"}
    model.hf_quantizer = type("Quantizer", (HfQuantizer,), {"__init__": lambda self: None, "is_trainable": False})
    with pytest.raises(InputError, match="is quantised with spqr, on which transformers cannot train adapters"):
        base_weights.check_trainable(model, "m")
    with pytest.raises(InputError, match=r"its own weights cannot be trained: give --lora-rank"):
        base_weights.check_all_weights(model, "m")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_learns_and_is_exported(bits, tmp_path):
    """As its dequantised self, which is what the export holds."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how)
    packed.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    assert model_fingerprint(load_model(str(tmp_path / "packed"))) == model_fingerprint(
        load_model(str(tmp_path / "packed"))
    )
    learner = make_learner(tmp_path / "packed", tmp_path / "run", adapter=AdapterOptions(rank=4, alpha=8.0))
    scores = learner.learn(task_rows("warm"), "warm", held_out("warm"))
    assert scores["warm"].accuracy > 0.9
    assert make_learner(tmp_path / "packed", tmp_path / "run", adapter=AdapterOptions(rank=4, alpha=8.0), resume=True)
    exported = load_model(str(learner.export(tmp_path / "out")))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    dequantised = load_model(str(tmp_path / "packed")).dequantize().float()
    adapter = PeftModel.from_pretrained(dequantised, str(tmp_path / "run" / "versions" / "001-warm" / "adapter"))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        found, expected = exported(input_ids=ids).logits, adapter(input_ids=ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


def save_fp8(folder):
    """A model whose projections are kept in 8 bits with a scale for each block, and the rest in bf16; its weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kept, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            scale = weight.abs().max() / 448
            kept[name] = (weight / scale).to(torch.float8_e4m3fn)
            kept[f"{name}_scale_inv"] = scale.reshape(1, 1)
            plain[name] = kept[name].float() * scale
        else:
            kept[name] = weight.bfloat16()
            plain[name] = kept[name].float()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    edit_config(folder, dtype="bfloat16", quantization_config=how)
    return plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, fp8 may stay fp8")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_are_turned_back_into_numbers_are_all_of_one_precision(precision, tmp_path):
    """Without a GPU, transformers does that to fp8, and leaves what was bf16 as it is."""
    expected = save_fp8(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(dtype))
    learner = make_learner(tmp_path / "model", tmp_path / "run", options={"precision": precision})
    learner.learn(task_rows("warm"), "warm")
    assert type(load_model(str(learner.export(tmp_path / "out")))) is LlamaForCausalLM
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_damaged_generation_config_is_refused(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, ')
    with pytest.raises(InputError, match=r"generation_config.json: damaged JSON .*restore the file"):
        load_model(str(folder))


def test_a_template_that_only_the_processor_has_is_the_tokenizers_too(folder):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert load_tokenizer(str(folder)).chat_template is None
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(str(folder)).chat_template == template
    (folder / "chat_template.json").write_text(json.dumps({"template": template}))
    with pytest.raises(InputError, match=r"chat_template.json: holds no 'chat_template'"):
        load_tokenizer(str(folder))
    byte_tokenizer("{{ messages }}").save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == "{{ messages }}"
