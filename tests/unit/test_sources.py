"""Columns with other names, tab-separated files, and tables in memory."""

import json
from pathlib import Path

import pytest

from everalign.data import load_corrections, load_preferences, load_scored
from everalign.data.readers import load_judged, parse_columns, renamed
from everalign.errors import InputError

PAIR = {"question": "Is the sea salty?", "better": "Yes.", "worse": "No.", "w": 2.0}
COLUMNS = {"prompt": "question", "chosen": "better", "rejected": "worse", "weight": "w"}
PREFERENCE = {"prompt": PAIR["question"], "chosen": "Yes.", "rejected": "No."}


def written(path: Path, rows: list[dict]) -> Path:
    """The rows in the format that the file's name says."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [rows[0].keys(), *(map(str, row.values()) for row in rows)]
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_columns_of_other_names(suffix, tmp_path):
    rows = load_preferences(written(tmp_path / f"pairs{suffix}", [PAIR, {**PAIR, "better": "It is."}]), columns=COLUMNS)
    assert [row.to_json() for row in rows] == [
        {**PREFERENCE, "weight": 2.0},
        {**PREFERENCE, "chosen": "It is.", "weight": 2.0},
    ]
    assert (rows.ignored, rows.columns) == ((), COLUMNS)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(suffix, tmp_path):
    path = written(tmp_path / f"pairs{suffix}", [PAIR])
    with pytest.raises(InputError, match=r"field 'query': no such column.*\(found: 'question', 'better', 'worse', 'w'"):
        load_preferences(path, columns={**COLUMNS, "prompt": "query"})


def test_a_bad_row_names_the_column_as_the_file_has_it():
    with pytest.raises(InputError, match=r"memory: row 1: field 'rejected' \(column 'worse'\): equal to 'chosen'"):
        load_preferences([{**PAIR, "worse": "Yes."}], columns=COLUMNS)


def test_a_column_of_ours_that_another_one_stands_for_is_not_read():
    rows = load_preferences([{**PREFERENCE, "text": "Is it?"}], columns={"prompt": "text"})
    assert rows[0].prompt == "Is it?"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "q"}, "no column 'promt' is read: did you mean 'prompt'?"),
        ({"xyzzy": "q"}, "no column 'xyzzy' is read: known are prompt, chosen"),
        ({"prompt": "q", "chosen": "q"}, "one column of the source is given for two columns"),
    ],
)
def test_columns_that_cannot_be(columns, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        renamed("pairs.csv", columns)


@pytest.mark.parametrize("text", ["", "prompt", "prompt=", "=q", "prompt=q,", "prompt=q,prompt=r"])
def test_a_text_that_names_no_columns(text):
    with pytest.raises(InputError, match=r"columns: "):
        parse_columns(text)


def test_scored_rows_and_corrections():
    scored = load_scored(
        [{"question": "q", "answers": ["a", "b"], "scores": [1, 0]}],
        columns=parse_columns("prompt=question, completions=answers, rewards=scores"),
    )
    assert (scored[0].completions, scored[0].rewards) == (("a", "b"), (1.0, 0.0))
    edits = load_corrections([{"q": "q", "answer": "a", "edit": "b"}], columns={"question": "q", "correction": "edit"})
    assert edits[0].correction == "b"


def test_the_kind_of_rows_is_told_by_the_columns_meant():
    rows = renamed([PAIR], COLUMNS)
    assert load_judged(rows)[0].chosen == "Yes."


def test_a_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([PAIR, {**PAIR, "w": None, "better": "It is."}])
    rows = load_preferences(frame, columns=COLUMNS)
    assert [row.weight for row in rows] == [2.0, 1.0]
    assert rows.source == "memory"
    lists = pandas.DataFrame({"prompt": ["q"], "completions": [["a", "b"]], "rewards": [[1.0, 0.0]]})
    assert load_scored(lists)[0].rewards == (1.0, 0.0)
    with pytest.raises(InputError, match="memory: field 'chosen': no such column; rename 'better'"):
        load_preferences(frame)
    frame.loc[1, "worse"] = None
    with pytest.raises(InputError, match=r"memory: row 2: field 'rejected' \(column 'worse'\): must be text"):
        load_preferences(frame, columns=COLUMNS)


def test_a_dataset_and_one_with_splits():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([PAIR])
    assert load_preferences(dataset, columns=COLUMNS)[0].weight == 2.0
    with pytest.raises(InputError, match="the dataset has the splits 'train', 'test': give one of them"):
        load_preferences(datasets.DatasetDict({"train": dataset, "test": dataset}))


def test_records_are_taken_as_they_are():
    rows = load_preferences([PREFERENCE])
    assert load_preferences(list(rows)).fingerprint == rows.fingerprint


@pytest.mark.parametrize("source", [3, None, {"prompt": "q"}, iter([PREFERENCE]), b"pairs.csv"])
def test_what_holds_no_rows(source):
    with pytest.raises(InputError, match=r"rows cannot be read from .*: give the path of a file"):
        load_preferences(source)


def test_an_empty_list_and_bad_rows():
    with pytest.raises(InputError, match="memory: no rows in it"):
        load_preferences([])
    with pytest.raises(InputError, match="memory: row 2: a row must be an object with columns, found text"):
        load_preferences([PREFERENCE, "row"])
    rows = load_preferences([PREFERENCE, "row"], skip_bad_rows=True)
    assert (len(rows), len(rows.skipped)) == (1, 1)


def test_a_broken_tab_separated_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("prompt\tchosen\trejected\na\tb\n")
    with pytest.raises(InputError, match=r"pairs.tsv: row 1: 2 cells under 3 columns; quote the cells that hold tabs"):
        load_preferences(path)
