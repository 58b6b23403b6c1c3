"""Sets of preferences made in Python: slices, fingerprints, and rows shared by two sets."""

import pytest

from everalign.data.readers import check_disjoint
from everalign.data.records import Preference, PreferenceSet
from everalign.errors import InputError

CHAT = [{"role": "user", "content": "Hello?"}]
ROWS = [
    {"prompt": CHAT, "chosen": "Yes", "rejected": "No", "weight": 2.5, "source": "x"},
    {"prompt": "Once", "chosen": " upon", "rejected": " more"},
]
EXPECTED = [Preference.from_json(row, "expected") for row in ROWS]


def test_set_made_in_python_slices_and_names_bad_rows():
    pairs = PreferenceSet.of([EXPECTED[0], ROWS[1]], source="mine")
    assert list(pairs) == EXPECTED
    assert pairs[-1] == EXPECTED[1]
    assert isinstance(pairs[:1], PreferenceSet)
    assert (list(pairs[::-1]), pairs[:1].source) == (EXPECTED[::-1], "mine")
    with pytest.raises(InputError, match=r"^mine: row 2: field 'rejected': no such column"):
        PreferenceSet.of([ROWS[0], {"prompt": "p", "chosen": "a"}], source="mine")


def test_fingerprint_depends_on_content_order_and_weight_only():
    pairs = PreferenceSet.of(ROWS)
    assert pairs.fingerprint == PreferenceSet.of(ROWS, source="other").fingerprint
    changed = [pairs[::-1], pairs[:1], PreferenceSet.of([{**ROWS[0], "weight": 1}, ROWS[1]])]
    assert len({pairs.fingerprint, *(other.fingerprint for other in changed)}) == 4


def test_repeated_rows_are_kept():
    assert len(PreferenceSet.of([ROWS[0], ROWS[0]])) == 2


def test_check_disjoint():
    rows = [Preference(f"p{i}", "a", "b") for i in range(9)]
    train, test = (
        PreferenceSet.of(rows[:7], "train.jsonl"),
        PreferenceSet.of([*rows[2:], rows[2]], "test.jsonl"),
    )
    assert check_disjoint(rows[:4], rows[4:]) == ()
    with pytest.raises(InputError) as caught:
        check_disjoint(train, test)
    first = ", ".join(row.id for row in rows[2:5])
    assert "train.jsonl and test.jsonl: 5 rows are in both" in str(caught.value)
    assert f"(ids {first}, ...)" in str(caught.value)
    assert check_disjoint(train, test, allow=True) == tuple(row.id for row in rows[2:7])
