"""What is kept of unfinished work: values by key, and lines in order."""

import pytest

from everalign.errors import InputError
from everalign.keyed_store import KeyedStore
from everalign.line_store import LineStore
from everalign.modeling.kept_samples import sample_kept
from everalign.modeling.sampling import SamplingOptions


def test_texts_are_kept_by_key(tmp_path):
    store = KeyedStore(tmp_path / "folder" / "store", "reply", "TEXT")
    assert store.read(["a"]) == {}
    assert not store.path.parent.exists()
    store.add("a", "one")
    store.add("b", "½\n")
    store.add("a", "two")
    assert store.read(["a", "b", "c"]) == {"a": "two", "b": "½\n"}
    store.remove()
    assert store.read(["a"]) == {}


def test_lines_are_kept_in_order_and_a_cut_one_is_dropped(tmp_path):
    store = LineStore.beside(tmp_path / "out.jsonl", "key")
    assert store.read() == []
    store.add([[1, "½"], {"a": None}])
    store.add(["\u2028"])
    with store.path.open("ab") as file:
        file.write(b'["cu')
    assert store.read() == [[1, "½"], {"a": None}, "\u2028"]
    store.add([4])
    assert store.read()[-1] == 4
    assert LineStore.beside(tmp_path / "out.jsonl", "other").read() == []
    store.path.write_text("oops\n")
    with pytest.raises(InputError, match=r"out\.jsonl\.\w+\.partial: what an earlier run kept is damaged: delete"):
        store.read()


@pytest.mark.parametrize("line", ["3", "[3]", "[[[], 0], [[], 0]]"])
def test_samples_that_are_none_are_refused(line, tmp_path):
    store = LineStore(tmp_path / "samples")
    store.path.write_text(f"{line}\n")
    with pytest.raises(InputError, match="samples: what an earlier run kept is damaged"):
        sample_kept(None, None, ["p"], SamplingOptions(), store, seed=0)
