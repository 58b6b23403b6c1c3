"""Rows of the base model with an instruction, cut to the length limit: what the instruction is, and what is lost."""

import pytest

from everalign.bench.data import with_system
from everalign.bench.worker import _behind
from everalign.data.records import Preference, PreferenceSet
from everalign.data.tokenization import tokenize_preferences
from tokenizer_kinds_for_tests import TEMPLATES, tokenizer_of

LIMIT, SYSTEM = 60, "No. It is not so, is it?"
WORDS = "Paris is the capital of France. It is a city on the Seine, and it has been one for 2,000 years. "
LONG = ({"role": "user", "content": WORDS * 3 + "def f(x):"},)
SHORT = ({"role": "user", "content": "What is it?"},)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nThere was a house.<|im_end|>\n' }}{% endif %}"
)
SHAPES = {
    "with BOS": ("llama3", TEMPLATES["llama3"][0]),
    "without BOS": ("qwen2", TEMPLATES["chatml"][0]),
    "sentencepiece with BOS": ("mistral v1", TEMPLATES["gemma"][0]),
    "with a system message of its own": ("qwen2", DEFAULT + TEMPLATES["chatml"][0]),
}


def rows_of(shape, prompt, answers=("yes", "no")):
    """The row with the instruction, and the two rows without it: told, whole, cut, and what was made of them."""
    kind, template = SHAPES[shape]
    tokenizer = tokenizer_of(kind)
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        rows = PreferenceSet((Preference(prompt, *answers),), "test")
        (told,), (whole,), (plain,) = (
            tokenize_preferences(ones, tokenizer, limit)
            for ones, limit in ((with_system(rows, SYSTEM), 10**9), (rows, 10**9), (rows, LIMIT))
        )
        return tokenizer, told, whole, plain, _behind(told, whole, plain)
    finally:
        tokenizer.chat_template = before


def common_end(first, second):
    same = (a == b for a, b in zip(reversed(first), reversed(second), strict=False))
    return next((n for n, equal in enumerate(same) if not equal), min(len(first), len(second)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_instruction_stays_whole_and_the_prompt_behind_it_loses_what_it_would_without(shape):
    tokenizer, told, whole, plain, found = rows_of(shape, LONG)
    assert len(plain.prompt) < len(whole.prompt)
    shared = common_end(told.prompt, whole.prompt)
    kept = common_end(plain.prompt, whole.prompt)
    assert found.prompt == told.prompt[: len(told.prompt) - shared] + whole.prompt[len(whole.prompt) - kept :]
    assert SYSTEM in tokenizer.decode(found.prompt)
    if "BOS" in shape:
        marks = 0 if shape == "without BOS" else 1
        assert found.prompt.count(tokenizer.bos_token_id) == told.prompt.count(tokenizer.bos_token_id) == marks
    assert found.responses == told.responses


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_is_not_cut_stays_as_it_is(shape):
    _, told, whole, plain, found = rows_of(shape, SHORT)
    assert plain == whole
    assert found == told


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_cut_as_without_the_instruction(shape):
    _, told, whole, plain, found = rows_of(shape, LONG, (WORDS * 3, "no"))
    assert len(plain.chosen) < len(whole.chosen)
    assert found.chosen == told.chosen[: len(plain.chosen)]
    assert found.rejected == told.rejected


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_plain_text_is_cut_at_its_beginning(shape):
    """With an instruction it becomes a message, so that its end is no longer the end of the prompt."""
    tokenizer, told, whole, plain, found = rows_of(shape, LONG[0]["content"])
    text = tokenizer.decode(found.prompt)
    assert SYSTEM in text
    assert "def f(x):" in text
    assert len(told.prompt) - len(found.prompt) == pytest.approx(len(whole.prompt) - len(plain.prompt), abs=2)
    last = tokenizer.decode(told.prompt[-4:])
    assert text.endswith(last)
    assert text.count("2,000 years") < 3
