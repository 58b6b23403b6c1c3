import importlib.util
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from everalign.demo.world import TOPICS, conversations, demo_tasks, questions
from everalign.modeling.loading import tiny_assistant_path

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_tiny_assistant.py"
# Measured 1.165 per token on 600 rows like these, most of it the choice of style and wording.
PERPLEXITY_BOUND = 1.25


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_assistant_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_assistant_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_tiny_assistant", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompt_ids(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def answer_log_probs(model, tokenizer, texts_and_replies):
    """For every pair the log-probabilities of the answer's tokens and of the end of turn."""
    prompts = [prompt_ids(tokenizer, text) for text, _ in texts_and_replies]
    replies = [[*tokenizer(reply).input_ids, tokenizer.eos_token_id] for _, reply in texts_and_replies]
    rows = [torch.tensor(prompt + reply) for prompt, reply in zip(prompts, replies, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    picked = log_probs.gather(2, ids[:, 1:, None])[..., 0]
    return [
        row[len(prompt) - 1 : len(prompt) + len(reply) - 1]
        for row, prompt, reply in zip(picked, prompts, replies, strict=True)
    ]


def test_the_folder_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in tiny_assistant_path().iterdir()}
    assert set(files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 4 * 2**20


def test_the_tokenizer_round_trips_the_worlds_text(tokenizer):
    for question, _, reply in islice(conversations(seed=11, held_out=True), 300):
        for text in (question.text, reply):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert len(ids) <= len(text.split()) * 2


@pytest.mark.parametrize("text", ["naïve café", "a  b\n\tc", "日本語 🙂", "x=1; y != 2"])
def test_the_tokenizer_round_trips_what_the_world_never_says(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_single_and_distinct(tokenizer):
    ids = [tokenizer(token).input_ids for token in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    assert [len(each) for each in ids] == [1, 1, 1]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.bos_token is None
    assert len({each[0] for each in ids}) == 3


def test_the_chat_template_writes_chatml(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Good."},
    ]
    body = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nGood.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == body
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == body + "<|im_start|>assistant\n"


def test_the_script_still_makes_the_tokenizer_that_is_embedded(build, tmp_path):
    build.build_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (tiny_assistant_path() / name).read_text(), name


def test_the_script_still_makes_the_model_that_is_embedded(build, tokenizer, model):
    fresh, embedded = build.build_model(tokenizer).state_dict(), model.state_dict()
    assert {name: each.shape for name, each in fresh.items()} == {n: each.shape for n, each in embedded.items()}
    assert 1_000_000 <= model.num_parameters() <= 1_500_000
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 256
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_one_training_step_of_the_script_moves_the_weights(build, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 2)
    model = build.build_model(tokenizer)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    build.train(model, tokenizer, steps=1)
    assert not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)


def test_held_out_answers_are_well_predicted(model, tokenizer):
    rows = islice(conversations(seed=99, held_out=True), 120)
    log_probs = answer_log_probs(model, tokenizer, [(question.text, reply) for question, _, reply in rows])
    assert math.exp(-torch.cat(log_probs).mean()) < PERPLEXITY_BOUND


@pytest.mark.parametrize("task", demo_tasks(train=240, test=60), ids=lambda task: task.name)
def test_it_starts_without_a_strong_preference(model, tokenizer, task):
    chosen, rejected = (
        [each.mean() for each in answer_log_probs(model, tokenizer, pairs)]
        for pairs in (
            [(row.prompt[0]["content"], row.chosen) for row in task.test],
            [(row.prompt[0]["content"], row.rejected) for row in task.test],
        )
    )
    wins = sum(bool(better > worse) for better, worse in zip(chosen, rejected, strict=True))
    assert 0.25 <= wins / len(task.test) <= 0.75


@pytest.mark.parametrize("topic", TOPICS)
def test_it_writes_an_answer_and_ends_its_turn(model, tokenizer, topic):
    question = next(q for q in questions(topic) if q.held_out)
    prompt = torch.tensor([prompt_ids(tokenizer, question.text)])
    whole = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
    written = whole[0, prompt.shape[1] :]
    assert written[-1] == tokenizer.eos_token_id
    reply = tokenizer.decode(written, skip_special_tokens=True)
    assert reply[-1] in ".!"
    assert 3 <= len(reply.split()) <= 50
    if question.request.subject:
        assert question.request.subject in reply
