"""Tokens on disk: read instead of made again, under a name that knows everything they depend on."""

import dataclasses
import re

import pytest
from safetensors.torch import load_file, save_file

from everalign.data import encoding_cache
from everalign.data.encoding import encode_pairs
from everalign.data.encoding_cache import EncodingCache
from everalign.data.records import Preference
from everalign.errors import InputError
from tokenizers_for_tests import CHATML, NO_SYSTEM, byte_tokenizer

CHAT = ({"role": "user", "content": "Hi"},)
ROWS = [
    Preference("Say hello.", "Hello!", "Go away."),
    Preference(CHAT, "Yes " * 30, "No", weight=0.5),
    Preference("A very long question. " * 5, "ja", "nein"),
]


@pytest.fixture
def made(monkeypatch):
    """Number of rows that were tokenised, call by call."""
    calls = []

    def counted(rows, *arguments):
        calls.append(len(rows))
        return encode_pairs(rows, *arguments)

    monkeypatch.setattr(encoding_cache, "encode_pairs", counted)
    return calls


def splitting(tokenizer):
    """Special tokens in a text are text."""
    tokenizer.split_special_tokens = True
    return tokenizer


def the_file(folder):
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []], ids=["three", "one", "none"])
def test_what_is_read_is_what_was_made(tmp_path, made, rows):
    tokenizer = byte_tokenizer(CHATML)
    expected = encode_pairs(rows, tokenizer, 60)
    assert EncodingCache(tmp_path).encode(rows, tokenizer, 60) == expected
    again = EncodingCache(tmp_path).encode(rows, tokenizer, 60)
    assert (again, again.fingerprint, made) == (expected, expected.fingerprint, [len(rows)])
    if len(rows) == 3:
        assert (again.truncated_prompts, again.truncated_responses) == (2, 1)


def test_the_weight_is_the_row_s_own_and_the_answer_the_file_s(tmp_path, made):
    cache, tokenizer = EncodingCache(tmp_path), byte_tokenizer()
    cache.encode(ROWS, tokenizer, 60)
    heavier = [dataclasses.replace(row, weight=3.0) for row in ROWS]
    assert cache.encode(heavier, tokenizer, 60) == encode_pairs(heavier, tokenizer, 60)
    assert made == [3]


@pytest.mark.parametrize(
    "change",
    [
        {"rows": ROWS[::-1]},
        {"rows": ROWS[:2]},
        {"rows": [*ROWS[:2], Preference("A very long question. " * 5, "ja", "nein!")]},
        {"tokenizer": byte_tokenizer(NO_SYSTEM)},
        {"tokenizer": byte_tokenizer(CHATML, bos="<s>", adds="<s> $A")},
        {"tokenizer": splitting(byte_tokenizer(CHATML))},
        {"max_length": 61},
    ],
    ids=["order", "fewer", "other text", "template", "special tokens", "split special tokens", "length"],
)
def test_anything_that_matters_has_another_file(tmp_path, made, change):
    cache, usual = EncodingCache(tmp_path), {"rows": ROWS, "tokenizer": byte_tokenizer(CHATML), "max_length": 60}
    cache.encode(**usual)
    other = {**usual, **change}
    assert cache.encode(**other) == encode_pairs(*other.values())
    assert (len(made), len(list(tmp_path.iterdir()))) == (2, 2)


def test_a_template_that_reads_the_clock_is_never_cached(tmp_path, made):
    tokenizer = byte_tokenizer("{{ strftime_now('%Y') }}" + CHATML)
    for _ in range(2):
        EncodingCache(tmp_path / "cache").encode(ROWS, tokenizer, 60)
    assert (made, (tmp_path / "cache").exists()) == ([3, 3], False)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _change_a_token(path):
    stored = load_file(path)
    stored["tokens"][2] += 1
    save_file(stored, path)


def _swap_names(path):
    stored = load_file(path)
    save_file({**stored, "tokens": stored["lengths"], "lengths": stored["tokens"]}, path)


@pytest.mark.parametrize("spoil", [_cut, _change_a_token, _swap_names, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_named_and_never_used(tmp_path, spoil):
    cache, tokenizer = EncodingCache(tmp_path), byte_tokenizer()
    cache.encode(ROWS, tokenizer, 60)
    spoil(the_file(tmp_path))
    expected = f"{re.escape(str(the_file(tmp_path)))}: the cache of encoded rows is damaged .*: delete this file"
    with pytest.raises(InputError, match=expected):
        cache.encode(ROWS, tokenizer, 60)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(tensors, path):
        raise OSError("no space left on device")

    monkeypatch.setattr("everalign.tensor_files.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        EncodingCache(tmp_path).encode(ROWS, byte_tokenizer(), 60)
    assert list(tmp_path.iterdir()) == []
