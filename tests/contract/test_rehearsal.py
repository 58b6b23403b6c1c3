"""What an architecture cannot do, and what a model cannot read, is found before anything is learned."""

import json

import pytest
import torch
from test_lengths import longrope, model_of
from transformers import BertConfig, GPT2Config, LlamaConfig

from everalign import AdapterOptions, Learner, PreferenceSet, TrainingOptions
from everalign.data.collate import collate
from everalign.errors import EveralignError, InputError
from everalign.modeling import rehearsal
from everalign.modeling.loading import check_vocabulary, sequence_limit
from everalign.modeling.rehearsal import rehearse
from models_for_tests import SHAPE, random_model, random_pairs, random_policy
from tokenizers_for_tests import byte_tokenizer


def folder_of(config, path):
    """A model of this configuration and a tokenizer, on disk."""
    tokenizer = byte_tokenizer()
    config.vocab_size = len(tokenizer)
    model_of(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def learn(path, output, **options):
    said = []
    training = TrainingOptions(learning_rate=1e-2, batch_size=4, **options)
    learner = Learner(str(path), output=output, training=training, adapter=AdapterOptions(rank=2), log=said.append)
    rows = [{"prompt": f"{'word ' * 40}{i}?", "chosen": f"It is {i}.", "rejected": "no"} for i in range(4)]
    learner.learn(PreferenceSet.of(rows, source="rows"), name="a")
    return said


# ---- the rehearsal ----


def test_a_usual_model_passes_and_is_left_as_it_was():
    model = random_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rehearse(model, "all-linear")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("lora" in name for name in before)


def test_a_model_that_reads_what_comes_later_is_refused():
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=False,
    )
    with pytest.raises(
        InputError, match=r"BertLMHeadModel \(bert\) cannot be learned with: .*not a causal language model"
    ):
        rehearse(model_of(config), "all-linear")


@pytest.mark.parametrize(
    ("part", "stage"),
    [
        ("_take_a_step", "a training step"),
        ("write_checked", "writing and loading the merged model"),
    ],
)
def test_what_fails_is_named(part, stage, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel\nand a long explanation")

    monkeypatch.setattr(rehearsal, part, fails)
    monkeypatch.setattr(rehearsal, "_done", set())
    expected = rf"LlamaForCausalLM \(llama\) cannot be learned with: {stage} fails \(RuntimeError: no such kernel\)"
    with pytest.raises(InputError, match=expected):
        rehearse(random_model(), "all-linear")


def test_gradients_that_are_no_numbers_are_named(monkeypatch):
    model = random_model()
    # The root of nothing has no derivative.
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x + ((x - x) ** 2).sum(-1, True).sqrt())
    monkeypatch.setattr(rehearsal, "_done", set())
    with pytest.raises(InputError, match=r"a training step fails \(its gradients are not finite\)"):
        rehearse(model, "all-linear")


@pytest.mark.parametrize("original", [6, 10])
def test_positions_that_stretch_early_are_no_look_ahead(original):
    rehearse(model_of(longrope(original, 64)), "all-linear")


def test_a_refused_model_leaves_no_version(tmp_path):
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(InputError, match="BertLMHeadModel"):
        learn(folder_of(config, tmp_path / "model"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("versions/*"))


# ---- rows that are too long ----


def test_rows_are_cut_to_what_a_table_of_positions_holds_and_it_is_said(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64)
    said = learn(folder_of(config, tmp_path / "model"), tmp_path / "run", max_length=256)
    assert f"max_length is 64 instead of 256, the most tokens that {tmp_path / 'model'} can read" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["max_length"] == 64


def test_rotary_positions_go_on_beyond_what_the_model_was_made_for_and_it_is_said(tmp_path):
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": 64})
    said = learn(folder_of(config, tmp_path / "model"), tmp_path / "run", max_length=256)
    assert any("max_length is 256, while" in line and "rows of up to 64 tokens" in line for line in said)


def test_where_positions_stretch_others_than_policies_are_kept_below():
    model, tokenizer = model_of(longrope(100, 400)), byte_tokenizer()
    assert sequence_limit(None, 1024, model, tokenizer, "it") == 100
    assert sequence_limit(80, 1024, model, tokenizer, "it") == 80
    with pytest.raises(InputError, match="max_length: it stretches its positions beyond 100 tokens"):
        sequence_limit(200, 1024, model, tokenizer, "it")
    with pytest.raises(InputError, match="max_length: it takes at most 400 tokens, found 401"):
        sequence_limit(401, 1024, model, tokenizer, "it")


# ---- tokens beyond the embeddings ----


def test_a_tokenizer_with_tokens_beyond_the_embeddings_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match=rf"has {len(tokenizer)} tokens and the model embeddings for 96"):
        check_vocabulary(random_model(), tokenizer, "it")


def test_a_turn_mark_beyond_the_embeddings_is_refused_and_one_that_nothing_uses_is_not():
    tokenizer = byte_tokenizer()
    model = random_model(vocabulary=len(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(model, tokenizer, "it")
    tokenizer.chat_template = "{% for m in messages %}<image>{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="'<image>' is number"):
        check_vocabulary(model, tokenizer, "it")


def test_a_text_with_a_token_beyond_the_embeddings_is_an_error_that_says_so(tmp_path):
    tokenizer = byte_tokenizer()
    model = random_model(vocabulary=len(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["word"]})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=f"token {len(tokenizer) - 1}, .* embeddings for {len(tokenizer) - 1}"):
        learn(tmp_path / "model", tmp_path / "run")


def test_an_exception_in_a_model_names_it():
    policy = random_policy()

    def fails(*_, **__):
        raise IndexError("index 7 is out of range\nand so on")

    policy.peft.get_base_model().model.layers[1].mlp.forward = fails
    with pytest.raises(EveralignError, match=r"^LlamaForCausalLM failed: IndexError: index 7 is out of range$"):
        policy(collate(random_pairs(2), True))
