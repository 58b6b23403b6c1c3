"""Tokens of prompts and answers, compared with the exact text that they must stand for."""

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from everalign.data.chat_template import keep_template
from everalign.data.chat_tokens import ChatFormat, encode_prompt, encode_response, template_fingerprint
from everalign.data.records import Preference
from everalign.data.tokenization import TokenizedRow, tokenize_preferences, truncate
from everalign.errors import InputError
from tokenizers_for_tests import CHATML, FORGETFUL, NO_END, NO_SYSTEM, SHOUTING, byte_tokenizer

CHAT = ({"role": "user", "content": "Hi"},)


def texts(tokenizer, prompt, response):
    """What the tokens of prompt and answer say, special tokens included."""
    decoded = (encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, response))
    return tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in decoded)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (
            byte_tokenizer(CHATML),
            ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>"),
        ),
        (
            byte_tokenizer(NO_SYSTEM, bos="<s>"),
            ("<s><turn>user\nHi<end_of_turn>\n<turn>model\n", "Yes<end_of_turn>"),
        ),
        (byte_tokenizer(NO_END), ("user: Hi\n\nassistant: ", "Yes</s>")),
        (byte_tokenizer(), ("User:\nHi\n\nAssistant:\n", "Yes</s>")),
        (byte_tokenizer(bos="<s>", adds="<s> $A"), ("<s>User:\nHi\n\nAssistant:\n", "Yes</s>")),
    ],
    ids=["chatml", "gemma-like", "no-end-mark", "default", "default-with-bos"],
)
def test_chat_prompt_and_answer_meet_where_the_assistant_speaks(tokenizer, expected):
    assert texts(tokenizer, CHAT, "Yes") == expected


def test_end_mark_and_bos_are_single_tokens():
    tokenizer = byte_tokenizer(NO_SYSTEM, bos="<s>", adds="<s> $A")
    assert encode_prompt(tokenizer, CHAT).count(tokenizer.bos_token_id) == 1
    ids = encode_response(tokenizer, CHAT, "Yes")
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert len(ids) == 4


@pytest.mark.parametrize("template", [NO_END, None])
def test_white_space_of_the_answer_is_kept_and_that_of_the_template_cut(template):
    assert texts(byte_tokenizer(template), CHAT, " Yes \n")[1] == " Yes \n</s>"


@pytest.mark.parametrize("answer", ["i", "end", "<|im_end|>", "assistant\n<|im_start|>assistant"])
def test_answers_that_look_like_parts_of_the_template(answer):
    assert texts(byte_tokenizer(CHATML), CHAT, answer)[1] == answer + "<|im_end|>"


def test_several_turns_keep_earlier_answers_in_the_prompt():
    chat = (*CHAT, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "And?"})
    prompt, answer = texts(byte_tokenizer(), chat, "So")
    assert prompt == "User:\nHi\n\nAssistant:\nYo</s>\n\nUser:\nAnd?\n\nAssistant:\n"
    assert answer == "So</s>"


@pytest.mark.parametrize(
    ("adds", "expected"),
    [("$A", "Once "), ("<s> $A", "<s>Once "), ("<s> $A </s>", "<s>Once "), ("$A </s>", "Once ")],
)
def test_text_prompts_are_continued_as_they_stand(adds, expected):
    assert texts(byte_tokenizer(CHATML, bos="<s>", adds=adds), "Once ", " upon\n") == (
        expected,
        " upon\n</s>",
    )


def test_eos_is_not_written_twice_and_a_written_one_is_kept():
    assert texts(byte_tokenizer(adds="$A </s>"), "one</s>", "two</s>") == ("one</s>", "two</s>")


@pytest.mark.parametrize(("bos", "expected"), [("<s>", "<s>"), (None, "</s>")])
def test_prompt_of_no_tokens_gets_a_predecessor_for_the_answer(bos, expected):
    tokenizer = byte_tokenizer(bos=bos, normalizer=normalizers.Replace("?", ""))
    assert texts(tokenizer, "???", "x")[0] == expected


def test_answer_of_no_tokens_is_still_its_end():
    tokenizer = byte_tokenizer(normalizer=normalizers.Replace("?", ""))
    assert encode_response(tokenizer, "x", "???") == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            byte_tokenizer(NO_SYSTEM, bos="<s>"),
            "refuses a conversation of system, user: System role not supported",
        ),
        (byte_tokenizer(FORGETFUL), "the chat template does not extend the text of the prompt"),
        (byte_tokenizer(SHOUTING), "the chat template rewrites the answer 'good'"),
        (byte_tokenizer("{{ oops"), "refuses a conversation"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_with_the_row(tokenizer, message):
    prompt = ({"role": "system", "content": "S"}, *CHAT)
    rows = [Preference("text", "good", "bad"), Preference(prompt, "good", "bad")]
    with pytest.raises(InputError) as caught:
        tokenize_preferences(rows, tokenizer, 64)
    assert str(caught.value).startswith(f"pair 2 (id {rows[1].id}): tokenizer: ")
    assert message in str(caught.value)


def test_tokenizer_without_eos_is_refused():
    with pytest.raises(InputError, match=r"no EOS token.*set tokenizer\.eos_token"):
        encode_prompt(byte_tokenizer(CHATML, eos=None), CHAT)


def test_tokenizer_with_named_templates_uses_the_default_one():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "rag": NO_END}
    assert texts(tokenizer, CHAT, "Yes")[1] == "Yes<|im_end|>"
    tokenizer.chat_template = {"rag": NO_END}
    with pytest.raises(InputError, match="no default chat template"):
        encode_prompt(tokenizer, CHAT)


@pytest.mark.parametrize("template", [CHATML, NO_END, None])
def test_a_batch_is_its_rows_one_by_one(template):
    tokenizer = byte_tokenizer(template, bos="<s>", adds="<s> $A")
    prompts = [CHAT, "plain", (*CHAT, *CHAT), "x", CHAT]
    rows = [Preference(prompt, f"good {i}", f"bad {i * 'x'}", weight=i + 1) for i, prompt in enumerate(prompts)]
    for pair, row in zip(tokenize_preferences(rows, tokenizer, 500), rows, strict=True):
        assert pair == TokenizedRow.pair(
            row.id,
            encode_prompt(tokenizer, row.prompt),
            encode_response(tokenizer, row.prompt, row.chosen),
            encode_response(tokenizer, row.prompt, row.rejected),
            row.weight,
        )


def test_more_rows_than_one_batch_of_texts():
    rows = [Preference(str(i), f"good {i}", "bad") for i in range(2100)]
    tokenizer = byte_tokenizer()
    pairs = tokenize_preferences(rows, tokenizer, 32)
    assert [tokenizer.decode(pair.prompt) for pair in pairs] == [row.prompt for row in rows]
    assert [pair.id for pair in pairs] == [row.id for row in rows]


def pair(prompt, chosen, rejected):
    return TokenizedRow.pair(
        "id", list(range(prompt)), list(range(100, 100 + chosen)), list(range(200, 200 + rejected)), 1.0
    )


def cut(row, max_length, bos=None):
    prompt, answers = truncate(row.prompt, row.responses, max_length, bos)
    return TokenizedRow.pair("id", prompt, *answers)


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((10, 6, 3), (10, 6, 3)),  # fits exactly
        ((11, 6, 3), (10, 6, 3)),  # the prompt loses what the longer answer needs
        ((11, 3, 6), (10, 3, 6)),
        ((99, 12, 3), (4, 12, 3)),  # down to a quarter
        ((99, 13, 3), (4, 12, 3)),  # then the longer answer is cut
        ((99, 50, 13), (4, 12, 12)),  # or both
        ((3, 50, 5), (3, 13, 5)),  # a prompt below a quarter stays whole
        ((1, 1, 40), (1, 1, 15)),
    ],
)
def test_truncation_takes_the_prompts_left_then_the_answers_tails(lengths, kept):
    before, after = pair(*lengths), cut(pair(*lengths), 16)
    assert (len(after.prompt), len(after.chosen), len(after.rejected)) == kept
    assert after.prompt == before.prompt[len(before.prompt) - kept[0] :]
    assert (after.chosen, after.rejected) == (before.chosen[: kept[1]], before.rejected[: kept[2]])


def test_truncation_keeps_a_leading_bos():
    assert cut(pair(20, 6, 6), 8, bos=0).prompt == [0, 19]
    assert cut(pair(20, 6, 6), 8, bos=7).prompt == [18, 19]


def test_every_cut_pair_fits_and_has_a_prompt_and_answers():
    for prompt in range(1, 30):
        for answer in range(1, 30):
            for limit in (8, 9, 13, 16):
                short = cut(pair(prompt, answer, 30 - answer), limit, bos=0)
                assert len(short.prompt) + max(map(len, short.responses)) <= limit
                assert min(map(len, (short.prompt, *short.responses))) > 0


def test_counts_and_summary():
    rows = [
        Preference("p", "good", "bad"),
        Preference("p" * 40, "good", "bad"),  # prompt cut
        Preference("p", "g" * 40, "b" * 40),  # both answers cut
        Preference("p" * 40, "g" * 40, "b"),  # prompt and one answer cut
        Preference("p", "x" * 30 + "good", "x" * 30 + "bad"),  # cut to the same
    ]
    pairs = tokenize_preferences(rows, byte_tokenizer(), 16)
    assert (pairs.truncated_prompts, pairs.truncated_responses, pairs.identical) == (2, 5, 1)
    assert pairs[4].chosen == pairs[4].rejected
    assert len(pairs) == 5
    assert pairs[1:3] == (pairs[1], pairs[2])
    assert pairs.one_line() == (
        "5 rows of at most 16 tokens: 2 prompts and 5 answers truncated, 1 rows with identical answers"
    )


def test_a_cut_answer_does_not_end():
    tokenizer = byte_tokenizer()
    cut = tokenize_preferences([Preference("p", "g" * 40, "b")], tokenizer, 16)[0]
    assert tokenizer.eos_token_id not in cut.chosen
    assert cut.rejected[-1] == tokenizer.eos_token_id


def test_pairs_that_all_became_identical_are_refused():
    with pytest.raises(InputError, match="max_length: 16 leaves the two answers of every pair"):
        tokenize_preferences([Preference("p", "x" * 30 + "good", "x" * 30 + "bad")], byte_tokenizer(), 16)


def test_no_rows_are_no_pairs_and_short_limits_are_refused():
    assert len(tokenize_preferences([], byte_tokenizer(), 8)) == 0
    with pytest.raises(InputError, match="max_length: must be at least 8 tokens, found 7"):
        tokenize_preferences([], byte_tokenizer(), 7)


def test_encoded_fingerprint_follows_the_tokens():
    rows = [Preference("p", "good", "bad"), Preference("q", "good", "bad" * 9)]
    encoded = [
        tokenize_preferences(rows, byte_tokenizer(), 64),
        tokenize_preferences(rows, byte_tokenizer(), 16),
        tokenize_preferences(rows[::-1], byte_tokenizer(), 64),
        tokenize_preferences([rows[0], Preference("q", "good", "bad" * 9, weight=2)], byte_tokenizer(), 64),
    ]
    assert len({pairs.fingerprint for pairs in encoded}) == 4
    assert tokenize_preferences(rows, byte_tokenizer(CHATML), 64).fingerprint == encoded[0].fingerprint


def test_template_fingerprint_tells_apart_what_encodes_differently():
    lower = normalizers.Lowercase()
    different = [
        byte_tokenizer(),
        byte_tokenizer(CHATML),
        byte_tokenizer(eos="<|im_end|>"),
        byte_tokenizer(bos="<s>"),
        byte_tokenizer(bos="<s>", adds="<s> $A"),
        byte_tokenizer(normalizer=lower),
    ]
    different.append(byte_tokenizer())
    different[-1].add_tokens(["zebra"])  # in no text but those that hold the word
    assert len({template_fingerprint(tokenizer) for tokenizer in different}) == len(different)


def test_template_fingerprint_survives_saving_use_and_another_padding(tmp_path):
    tokenizer = byte_tokenizer(CHATML, bos="<s>", adds="<s> $A")
    before = template_fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    tokenizer.save_pretrained(tmp_path)
    assert template_fingerprint(tokenizer) == before
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert template_fingerprint(again) == before
    again.pad_token = again.eos_token
    assert template_fingerprint(again) == before


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (NO_SYSTEM, "<end_of_turn>"), (NO_END, "</s>"), (None, "</s>")]
)
def test_the_end_of_a_turn_is_the_template_s_or_eos(template, end):
    tokenizer = byte_tokenizer(template, bos="<s>")
    assert ChatFormat(tokenizer).end_of_turn_ids() == (tokenizer.convert_tokens_to_ids(end),)
    assert ChatFormat(tokenizer).end_of_turn_ids("text") == (tokenizer.eos_token_id,)


def test_a_tokenizer_without_a_template_is_saved_with_the_one_it_was_used_with(tmp_path):
    tokenizer = byte_tokenizer()
    form = ChatFormat(tokenizer)
    assert form.default_used
    keep_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == form.template
    assert texts(again, CHAT, "Yes") == texts(byte_tokenizer(), CHAT, "Yes")
    with_one = byte_tokenizer(CHATML)
    keep_template(with_one)
    assert with_one.chat_template == CHATML
    assert not ChatFormat(with_one).default_used
