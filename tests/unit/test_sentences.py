"""Where sentences end while a text is being written, and what of a correction may leave before the answer has ended."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everalign.correction.edits import word_diff
from everalign.correction.engines import Begun
from everalign.correction.sentences import GrowingCorrection, SentenceSplitter, covered


def sentences(text, piece=1, least_bytes=1):
    """The sentences that are found while a text comes in pieces, and what is left of it."""
    splitter, found, start = SentenceSplitter(least_bytes), [], 0
    for cut in range(0, len(text), piece):
        splitter.add(text[cut : cut + piece])
        if splitter.end > start:
            found.append(text[start : splitter.end].lstrip())
            start = splitter.end
    assert splitter.text == text
    return found, text[start:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is here. Two is", ["One is here."]),
        ("Really?! Yes… Well", ["Really?!", "Yes…"]),
        ("He said “stop.” (He left!) So", ["He said “stop.”", "(He left!)"]),
        ("**Bold.** _Slanted._ Plain", ["**Bold.**", "_Slanted._"]),
        ("Pi is 3.14. It is not 3.15. Or", ["Pi is 3.14.", "It is not 3.15."]),
        ("At 10.30 we met. See https://a.org/b.html?c. Then", ["At 10.30 we met.", "See https://a.org/b.html?c."]),
        ("Dr. Smith, i.e. John F. Smith, knows. So", ["Dr. Smith, i.e. John F. Smith, knows."]),
        ("Am 3. Mai, z. B. vgl. S. 7, usw. Dann ja. Nun", ["Am 3. Mai, z. B. vgl. S. 7, usw. Dann ja."]),
        ("We use Yahoo! for this. It", ["We use Yahoo! for this."]),
        ("1. Boil it. 2. Eat it. Good", ["1. Boil it.", "2. Eat it."]),
        ("- Boil it.\n- Eat it.\n", ["- Boil it.", "- Eat it."]),
        ("A title\n\nA text that\ngoes on\n\n\nand on", ["A title", "A text that\ngoes on"]),
        ("第一句。第二句！“第三句。”第四", ["第一句。", "第二句！", "“第三句。”"]),
        ("नमस्ते। आप कैसे हैं। ठीक", ["नमस्ते।", "आप कैसे हैं।"]),
        ("هل أنت هنا؟ نعم. لا", ["هل أنت هنا؟", "نعم."]),
        ("Call `a. B` first. Then", ["Call `a. B` first."]),
        ("Run it:\n```py\na. B\n\nc. D\n```\n\nDone. So", ["Run it:\n```py\na. B\n\nc. D\n```", "Done."]),
        ("  ~~~\na. B\n```\nc. D\n", []),
        ("````\n```\na. B\n````\nSo it is. Yes", ["````\n```\na. B\n````\nSo it is."]),
        ("It ends.", []),
        ("It ends. ", []),
        ("It ends.\n", ["It ends."]),
        ("\n\n \n", []),
        ("😀 fun. 😀 more", ["😀 fun."]),
        ("Half \ud800 is here. So", ["Half \ud800 is here."]),
    ],
)  # fmt: skip
def test_where_sentences_end(text, expected):
    found, left = sentences(text)
    assert found == expected
    assert "".join("".join([*found, left]).split()) == "".join(text.split())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*"aB.!? \n`*)3。", "```", "\n\n", "Mr."]), max_size=40), st.integers(1, 9))
def test_the_same_ends_are_found_however_a_text_is_cut(parts, piece):
    text = "".join(parts)
    one_by_one, by_piece, whole = SentenceSplitter(1), SentenceSplitter(1), SentenceSplitter(1)
    ends = [0]
    for letter in text:
        one_by_one.add(letter)
        ends.append(one_by_one.end)
    for cut in range(0, len(text), piece):
        by_piece.add(text[cut : cut + piece])
    whole.add(text)
    assert one_by_one.end == by_piece.end == whole.end
    assert ends == sorted(ends)
    assert all(not text[:end] or not text[end - 1].isspace() for end in ends)


def test_short_sentences_are_joined_to_the_next():
    assert sentences("Yes. No. That is all of it. So", least_bytes=20)[0] == ["Yes. No. That is all of it."]
    assert sentences("はい。そうです、もちろんです。次", least_bytes=20)[0] == ["はい。そうです、もちろんです。"]


def test_a_long_row_of_stops_takes_linear_time():
    splitter = SentenceSplitter()
    splitter.add("." * 100_000 + "x " + "a." * 50_000 + " B")
    assert splitter.end == 200_002


def grown(*steps):
    """What leaves of each (piece of the answer, rest of the correction of all so far), and what it then stands for.

    The correction is None where no sentence has ended.
    """
    growing, left, covers = GrowingCorrection(1), [], []
    for piece, correction in steps:
        growing.add(piece)
        answer = growing.next_answer()
        assert (answer is None) == (correction is None)
        if answer is not None:
            left.append(growing.accept(answer, growing.begun.text + correction))
            assert growing.begun.text == "".join(left)
            covers.append(growing.begun.covers)
    return list(zip(left, covers, strict=True))


def test_what_leaves_of_corrections():
    assert grown(("It is", None), (" four. So", "It is four."), (" ", None), ("be it. An", " So be it.")) == [
        ("It is four.", 11),
        (" So be it.", 21),
    ]
    assert grown(("Boil it. Then", "Cook them.")) == [("Cook them.", 8)]
    # As many sentences as the answer has.
    assert grown(("Boil it. Then", "Gladly! Boil it."), (" eat. So", " Boil it. Then eat.")) == [
        ("Gladly!", 0),
        (" Boil it.", 8),
    ]
    assert grown(("Do this: boil it. Then", "Gladly! Boil it."), (" eat. So", " Boil it. Eat.")) == [
        ("Gladly!", 0),
        (" Boil it.", 17),
    ]
    # What is only appended waits: it may be a closing, which belongs behind what is still to come.
    assert grown(("Sure. Boil it. Then", "Boil it. Enjoy!"), (" eat. So", " Then eat. Enjoy!")) == [
        ("Boil it.", 14),
        (" Then eat.", 24),
    ]
    # A sentence that is left out, at the beginning and later.
    assert grown(("Sure. Boil", ""), (" it. Now", "Boil it.")) == [("", 0), ("Boil it.", 14)]
    assert grown(("Boil it. Sure. Now", "Boil it.\n"), (" eat. Now", " Now eat.")) == [
        ("Boil it.", 14),
        (" Now eat.", 23),
    ]
    assert grown(("Sure. Now", "Sure."), (" eat. I", ""), (" do. So", " I do.")) == [
        ("Sure.", 5),
        ("", 14),
        (" I do.", 20),
    ]


def test_the_rest_of_an_answer_follows_what_was_begun():
    assert Begun("It is four.", 8).with_rest("It is 4. So be it.") == "It is four. So be it."
    assert Begun("Gladly!", 0).with_rest("It is 4.") == "Gladly! It is 4."
    assert Begun("はい。", 0).with_rest("そうです。") == "はい。そうです。"
    assert Begun().with_rest("It is 4.") == "It is 4."


@settings(max_examples=100, deadline=None)
@given(st.text("ab. \n", max_size=12), st.text("ab. \n", max_size=12))
def test_a_beginning_stands_for_a_beginning_that_grows(before, after):
    segments = word_diff(before, after)
    found = [covered(segments, length) for length in range(len(after) + 1)]
    assert found == sorted(found)
    assert (found[-1], covered(word_diff(before, before), 1)) == (len(before) if segments else 0, min(1, len(before)))
