"""Every kind of file gives the same rows; every kind of damage is named."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from everalign.data.readers import load_preferences
from everalign.data.records import Preference
from everalign.errors import InputError
from tables_for_tests import lines, write_table

CHAT = [{"role": "user", "content": 'Grüße, "du"\nda?'}]
ROWS = [
    {"prompt": CHAT, "chosen": "Ja,\nbitte", "rejected": "Nein", "weight": 2.5, "source": "x"},
    {
        "prompt": [{"role": "system", "content": "S"}, *CHAT],
        "chosen": "a",
        "rejected": "b",
        "weight": 1.0,
        "source": "y",
    },
]
EXPECTED = [Preference.from_json(row, "expected") for row in ROWS]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the Hub was tried")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def write(path: Path, rows=ROWS) -> Path:
    return write_table(path, rows)


def problem(source, **options):
    with pytest.raises(InputError) as caught:
        load_preferences(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.csv", "a.parquet", "A.JSONL"])
def test_all_kinds_of_file_give_the_same_rows(tmp_path, name):
    path = write(tmp_path / "a.jsonl").rename(tmp_path / name) if name == "A.JSONL" else write(tmp_path / name)
    pairs = load_preferences(str(path))
    assert list(pairs) == EXPECTED
    assert [row.weight for row in pairs] == [2.5, 1.0]
    assert (pairs.source, pairs.skipped, pairs.ignored) == (str(path), (), ("source",))
    assert load_preferences(path).fingerprint == pairs.fingerprint


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_whole_conversations_without_a_prompt_column(tmp_path, name):
    answers = {side: [*CHAT, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert list(load_preferences(write(tmp_path / name, [answers]))) == [Preference(tuple(CHAT), "chosen", "rejected")]


def test_parquet_messages_as_json_text(tmp_path):
    path = write(tmp_path / "a.parquet", [{**ROWS[0], "prompt": json.dumps(CHAT)}])
    assert list(load_preferences(path)) == EXPECTED[:1]


def test_csv_text_that_begins_like_a_list_stays_text(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "[1, 2] is", "chosen": '[{"a": 1}]', "rejected": "a string"}])
    assert load_preferences(path)[0] == Preference("[1, 2] is", '[{"a": 1}]', "a string")


def test_csv_cells_above_the_default_limit_of_python(tmp_path):
    usual = csv.field_size_limit(100_000)
    path = write(tmp_path / "a.csv", [{"prompt": "p" * 200_000, "chosen": "a", "rejected": "b"}])
    assert len(load_preferences(path)[0].prompt) == 200_000
    assert csv.field_size_limit(usual) == 100_000


def test_bom_blank_lines_and_line_separators_inside_text(tmp_path):
    path = tmp_path / "a.jsonl"
    text = '\n{"prompt": "one\u2028two", "chosen": "a", "rejected": "b"}\r\n\r\n{"prompt": "q"}'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert problem(path).startswith(f"{path}:4: field 'chosen': no such column")
    assert load_preferences(path, skip_bad_rows=True)[0].prompt == "one\u2028two"
    for name, content in [("b.json", json.dumps(ROWS)), ("c.csv", "prompt,chosen,rejected\np,a,b\n")]:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert len(load_preferences(tmp_path / name)) > 0


BAD_LINES = [
    (b'{"prompt": "p", "chosen": "a"', ":2: broken JSON at character 30"),
    (
        b'[{"prompt": "p"}',
        ":2: broken JSON at character 17: Expecting ',' delimiter; a file with one JSON list belongs",
    ),
    (b"[1]", ":2: a row must be an object with columns, found a list"),
    (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', ":2: not UTF-8 (byte 0xff)"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "a"}', ":2: field 'rejected': equal to 'chosen'"),
    (
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "weight": NaN}',
        ":2: field 'weight': must be positive",
    ),
    ('{"prompt": "p"}'.encode("utf-16"), ":2: looks like UTF-16 (byte 0xff)"),
    (b"[" * 100_000, ":2: JSON that cannot be read"),
    (b'{"weight": ' + b"1" * 5000 + b"}", ":2: JSON that cannot be read"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES, ids=[str(i) for i in range(len(BAD_LINES))])
def test_bad_lines_stop_or_are_skipped_with_a_message(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    good = lines(ROWS).encode().splitlines(keepends=True)
    path.write_bytes(good[0] + line + b"\n" + good[1])
    assert problem(path).startswith(f"{path}{expected}")
    pairs = load_preferences(path, skip_bad_rows=True)
    assert list(pairs) == EXPECTED
    assert len(pairs.skipped) == 1
    assert pairs.skipped[0].startswith(f"{path}{expected}")
    assert pairs[:1].skipped == pairs.skipped


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_bad_rows_of_tables_and_lists_are_numbered(tmp_path, name):
    path = write(tmp_path / name, [ROWS[0], {**ROWS[1], "chosen": " "}])
    assert problem(path).startswith(f"{path}: row 2: field 'chosen': is empty")
    assert list(load_preferences(path, skip_bad_rows=True)) == EXPECTED[:1]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("p,a,b,heavy", "row 1: field 'weight': must be a number, found text"),
        ("p,a,b,0", "row 1: field 'weight': must be positive"),
        ("p,a,b", "row 1: 3 cells under 4 columns"),
        ("p,a, b,1,1", "row 1: 5 cells under 4 columns"),
        (
            "\"[{'role': 'user', 'content': 'x'}]\",a,b,1",
            "row 1: field 'prompt': looks like a list of messages but is",
        ),
    ],
)
def test_bad_csv_rows(tmp_path, cells, expected):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,chosen,rejected,weight\n{cells}\np,a,b,\n")
    assert problem(path).startswith(f"{path}: {expected}")
    assert list(load_preferences(path, skip_bad_rows=True)) == [Preference("p", "a", "b")]


DAMAGED = [
    ("a.jsonl", b"", "{}: no rows in it"),
    ("a.jsonl", b"\n \n", "{}: no rows in it"),
    ("a.json", b"", "{}: no rows in it"),
    ("a.json", b"[]", "{}: no rows in it"),
    ("a.json", b'[{"prompt": "p"},\n oops]', "{}:2: broken JSON: Expecting value"),
    (
        "a.json",
        b'{"prompt": "p"}\n{}',
        "{}:2: broken JSON: Extra data; one object a line belongs in a .jsonl file",
    ),
    ("a.json", b'{"prompt": "p"}', "{}: must hold a list of rows"),
    ("a.json", b'[\n{"prompt": "\xe9"}]', "{}:2: not UTF-8 (byte 0xe9)"),
    ("a.json", '[{"prompt": "p"}]'.encode("utf-16"), "{}:1: looks like UTF-16"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS * 500).encode())[:-40], "{}: the gzip archive is truncated"),
    ("a.jsonl.gz", lines(ROWS).encode(), "{}: damaged, or not gzip"),
    ("a.json.gz", gzip.compress(b"[]"), "{}: no rows in it"),
    ("a.csv", b"", "{}: no rows in it"),
    ("a.csv", b"prompt,chosen,rejected\n", "{}: no rows in it"),
    (
        "a.csv",
        b"prompt,chosen\np,a\n",
        "{}: field 'rejected': no such column (found: 'prompt', 'chosen'; expected",
    ),
    ("a.csv", b"prompt,chosen,rejected,chosen\n", "{}: field 'chosen': 2 columns have this name"),
    ("a.csv", b'prompt,chosen,rejected\n"p,a,b\np,a,b\n', "{}:3: broken CSV: unexpected end of data"),
    ("a.csv", b"prompt,chosen,rejected\np,\xe9,b\n", "{}:2: not UTF-8 (byte 0xe9)"),
    ("a.parquet", b"PAR1 no", "{}: damaged, or not a Parquet file"),
    ("a.parquet", b"", "{}: damaged, or not a Parquet file"),
    ("a.txt", b"x", "{}: unknown kind of file; the name must end in .json, .json.gz, .jsonl"),
]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("name", "content", "expected"), DAMAGED, ids=[str(i) for i in range(len(DAMAGED))])
def test_damaged_files(tmp_path, name, content, expected, skip):
    path = tmp_path / name
    path.write_bytes(content)
    message = problem(path, skip_bad_rows=skip)
    assert message.startswith(expected.format(path))


def test_table_without_a_column_names_those_it_has(tmp_path):
    path = write(tmp_path / "a.parquet", [{"question": "p", "chosen": "a", "rejected": "b"}])
    assert "field 'prompt': no such column; rename 'question'? (found: 'question', 'chosen'" in problem(path)


def test_skipping_every_row_is_an_error_that_quotes_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
    assert problem(path, skip_bad_rows=True).startswith(f"{path}: all 2 rows are bad, the first: {path}:1: field")


def test_directory_missing_file_and_split_of_a_file(tmp_path):
    assert problem(tmp_path).startswith(f"{tmp_path}: is a directory")
    path = write(tmp_path / "a.jsonl")
    assert "split='test' means nothing for a file" in problem(path, split="test")


@pytest.mark.parametrize("name", ["pairs.jsonl", "data/pairs.parquet", "./pairs", "a/b/c", "~/pairs", "/pairs", "x.gz"])
def test_what_looks_like_a_file_is_never_looked_for_on_the_hub(name):
    assert problem(name).endswith(": no such file")


def test_names_that_no_file_can_have(tmp_path, monkeypatch):
    assert problem("x" * 5000 + ".json").endswith(": no such file")
    assert problem(Path("owner/name")) == "owner/name: no such file"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert problem("here/pairs") == "here/pairs: no such file"


def test_hub_rows(monkeypatch):
    tried = []

    def load(name, split):
        tried.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    pairs = load_preferences("owner/pairs-v1.5", split="test")
    assert list(pairs) == EXPECTED
    assert pairs.source == "owner/pairs-v1.5"
    assert tried == [("owner/pairs-v1.5", "test")]


def test_bad_hub_row_and_columns_are_named(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([{**ROWS[0], "chosen": ""}])
    )
    assert problem("owner/x").startswith("owner/x[train]: row 1: field 'chosen': is empty")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([{"text": "a"}]))
    assert problem("owner/x").startswith("owner/x[train]: field 'chosen': no such column (found: 'text'")


def test_hub_offline_says_what_was_tried(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = problem("owner/no-such-pairs", split="test")
    assert message.startswith("owner/no-such-pairs: no such file, and from the Hugging Face Hub datasets.load_dataset(")
    assert "split='test') failed: ConnectionError" in message
    assert "or give a file" in message


def test_reading_json_loads_no_heavy_library():
    code = """if True:
        import sys, everalign.data
        everalign.data.load_preferences
        sys.exit(str({"torch", "datasets", "pyarrow"} & set(sys.modules) or 0))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr == "0\n"
