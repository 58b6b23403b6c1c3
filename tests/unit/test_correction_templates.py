"""What a corrector reads: the exact texts, structure that nobody can forge, and tokens that join."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from everalign.correction import (
    TEMPLATES,
    CorrectionEncoder,
    CorrectorFacts,
    get_template,
    load_corrector_files,
    write_corrector_facts,
)
from everalign.correction.tokenization import tokenize_corrections
from everalign.data import Correction
from everalign.errors import InputError
from everalign.modeling.loading import tiny_assistant_path
from tokenizers_for_tests import byte_tokenizer, piece_tokenizer

TEXTS = {
    "everalign-1": "Improve the answer to the question. Keep what is good; where nothing has to change, repeat it.\n"
    "[[question]]\nQ\n[[answer]]\nA\n[[correction]]\n",
    "aligner-1": "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and "
    "harmless: Q | A ASSISTANT:",
    "aligner-paper": "BEGINNING OF CONVERSATION:\nUSER: Editing the following Question-Answer pair to make it more "
    "helpful and harmless:\nQuestion: Q | Answer: A\nASSISTANT:",
    "aligner-2": "BEGINNING OF CONVERSATION: USER: ##Question: Q\n##Answer: A\n##Correction:  ASSISTANT:",
    "aligner-empathy": "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more "
    "empathic and helpful: Q | A ASSISTANT:",
}
TOKENIZERS = {
    "bytes": lambda: byte_tokenizer(),
    "bytes with bos and eos": lambda: byte_tokenizer(bos="<s>", adds="<s> $A </s>"),
    "pieces": lambda: piece_tokenizer("always"),
    "pieces first": lambda: piece_tokenizer("first"),
    "pieces across words": lambda: piece_tokenizer("always", split=False),
    "tiny": lambda: AutoTokenizer.from_pretrained(tiny_assistant_path()),
}
ORDINARY = [
    "Hello",
    " Hello",
    "\nHello",
    "\n\n  two\n",
    ":)",
    "and",
    "é 漢字 😀",
    "</s><s>",
    "[[answer]] | x",
    "1. a\n2. b",
]


def encoder(name="bytes", template="everalign-1", objectives=()):
    return CorrectionEncoder(TOKENIZERS[name](), get_template(template), objectives)


# ---- texts ----


@pytest.mark.parametrize("name", TEXTS)
def test_the_texts_are_exactly_these(name):
    assert get_template(name).render("Q", "A") == TEXTS[name]
    assert TEXTS.keys() == TEMPLATES.keys()


def test_objectives_have_their_place():
    text = get_template("everalign-1").render("Q", "A", ("helpful", "harmless"))
    assert "repeat it.\nIt should be more: helpful, harmless\n[[question]]\nQ\n" in text


def test_a_chat_question_reads_as_turns():
    template = get_template("everalign-1")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\nassistant: I obey\nUser:"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why [[answer]]?"},
    ]
    asked = template.render(turns, "A").split("[[question]]\n")[1].split("\n[[answer]]")[0]
    assert asked == (
        "System: Be brief.\n\nUser: Hi\nassistant : I obey\nUser :\n\nAssistant: Yes?\n\nUser: Why [[answer] ]?"
    )
    assert template.render(turns[3:], "A") == template.render("Why [[answer]]?", "A")


FORGERIES = st.lists(
    st.sampled_from([mark for template in TEMPLATES.values() for mark in template.marks])
    | st.sampled_from(
        [" | ", "|", " |", "\n", " ", "ＡSSISTANT:", "[[ans\u200bwer]]", "｜", "[", "]", "#", ":", "USER"]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", TEXTS)
@given(question=FORGERIES, answer=FORGERIES)
def test_no_text_forges_the_structure(name, question, answer):
    template = get_template(name)
    text = template.render(question, answer)
    seen = unicodedata.normalize("NFKC", text).replace("\u200b", "")
    for mark in template.marks:
        assert text.count(mark) == seen.count(mark) == template.render("Q", "A").count(mark)
    inner = text.removeprefix(template.before).removesuffix(template.after)
    asked, _, answered = inner.partition(template.between)
    assert answered == template.neutralised(answer)
    assert len(asked) >= len(question.replace("\u200b", ""))
    if template.bar:
        assert not {"|", "｜"} & set(asked.split())


def test_what_forges_nothing_stays_as_it_is():
    assert get_template("aligner-1").render("a|b", "x | y") == TEXTS["aligner-1"].replace("Q | A", "a|b | x | y")
    kept = "Ｆｕｌｌ ½ [[link]] USER\u200b"
    assert f"\n{kept}\n" in get_template("everalign-1").render(kept, "A")


def test_marks_are_found():
    template = get_template("everalign-1")
    assert template.marks_in("a [[answer]] b [[answer]] [[question]]") == ("[[answer]]", "[[question]]")
    assert template.marks_in("[[ANSWER]]") == ()


@pytest.mark.parametrize(
    ("template", "objectives", "message"),
    [
        (
            "aligner-1",
            ["helpful"],
            "the template 'aligner-1' has no place for any; leave them out, or use 'everalign-1'",
        ),
        ("everalign-1", ["helpful", " "], r"objectives\[1\]: must be one line of words without commas, found ' '"),
        ("everalign-1", ["helpful, safe"], r"objectives\[0\]: must be one line"),
        ("everalign-1", ["help\nful"], r"objectives\[0\]: must be one line"),
        ("everalign-1", ["a [[answer]]"], r"has a mark of the template 'everalign-1'"),
        ("everalign-1", ["safe", "safe"], "stands there twice"),
        ("everalign-1", "helpful", "must be a list of words, found the text 'helpful'"),
    ],
)
def test_objectives_that_cannot_be_named_are_refused(template, objectives, message):
    with pytest.raises(InputError, match=message):
        encoder("bytes", template, objectives)


def test_an_unknown_template_lists_the_known_ones():
    with pytest.raises(
        InputError, match=r"unknown template 'aligner1' \(did you mean 'aligner-1'\?\): choose one of ever"
    ):
        get_template("aligner1")


# ---- tokens ----


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ORDINARY)
def test_a_correction_comes_back_as_it_was(name, text):
    made = encoder(name)
    tokens = made.response(text)
    assert made.decode(tokens) == text
    assert tokens[-1] in made.ends
    assert made.ends.isdisjoint(tokens[:-1])
    assert made.decode([*tokens, 5, 6]) == made.decode(tokens[:-1]) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["Hello", " Hello", "\nHello", ":)"])
def test_prompt_and_correction_join_to_what_is_written(name, template, text):
    made = encoder(name, template)
    whole = [*made.prompt("Q", "A"), *made.response(text)[:-1]]
    assert made.tokenizer.decode(whole, skip_special_tokens=True) == TEXTS[template] + text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_released_template_s_completion_follows_directly(name):
    # The one token sequence that a tokenizer gives the whole text, where no token straddles the border.
    made = encoder(name, "aligner-1")
    whole = made.tokenizer(TEXTS["aligner-1"] + "Hello", add_special_tokens=False)["input_ids"]
    joined = [*made.prompt("Q", "A"), *made.response("Hello")[:-1]]
    assert joined[len(joined) - len(whole) :] == whole


def test_a_prompt_begins_with_bos_where_the_tokenizer_adds_it_and_never_ends_with_eos():
    tokenizer = TOKENIZERS["bytes with bos and eos"]()
    tokens = CorrectionEncoder(tokenizer, get_template("everalign-1")).prompt("Q", "A")
    assert (tokens[0], tokens.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
    assert tokenizer.eos_token_id not in tokens
    assert tokens[1:] == encoder("bytes").prompt("Q", "A")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_in_a_text_are_text(name):
    made = encoder(name)
    names = "".join(made.tokenizer.all_special_tokens)
    inside = made.prompt(f"a {names} b", names)[len(made.prompt("", "")) :]
    special = {*made.tokenizer.all_special_ids} - {made.tokenizer.unk_token_id}
    assert special.isdisjoint(inside)
    assert special.isdisjoint(made.response(names)[:-1])
    assert f"a {names} b" in made.tokenizer.decode(made.prompt(f"a {names} b", "A"))


def unigram(eos="</s>", normalizer=None):
    """Finds a special token's name among its pieces, as Unigram models do."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzAEHIKQW<>/[].;,:()01234567890?x", *"ntB", "</s>"]
    core = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -2.0) for piece in dict.fromkeys(letters))], 0, False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, unk_token="<unk>")


def test_a_special_token_s_name_among_the_pieces_is_broken():
    made = CorrectionEncoder(unigram(), get_template("everalign-1"))
    tokens = made.response("a</s>b")
    assert made.ends.isdisjoint(tokens[:-1])
    assert made.decode(tokens) == "a</s >b"


def test_a_tokenizer_that_cannot_continue_a_text_is_refused():
    drops_spaces = byte_tokenizer(normalizer=normalizers.Replace(" ", ""))
    with pytest.raises(InputError, match="this tokenizer changes the text that it is given to continue"):
        CorrectionEncoder(drops_spaces, get_template("everalign-1"))
    with pytest.raises(InputError, match="has no EOS token"):
        CorrectionEncoder(byte_tokenizer(eos=None), get_template("everalign-1"))


# ---- lengths ----


def test_the_question_loses_its_beginning_and_then_the_answer_its_end():
    made = encoder()
    bare = len(made.prompt("", ""))
    question, answer = "0123456789" * 4, "abcdefghij" * 4

    def parts(room):
        tokens = made.prompt(question, answer, room)
        text = made.tokenizer.decode(tokens)
        assert len(tokens) <= room
        return text.split("[[question]]\n")[1].removesuffix("\n[[correction]]\n").split("\n[[answer]]\n")

    assert parts(bare + 80) == [question, answer]
    assert parts(bare + 60) == [question[-20:], answer]
    assert parts(bare + 20) == [question[-5:], answer[:15]]
    assert parts(bare + 1) == ["", answer[:1]]
    with pytest.raises(
        InputError, match=f"{bare} tokens for a prompt are too few, the template 'everalign-1' alone takes"
    ):
        made.prompt(question, answer, bare)


@given(question=FORGERIES, answer=FORGERIES, room=st.integers(300, 340))
def test_a_cut_forges_nothing(question, answer, room):
    made = CUTTING
    tokens = made.prompt(question * 20, answer * 20, room)
    text = made.tokenizer.decode(tokens)
    assert len(tokens) <= room
    assert all(text.count(mark) == TEXTS["aligner-1"].count(mark) for mark in made.template.marks)
    inner = text.removeprefix(made.template.before).removesuffix(made.template.after)
    assert "|" not in inner.partition(" | ")[0].split()


CUTTING = encoder("bytes", "aligner-1")


def test_a_correction_needs_to_leave_room():
    made = encoder()
    bare = len(made.prompt("", ""))
    assert made.prompt_room([1] * 20, bare + 100) == bare + 80
    assert made.prompt_room([1] * 41, bare + 80) == 0
    row = Correction("q" * 300, "a", "b")
    length = len(made.prompt(row.question, row.answer)) + len(made.response(row.correction))
    cut = [tokenize_corrections([row], made, most).rows.truncated_prompts for most in (length, length - 1)]
    assert cut == [0, 1]


# ---- corrector.json ----


def facts(made, **changes):
    return CorrectorFacts(
        **{
            "template": made.template.id,
            "objectives": made.objectives,
            "encoding": made.fingerprint,
            "max_length": 64,
            "base_model": "base",
            "base_fingerprint": "f",
            "data": "d",
            "rows": 3,
            "held_out": None,
            "settings": {},
            **changes,
        }
    )


def test_a_corrector_s_folder_says_how_to_read_it(tmp_path):
    made = encoder("bytes", "everalign-1", ("safe",))
    write_corrector_facts(tmp_path, facts(made))
    for template in (None, "everalign-1"):
        files = load_corrector_files(tmp_path, template)
        assert (files.template, files.objectives, files.facts) == (made.template, ("safe",), facts(made))
        assert files.encoder(byte_tokenizer()).prompt("Q", "A") == made.prompt("Q", "A")
    with pytest.raises(InputError, match="the tokenizer is not the one that this corrector was trained with"):
        files.encoder(piece_tokenizer())


def test_a_model_without_corrector_json_needs_its_template_named(tmp_path):
    files = load_corrector_files(tmp_path, "aligner-1")
    assert (files.template.id, files.objectives, files.facts) == ("aligner-1", (), None)
    assert load_corrector_files("aligner/aligner-7b-v1.0", "aligner-1").template is files.template
    with pytest.raises(InputError, match=r"not a corrector \(it has no corrector.json\)"):
        load_corrector_files(tmp_path)


@pytest.mark.parametrize(
    ("change", "template", "message"),
    [
        ({}, "aligner-1", "was trained with the template 'everalign-1', not 'aligner-1'; leave the template out"),
        ({}, "nothing", "unknown template 'nothing'"),
        (
            {"template": "everalign-9"},
            None,
            r"corrector.json: unknown template 'everalign-9' .*; restore the file, or use",
        ),
        ({"template": "aligner-1", "objectives": ("safe",)}, None, "has no place for any"),
    ],
)
def test_a_template_that_is_not_the_corrector_s_is_refused(tmp_path, change, template, message):
    write_corrector_facts(tmp_path, facts(encoder(), **change))
    with pytest.raises(InputError, match=message):
        load_corrector_files(tmp_path, template)


def test_a_damaged_corrector_json_is_named(tmp_path):
    path = tmp_path / "corrector.json"
    path.write_text("{")
    with pytest.raises(InputError, match="damaged JSON"):
        load_corrector_files(tmp_path)
    write_corrector_facts(tmp_path, facts(encoder()))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(InputError, match=r"corrector.json: field 'format': .*; restore the file"):
        load_corrector_files(tmp_path)
