"""Labels of rows: read from a column of any kind of file, kept apart from the content, split into sets."""

from dataclasses import replace

import pytest

from everalign.data import PreferenceSet
from everalign.data.readers import (
    load_corrections,
    load_judged,
    load_preferences,
    load_prompts,
    load_scored,
    load_unscored,
)
from everalign.data.records import Correction, Preference, Scored
from everalign.errors import InputError
from tables_for_tests import write_table

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def pairs(*labels):
    return [{**PAIR, "prompt": f"q{i}", "customer": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_kind_of_file_has_labels(tmp_path, name):
    path = write_table(tmp_path / name, pairs("acme", " globex ", "acme"))
    rows = load_preferences(path, label="customer")
    assert [row.label for row in rows] == ["acme", "globex", "acme"]
    assert rows.ignored == ()
    plain = load_preferences(path)
    assert plain.ignored == ("customer",)
    assert plain.labels == []
    # A label is no part of what a row says.
    assert (rows.fingerprint, list(rows)) == (plain.fingerprint, list(plain))


@pytest.mark.parametrize(
    ("load", "columns"),
    [
        (load_preferences, PAIR),
        (load_judged, PAIR),
        (load_judged, {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0]}),
        (load_scored, {"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0]}),
        (load_unscored, PAIR),
        (load_unscored, {"prompt": "q", "completions": ["a", "b"]}),
        (load_prompts, {"prompt": "q"}),
        (load_corrections, {"question": "q", "answer": "a", "correction": "b"}),
    ],
)
def test_every_kind_of_row_has_labels(tmp_path, load, columns):
    path = write_table(tmp_path / "a.jsonl", [{**columns, "customer": 7}, {**columns, "customer": "7"}])
    rows = load(path, label="customer")
    assert [row.label for row in rows] == ["7", "7"]
    better = [row.preference() for row in rows]
    assert all(row is None or row.label == "7" for row in better)
    write_table(path, [columns])
    with pytest.raises(InputError, match=r"a.jsonl:1: field 'customer': no such column"):
        load(path, label="customer")


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (None, "must be text, found null"),
        ("", "is empty; fill it in or remove the row"),
        (" \t", "is empty"),
        (1.5, "must be text, found a number"),
        (True, "must be text, found a boolean"),
        (["acme"], "must be text, found a list"),
    ],
)
def test_a_row_without_a_label_is_named_with_its_column(tmp_path, label, problem):
    path = write_table(tmp_path / "a.jsonl", pairs("acme", label))
    with pytest.raises(InputError, match=f"a.jsonl:2: field 'customer': {problem}") as caught:
        load_preferences(path, label="customer")
    assert caught.value.field == "customer"
    rows = load_preferences(path, label="customer", skip_bad_rows=True)
    assert [row.label for row in rows] == ["acme"]
    assert problem in rows.skipped[0]


def test_a_table_without_the_column_is_refused_once_for_all_rows(tmp_path):
    path = write_table(tmp_path / "a.csv", pairs("acme"))
    with pytest.raises(InputError, match=r"a.csv: field 'costumer': no such column; rename 'customer'\?"):
        load_preferences(path, label="costumer")


def test_a_column_of_the_rows_own_holds_no_labels(tmp_path):
    path = write_table(tmp_path / "a.jsonl", pairs("acme"))
    with pytest.raises(InputError, match="label: 'chosen' is read as a part of every row: name a column"):
        load_preferences(path, label="chosen")


@pytest.mark.parametrize("label", ["", 7])
def test_records_check_their_label(label):
    for make in (
        lambda: Preference("q", "a", "b", label=label),
        lambda: Scored("q", label=label),
        lambda: Correction("q", label=label),
    ):
        with pytest.raises(InputError, match="field 'label'"):
            make()


def test_sets_are_split_by_label_in_the_order_of_first_rows():
    rows = PreferenceSet.of([PAIR | {"prompt": f"q{i}"} for i in range(4)], "rows.jsonl")
    named = tuple(replace(row, label=label) for row, label in zip(rows, "baba", strict=True))
    parts = PreferenceSet(named, "rows.jsonl", ("one was bad",), ("column",)).by_label()
    assert {label: [row.prompt for row in part] for label, part in parts.items()} == {
        "b": ["q0", "q2"],
        "a": ["q1", "q3"],
    }
    assert [part.source for part in parts.values()] == ["rows.jsonl (b)", "rows.jsonl (a)"]
    one = PreferenceSet(named[::2], "rows.jsonl")
    assert one.by_label() == {"b": one}
    assert rows.by_label() == {}
    with pytest.raises(InputError, match=r"rows.jsonl: row 3: field 'label': is null, and other rows have one"):
        PreferenceSet((*named[:2], rows[2]), "rows.jsonl").by_label()
