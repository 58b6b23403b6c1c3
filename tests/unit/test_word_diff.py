"""Word diffs: both texts can be put together again, changes are whole phrases, and nothing in them is markup."""

import random
import time

import pytest

from everalign.correction.edits import Segment, diff_html, diff_text, edit_share, word_diff, words

CASES = {
    "a word": ("Boil them now.", "Boil them later."),
    "nothing": ("the same  text\n", "the same  text\n"),
    "both empty": ("", ""),
    "from empty": ("", "All of it is new."),
    "to empty": ("All of it is old.", ""),
    "only spaces": ("a b", "a  b\n"),
    "spaces alone": ("  ", "\t"),
    "ends": (" x ", "x"),
    "kana and kanji": ("東京は大きい。", "京都は小さい。"),
    "mixed scripts": ("I love 東京 today", "I loved 東京都 today!"),
    "marks": ("<b>no</b> & 'x'", '<i>no</i> && "x"'),
    "letters with parts": ("cafe\u0301 naïve", "cafe naïve 👩\u200d🚀"),
}


def texts(segments):
    before = "".join(segment.text for segment in segments if segment.kind != "added")
    return before, "".join(segment.text for segment in segments if segment.kind != "removed")


@pytest.mark.parametrize(("before", "after"), CASES.values(), ids=CASES)
def test_both_texts_can_be_put_together_again(before, after):
    segments = word_diff(before, after)
    assert texts(segments) == (before, after)
    assert all(segment.text for segment in segments)


def test_random_texts_can_be_put_together_again_too():
    rng = random.Random(0)
    alphabet = ["ab", "cd", " ", "\n", ".", "語", "  ", "é"]
    for _ in range(300):
        before, after = ("".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(2))
        assert texts(word_diff(before, after)) == (before, after)


def test_equal_texts_are_one_segment_and_empty_ones_none():
    assert word_diff("as it was", "as it was") == (Segment("same", "as it was"),)
    assert word_diff("", "") == ()


def test_a_replaced_phrase_is_one_change():
    assert word_diff("Do this: bake it. Be quick.", "With pleasure! Bake it. Be quick.") == (
        Segment("removed", "Do this: bake"),
        Segment("added", "With pleasure! Bake"),
        Segment("same", " it. Be quick."),
    )


def test_a_short_word_between_two_larger_changes_belongs_to_them():
    assert word_diff("Write a label.", "Have a dinner!") == (
        Segment("removed", "Write a label."),
        Segment("added", "Have a dinner!"),
    )
    kept = [segment.text for segment in word_diff("no everything no", "yes everything yes") if segment.kind == "same"]
    assert kept == [" everything "]


def test_a_word_is_not_split():
    assert word_diff("walking", "walked") == (Segment("removed", "walking"), Segment("added", "walked"))


def test_scripts_without_spaces_are_compared_letter_by_letter():
    assert word_diff("私は東京に住む", "私は京都に住む") == (
        Segment("same", "私は"),
        Segment("removed", "東"),
        Segment("same", "京"),
        Segment("added", "都"),
        Segment("same", "に住む"),
    )


def test_changed_white_space_is_a_change():
    assert word_diff("a b", "a\nb") == (
        Segment("same", "a"),
        Segment("removed", " "),
        Segment("added", "\n"),
        Segment("same", "b"),
    )


def test_html_is_escaped_and_keeps_white_space():
    found = diff_html(word_diff("<b>hi</b>  {x}\n", "<script>hi</script>  {x}\n"))
    assert found == ("&lt;<del>b</del><ins>script</ins>&gt;hi&lt;/<del>b</del><ins>script</ins>&gt;  {x}\n")
    assert "&#34;&amp;&#39;" in diff_html(word_diff("", "\"&'"))


def test_terminal_text_is_styled_and_no_markup():
    text = diff_text(word_diff("[red]no[/red] more", "[red]yes[/red] more"))
    assert text.plain == "[red]noyes[/red] more"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans if span.style] == [
        ("no", "red strike"),
        ("yes", "green"),
    ]


def test_without_colours_changes_are_marked():
    assert diff_text(word_diff("It is no.", "It is yes."), marks=True).plain == "It is [-no-]{+yes+}."


def test_long_texts_of_common_words_take_no_long_time():
    rng = random.Random(0)
    words = [rng.choice(["the", "a", "of", "rice", "water", "salt", str(i)]) for i in range(3000)]
    changed = [word if rng.random() > 0.1 else "new" for word in words]
    started = time.perf_counter()
    assert len(word_diff(" ".join(words), " ".join(changed))) > 100
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [("a b c", "a b c", 0.0), ("a b", "c d", 1.0), ("a b c d", "a b c e", 0.25), ("a", "a b c", 2 / 3)],
)
def test_edits_are_measured_in_words(first, second, share):
    assert edit_share(words(first), words(second)) == pytest.approx(share)
