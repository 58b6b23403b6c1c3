"""Starting from a PEFT adapter: it is merged into the base model, or refused by the name of what is in the way."""

import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from everalign import Learner
from everalign.errors import InputError
from everalign.learning.export import export_version
from everalign.learning.run_data import load_run
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint
from learner_for_tests import adapter_weights, held_out, make_learner, same_weights, save_model, task_rows
from models_for_tests import saved_model

IDS = torch.arange(3, 23)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save_adapter(folder, base, config=None, size=0.05):
    """An adapter as training would leave it, and the logits of base and adapter together."""
    config = config or LoraConfig(r=4, target_modules="all-linear")
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits(model.eval())


QUERY = ["q_proj"]
KINDS = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=QUERY),
    "patterns": lambda: LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, target_modules=["q_proj", "v_proj"]
    ),
    "one layer": lambda: LoraConfig(r=4, layers_to_transform=[1], target_modules=QUERY),
    "saved modules": lambda: LoraConfig(r=4, target_modules=QUERY, modules_to_save=["lm_head", "norm"]),
    "embedding": lambda: LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"]),
    "embedding, by an expression": lambda: LoraConfig(r=4, target_modules=r".*\.(q_proj|embed_tokens)|lm_head"),
    "tokens": lambda: LoraConfig(r=4, target_modules=QUERY, trainable_token_indices=[5, 6]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=QUERY),
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=QUERY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_what_peft_makes_of_it(kind, tmp_path):
    expected = save_adapter(tmp_path, saved_model(), KINDS[kind]())
    assert (expected - logits(load_model(str(saved_model())))).abs().max() > 0.05
    for model in (load_model(str(saved_model()), adapter=str(tmp_path)), load_model(str(tmp_path))):
        assert torch.allclose(logits(model), expected, atol=1e-4)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "saved modules", "embedding", "embedding, by an expression"])
def test_a_tied_head_is_untied_where_the_adapter_changes_it(kind, tmp_path):
    base, folder = saved_model("qwen3"), tmp_path / "adapter"
    expected = save_adapter(folder, base, KINDS[kind]())
    model = load_model(str(base), adapter=str(folder))
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert model.config.tie_word_embeddings is (kind == "lora")
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(again), expected, atol=1e-4)


def test_bf16_is_rounded_once_after_merging(tmp_path):
    save_adapter(tmp_path, saved_model())
    exact, rounded = load_model(str(tmp_path)), load_model(str(tmp_path), "bf16")
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_added_tokens_come_with_the_adapter(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(saved_model())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(saved_model(), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=4, target_modules=QUERY, modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_model(str(tmp_path))), logits(model), atol=1e-4)
    for loaded in (load_tokenizer(str(tmp_path)), load_tokenizer(str(saved_model()), adapter=str(tmp_path))):
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded("<think>")["input_ids"] == [len(tokenizer) - 2]
    assert load_tokenizer(str(saved_model())).chat_template != tokenizer.chat_template


# ---- what is refused ----


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "adapter", saved_model())
    return tmp_path / "adapter"


def refusal(adapter, model=None):
    with pytest.raises(InputError) as caught:
        load_model(
            str(saved_model()) if model is None else str(model), adapter=None if adapter is None else str(adapter)
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_adapter_is_named(folder, tmp_path):
    assert f"{tmp_path}: no adapter here" in refusal(tmp_path)
    assert "there is no model folder /nowhere/at/all" in refusal("/nowhere/at/all")


def test_a_damaged_adapter_is_refused(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"the adapter {folder} (type LORA) cannot be merged into {saved_model()}: " in refusal(folder)
    weights.unlink()
    assert f"the adapter {folder} (type LORA) cannot be merged" in refusal(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json: damaged JSON" in refusal(folder)


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    assert "cannot be merged into" in refusal(folder, saved_model("gpt2"))
    more = tmp_path / "more"
    config = AutoModelForCausalLM.from_pretrained(saved_model()).config
    config.num_hidden_layers = 3
    config.layer_types = None
    larger = AutoModelForCausalLM.from_config(config)
    larger.save_pretrained(more)
    # peft would leave the third layer as it is, or pass over what has no place.
    save_adapter(folder, saved_model(), LoraConfig(r=4, target_modules=QUERY))
    assert "weights differ, such as base_model.model.model.layers.2" in refusal(folder, more)
    save_adapter(tmp_path / "deep", more, LoraConfig(r=4, target_modules=QUERY))
    assert "weights differ, such as base_model.model.model.layers.2" in refusal(tmp_path / "deep")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3), "type PROMPT_TUNING, which has no weights to merge"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3), "type PREFIX_TUNING, which has no weights to merge"),
        (LoraConfig(r=4, lora_bias=True, target_modules=QUERY), "Impossible to merge LoRA with `lora_bias=True`"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_its_name(config, message, tmp_path):
    save_adapter(tmp_path, saved_model(), config)
    assert message in refusal(tmp_path)


def test_a_classifiers_adapter_is_refused(folder):
    edit(folder, task_type="SEQ_CLS")
    assert "is an adapter for SEQ_CLS, not of a causal language model" in refusal(folder)


def test_an_adapter_as_model_must_say_what_it_belongs_to(folder):
    edit(folder, base_model_name_or_path=None)
    assert (
        f"that does not name its base model: give that as the model (--model BASE --base-adapter {folder})"
        in refusal(None, folder)
    )
    edit(folder, base_model_name_or_path="/gone/away")
    assert "is an adapter of /gone/away, which cannot be found: give its base model" in refusal(None, folder)


def test_two_adapters_are_refused(folder):
    assert "is an adapter itself, and only one can be merged" in refusal(folder, folder)


def test_an_adapter_beside_a_models_weights_is_never_passed_over(folder, tmp_path):
    both = shutil.copytree(saved_model(), tmp_path / "both")
    plain = logits(load_model(str(both)))
    for file in folder.iterdir():
        shutil.copy(file, both / file.name)
    expected = logits(load_model(str(folder)))
    assert "holds the weights of a model and an adapter beside them" in refusal(None, both)
    assert torch.allclose(logits(load_model(str(both), adapter=str(both))), expected, atol=1e-5)
    (both / "adapter_config.json").unlink()
    assert torch.equal(logits(load_model(str(both))), plain)


# ---- learning from there ----


@pytest.fixture
def start(tmp_path):
    model = save_model(tmp_path / "model", layers=2)
    save_adapter(tmp_path / "start", model)
    return model, tmp_path / "start"


def learned(model, output, adapter=None, **arguments):
    lines = []
    learner = make_learner(model, output, base_adapter=adapter, lines=lines, **arguments)
    learner.learn(task_rows("warm"), "warm", held_out("warm"))
    return learner, lines


def test_a_learner_starts_where_the_adapter_ended(start, tmp_path):
    """As from a folder into which the adapter was merged by hand."""
    model, adapter = start
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "merged")
    learned(tmp_path / "merged", tmp_path / "by-hand")
    learner, lines = learned(model, tmp_path / "run", adapter)
    assert f"the base model is {model} with the adapter {adapter} merged into it" in lines
    assert same_weights(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "by-hand"))

    facts = load_run(tmp_path / "run").facts
    assert (facts.model, facts.base_adapter) == (str(model), str(adapter))
    exported = AutoModelForCausalLM.from_pretrained(learner.export(tmp_path / "out"), dtype=torch.float32)
    base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    version = tmp_path / "run" / "versions" / "001-warm" / "adapter"
    assert torch.allclose(logits(exported), logits(PeftModel.from_pretrained(base, str(version))), atol=1e-4)


def test_the_run_keeps_the_adapter(start, tmp_path):
    model, adapter = start
    (adapter / "optimizer.pt").write_bytes(b"large")
    learned(model, tmp_path / "run", adapter)
    assert not (tmp_path / "run" / "base_adapter" / "optimizer.pt").exists()
    shutil.rmtree(adapter)
    exported = export_version(load_run(tmp_path / "run"), tmp_path / "out")
    assert (exported.folder / "model.safetensors").is_file()


def test_an_adapter_as_model_is_the_same_run(start, tmp_path):
    model, adapter = start
    learned(model, tmp_path / "a", adapter)
    learned(adapter, tmp_path / "b")
    assert same_weights(adapter_weights(tmp_path / "a"), adapter_weights(tmp_path / "b"))
    facts = load_run(tmp_path / "b").facts
    assert (facts.model, facts.base_adapter) == (str(model), str(adapter))


def test_a_changed_adapter_is_not_resumed(start, tmp_path):
    model, adapter = start
    learned(model, tmp_path / "run", adapter)
    make_learner(model, tmp_path / "run", base_adapter=adapter, resume=True)
    for changed in (None, tmp_path / "other"):
        if changed is not None:
            save_adapter(changed, model, size=0.06)
        with pytest.raises(InputError, match="was started with a different model_fingerprint"):
            make_learner(model, tmp_path / "run", base_adapter=changed, resume=True)


def test_a_bad_adapter_is_refused_before_a_run_is_begun(start, tmp_path):
    model, adapter = start
    edit(adapter, task_type="SEQ_CLS")
    with pytest.raises(InputError, match="SEQ_CLS"):
        Learner(str(model), output=tmp_path / "run", base_adapter=adapter)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_fingerprint_is_that_of_what_is_learned_from(start):
    model, adapter = start
    assert model_fingerprint(load_model(str(adapter))) != model_fingerprint(load_model(str(model)))
