"""The tokens that are learned are those of the whole conversation, for every kind of tokenizer and of template."""

import pytest

from everalign.correction.templates import TEMPLATES as CORRECTOR_TEMPLATES
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.chat_tokens import encode_prompt
from everalign.data.records import Preference, Scored
from everalign.data.tokenization import tokenize_answers, tokenize_preferences, tokenize_scored
from everalign.errors import InputError
from everalign.modeling.loading import load_tokenizer
from tokenizer_kinds_for_tests import KINDS, REWRITING, TEMPLATES, tokenizer_of

UNCONTINUED = ("bert",)

PROMPT = ({"role": "user", "content": "What is the capital of France?"},)
ANSWERS = [
    "Paris is it.",
    "No.",
    "  Indented.",
    "\nOn a new line",
    "\n\nOn another",
    "1. first\n2. second",
    "Été à Łódź",
    "日本語です",
    "🙂 fine",
    "it ends in spaces  ",
    "it ends in a line\n",
]
TEXTS = [
    ("Q: capital of France? A:", " Paris is it."),
    ("Once upon a time there was", "\nnothing"),
    ("def f(x):\n", "    return x\n"),
    ("Q: capital of France? A: ", "Paris"),
    ("unfor", "tunately it goes on"),
    ("今日", "は日本語です"),
    ("🙂", "🙂🙂"),
    ("12", "345"),
]


def encoded(tokenizer, prompt, answers):
    """A row for each answer; the last of them is the rejected one of all others."""
    rows = [Preference(prompt, answer, answers[0] + " Not so.") for answer in answers]
    return list(tokenize_preferences(rows, tokenizer, 100_000))


def common(first, second):
    """How many tokens two lists begin with alike."""
    return next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))


@pytest.mark.parametrize("kind", KINDS)
def test_chats(kind):
    tokenizer = tokenizer_of(kind)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for name, (template, end) in TEMPLATES.items():
        tokenizer.chat_template = template
        read = encode_prompt(tokenizer, PROMPT)
        for answer, pair in zip(ANSWERS, encoded(tokenizer, PROMPT, ANSWERS), strict=True):
            chat = [*PROMPT, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            if end not in added and tokenizer.eos_token in text.rpartition(answer.strip())[2]:
                end = tokenizer.eos_token  # as a token ends the turn at the latest
            through_end = text[: text.rindex(end) + len(end)]
            expected = tokenizer(through_end, add_special_tokens=False)["input_ids"]
            got = pair.prompt + pair.chosen
            if end.strip() in added:
                whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
                assert whole[: len(got)] == got, (name, answer)
            else:
                expected.append(tokenizer.eos_token_id)
            assert got == expected, (name, answer)
            shared = common(read, expected)
            assert len(pair.prompt) >= min(shared, common(pair.prompt, read)), (name, answer)
            if read == expected[: len(read)]:
                assert common(pair.prompt, read) == len(pair.prompt), (name, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_texts(kind):
    tokenizer = tokenizer_of(kind)
    for prompt, answer in TEXTS:
        pair = encoded(tokenizer, prompt, [answer])[0]
        whole = tokenizer(prompt + answer)["input_ids"]
        end = tokenizer.eos_token_id
        got = pair.prompt + pair.chosen
        # Where one token straddles all of the prompt, the answer needs another before it.
        assert got[len(got) - len(whole) - (whole[-1] != end) :] == whole + [end] * (whole[-1] != end), (prompt, answer)
        assert pair.prompt + pair.chosen == got or pair.prompt == [tokenizer.bos_token_id], (prompt, answer)
        if kind not in REWRITING:
            said = tokenizer.decode(pair.prompt + pair.chosen, skip_special_tokens=True)
            assert said.removeprefix(" ") == (prompt + answer).removeprefix(" "), (prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_many_answers_to_one_prompt(kind):
    tokenizer = tokenizer_of(kind)
    for name in ("chatml", "a space at the end", "vicuna"):
        tokenizer.chat_template = TEMPLATES[name][0]
        ones = (1.0,) * len(ANSWERS)
        rows = [Scored(PROMPT, tuple(ANSWERS), ones, weights=ones)]
        (group,) = tokenize_scored(rows, tokenizer, 100_000)
        for answer, response in zip(ANSWERS, group.responses, strict=True):
            ((alone,), _) = tokenize_answers([PROMPT], [answer], tokenizer, 100_000)
            assert group.prompt + response == alone.prompt + alone.responses[0], (name, answer)
            pair = encoded(tokenizer, PROMPT, [answer])[0]
            assert pair.prompt + pair.chosen == alone.prompt + alone.responses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_corrections(kind):
    tokenizer = tokenizer_of(kind)
    for template in CORRECTOR_TEMPLATES.values():
        if kind in UNCONTINUED:
            with pytest.raises(InputError, match="changes the text that it is given to continue"):
                CorrectionEncoder(tokenizer, template)
            continue
        encoder = CorrectionEncoder(tokenizer, template)
        prompt = encoder.prompt("What is the capital of France?", "London.")
        for text in ANSWERS:
            asked = template.render("What is the capital of France?", "London.")
            whole = tokenizer(asked + text, split_special_tokens=True)["input_ids"]
            response = encoder.response(text)
            assert response[-1] == tokenizer.eos_token_id
            if whole[: len(prompt)] == prompt:
                assert prompt + response == whole + [tokenizer.eos_token_id] * (whole[-1] != tokenizer.eos_token_id)
            if kind not in REWRITING:
                assert encoder.decode(response) == text


def test_an_answer_s_tokens_do_not_depend_on_the_rows_beside_it():
    tokenizer = tokenizer_of("llama2")
    tokenizer.chat_template = TEMPLATES["zephyr"][0]
    rows = [Preference(prompt, f"{answer} {i}", "No.") for i in range(1300) for prompt, answer in TEXTS[:2]]
    rows += [Preference(PROMPT, f"It is {i}.", "No.") for i in range(1300)]
    together = list(tokenize_preferences(rows, tokenizer, 1000))
    for place in (0, 1, 1023, 1024, 2599, 2600, len(rows) - 1):
        assert together[place] == tokenize_preferences([rows[place]], tokenizer, 1000)[0]


@pytest.mark.real
def test_smollm2():
    tokenizer = load_tokenizer("smollm2")
    chats = [(*PROMPT, {"role": "assistant", "content": answer}) for answer in ANSWERS]
    for chat, pair in zip(chats, encoded(tokenizer, PROMPT, ANSWERS), strict=True):
        whole = tokenizer.apply_chat_template(list(chat), tokenize=True, return_dict=False)
        got = pair.prompt + pair.chosen
        assert whole[: len(got)] == got
        assert got[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert len(whole) - len(got) == 1  # the line's end


def test_the_embedded_assistant():
    tokenizer = load_tokenizer("tiny")
    for answer, pair in zip(ANSWERS, encoded(tokenizer, PROMPT, ANSWERS), strict=True):
        chat = [*PROMPT, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        got = pair.prompt + pair.chosen
        assert whole[: len(got)] == got
        assert set(whole[len(got) :]) <= set(tokenizer("\n")["input_ids"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNCONTINUED])
def test_a_correction_that_is_begun(kind):
    """Its tokens are those of the text; and whatever a tokenizer rewrites, what was begun stays."""
    encoder = CorrectionEncoder(tokenizer_of(kind), CORRECTOR_TEMPLATES["aligner-1"])
    for begun in ("It is so.", "Das ist 漢字。", "It 😀!", "1. first", "Été: “Oui.”"):
        for rest in (" And it goes on.", "\n\nAnd so", "\n2. second", "そうです。", "  😀", ""):
            first, others = encoder.continuation(begun, rest)
            text = encoder.continued(begun, first, others)
            assert text.startswith(begun)
            assert encoder.continued(begun, first, others[-1:]) == begun  # nothing but the end token
            if kind not in REWRITING:
                assert text == begun + rest
                assert encoder.decode(first).rstrip() == begun
