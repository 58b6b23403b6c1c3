"""Reference log-probabilities: batches, the cache on disk, and what names a policy."""

import dataclasses
import hashlib
import sqlite3
from contextlib import closing

import pytest
import torch

from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.memory import LowRankUpdate
from everalign.storage import Journal
from everalign.training.reference import ReferenceCache, policy_key, sequence_logprobs
from models_for_tests import perturb, random_pairs, random_policy, random_targets, random_updates


class Counted:
    """A policy that counts the sequences it is asked for."""

    def __init__(self, policy):
        self.policy, self.sequences = policy, 0

    def __call__(self, batch):
        self.sequences += len(batch["lengths"])
        return self.policy(batch)

    def __getattr__(self, name):
        return getattr(self.policy, name)


@pytest.fixture
def policy():
    return Counted(perturb(random_policy()))


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache")


def the_file(tmp_path):
    (path,) = (tmp_path / "cache").iterdir()
    return path


def flat(values):
    return values.flatten() if isinstance(values, torch.Tensor) else torch.cat(list(values))


def close(first, second):
    torch.testing.assert_close(flat(first), flat(second), rtol=0, atol=1e-5)


def equal(first, second):
    return torch.equal(flat(first), flat(second))


# ---- sequence_logprobs ----


def test_values_come_back_in_the_order_of_the_rows(policy):
    pairs = random_pairs(7)
    with torch.no_grad():
        sums = policy.policy(collate(pairs, shared=False))
    for tokens in (1, 100, 10_000):
        values = sequence_logprobs(policy, pairs, tokens)
        assert values[0].dtype == torch.float32
        close(values, sums)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_gradient_is_kept(policy, training):
    policy.policy.train(training)
    done = []
    values = sequence_logprobs(policy, random_pairs(5), 80, progress=done.append)
    assert policy.policy.training is training
    assert not any(value.requires_grad for value in values)
    assert sum(done) == 5
    assert len(done) > 1


# ---- the cache ----


def test_cached_values_are_the_fresh_ones_to_the_bit(policy, cache, tmp_path):
    pairs = random_pairs(6)
    fresh = sequence_logprobs(policy, pairs, 160)
    first = cache.logprobs(policy, "key", pairs, 160)
    again = ReferenceCache(tmp_path / "cache").logprobs(policy, "key", pairs, 160)
    assert equal(first, fresh)
    assert equal(again, fresh)


def test_only_missing_rows_are_computed(policy, cache):
    pairs = random_pairs(9)
    cache.logprobs(policy, "key", pairs[:4], 160)
    assert policy.sequences == 2 * 4
    cache.logprobs(policy, "key", pairs[:4], 160)
    assert policy.sequences == 2 * 4
    values = cache.logprobs(policy, "key", [pairs[6], pairs[1], pairs[5], pairs[1]], 160)
    assert policy.sequences == 2 * 6
    close(values, sequence_logprobs(policy, [pairs[6], pairs[1], pairs[5], pairs[1]], 160))


def test_replayed_rows_are_shared_whatever_their_id_and_weight(policy, cache):
    pairs = random_pairs(4)
    cache.logprobs(policy, "key", pairs, 160)
    policy.sequences = 0
    replayed = [dataclasses.replace(pair, id=f"again{pair.id}", weight=0.5) for pair in pairs]
    cache.logprobs(policy, "key", replayed, 160)
    assert policy.sequences == 0


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_a_row_is_known_by_all_its_tokens(policy, cache, part):
    (pair,) = random_pairs(1)
    cache.logprobs(policy, "key", [pair], 160)
    policy.sequences = 0
    parts = {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}
    other = TokenizedRow.pair("other", **{**parts, part: [*parts[part], 5]})
    close(cache.logprobs(policy, "key", [other], 160), sequence_logprobs(policy.policy, [other], 160))
    assert policy.sequences == 2


def test_a_row_that_occurs_twice_is_computed_once(policy, cache):
    pairs = random_pairs(2)
    values = cache.logprobs(policy, "key", [pairs[0], pairs[1], pairs[0]], 160)
    assert policy.sequences == 2 * 2
    assert torch.equal(values[0], values[2])


def test_another_policy_has_another_file(policy, cache, tmp_path):
    pairs = random_pairs(3)
    other = Counted(perturb(random_policy(), seed=5))
    first = cache.logprobs(policy, policy_key("base", policy.total()), pairs, 160)
    second = cache.logprobs(other, policy_key("base", other.total()), pairs, 160)
    assert other.sequences == 2 * 3
    assert (flat(first) - flat(second)).abs().max() > 1e-2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _execute(path, *statements):
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


def _change_a_value(path):
    _execute(path, "UPDATE entries SET value = '[-1.0, -2.0]' WHERE rowid = 2")


def _exchange_two(path):
    _execute(
        path,
        "UPDATE entries SET (value, checksum) = (SELECT value, checksum FROM entries WHERE rowid = 3) WHERE rowid = 2",
    )


def _drop_the_table(path):
    _execute(path, "DROP TABLE entries")


@pytest.mark.parametrize(
    "spoil", [_cut, _change_a_value, _exchange_two, _drop_the_table, lambda path: path.write_bytes(b"half a file")]
)
def test_a_damaged_file_is_named_and_never_used(policy, cache, tmp_path, spoil):
    pairs = random_pairs(3)
    expected = cache.logprobs(policy, "key", pairs, 160)
    path = the_file(tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=rf"{path}: .*: delete this file"):
        cache.logprobs(policy, "key", pairs, 160)
    path.unlink()
    assert equal(cache.logprobs(policy, "key", pairs, 160), expected)


def test_what_is_not_finite_is_not_kept(policy, cache, monkeypatch):
    pairs = random_pairs(3)
    broken = list(torch.tensor([[-1.0, -2.0], [float("nan"), -1.0], [-1.0, float("-inf")]]))
    with monkeypatch.context() as patch:
        patch.setattr("everalign.training.reference.sequence_logprobs", lambda *_: broken)
        torch.testing.assert_close(cache.logprobs(policy, "key", pairs, 160), broken, equal_nan=True)
    cache.logprobs(policy, "key", pairs, 160)
    assert policy.sequences == 2 * 2


def test_two_that_compute_at_the_same_time_lose_nothing(policy, cache, tmp_path, monkeypatch):
    pairs, other = random_pairs(6), ReferenceCache(tmp_path / "cache")

    def meanwhile(*arguments):
        monkeypatch.undo()
        other.logprobs(policy, "key", pairs[3:], 160)
        return sequence_logprobs(*arguments)

    monkeypatch.setattr("everalign.training.reference.sequence_logprobs", meanwhile)
    cache.logprobs(policy, "key", pairs[:3], 160)
    policy.sequences = 0
    close(cache.logprobs(policy, "key", pairs, 160), sequence_logprobs(policy.policy, pairs, 160))
    assert policy.sequences == 0


# ---- groups ----


def test_values_of_groups_come_back_in_the_order_of_the_rows(policy):
    groups = random_targets(7)
    with torch.no_grad():
        sums = policy.policy(collate(groups, shared=False))
    expected = torch.split(sums, [len(group.responses) for group in groups])
    for tokens in (1, 100, 10_000):
        values = sequence_logprobs(policy, groups, tokens)
        for found, wanted in zip(values, expected, strict=True):
            close(found, wanted)
    assert sequence_logprobs(policy, [], 100) == []


def test_cached_values_of_groups_are_the_fresh_ones_to_the_bit(policy, cache, tmp_path):
    groups = random_targets(6)
    fresh = sequence_logprobs(policy, groups, 160)
    first = cache.logprobs(policy, "key", groups, 160)
    computed = policy.sequences
    again = ReferenceCache(tmp_path / "cache").logprobs(policy, "key", groups, 160)
    assert policy.sequences == computed
    for values in zip(fresh, first, again, strict=True):
        assert all(torch.equal(values[0], other) for other in values[1:])


def test_a_response_is_known_by_its_prompt_and_its_tokens(policy, cache):
    """In whatever group it stands, with whatever share; a group with a new response is computed as a whole."""
    group = TokenizedRow("a", [3, 4], ([5, 6], [7], [8, 9]), (0.5, 0.25, 0.25), 1.0)
    cache.logprobs(policy, "key", [group, group], 160)
    assert policy.sequences == 3
    part = TokenizedRow("b", [3, 4], ([8, 9], [7], [8, 9]), (0.9, 0.1, 0.0), 2.0)
    (found,) = cache.logprobs(policy, "key", [part], 160)
    assert policy.sequences == 3
    close(found, sequence_logprobs(policy.policy, [part], 160)[0])
    other = [
        dataclasses.replace(group, prompt=[3, 4, 5], responses=([6], [7])),
        dataclasses.replace(group, responses=([5, 6], [5, 7])),
    ]
    found = cache.logprobs(policy, "key", other, 160)
    assert policy.sequences == 3 + 4
    for values, wanted in zip(found, sequence_logprobs(policy.policy, other, 160), strict=True):
        close(values, wanted)


def test_pairs_and_groups_of_a_policy_share_its_file(policy, cache, tmp_path):
    pairs = random_pairs(3)
    groups = [TokenizedRow(p.id, p.prompt, (p.rejected, p.chosen), (0.0, 2.0)) for p in pairs]
    expected = cache.logprobs(policy, "key", pairs, 160)
    policy.sequences = 0
    found = cache.logprobs(policy, "key", groups, 160)
    assert policy.sequences == 0
    assert all(torch.equal(values, other.flip(0)) for values, other in zip(found, expected, strict=True))
    assert the_file(tmp_path).name == "reference-key.sqlite"


def test_what_an_earlier_format_kept_of_pairs_is_computed_anew(policy, cache, tmp_path):
    """Former files hold two numbers under a key of prompt, chosen and rejected."""
    pairs = random_pairs(3)
    content = [repr((p.prompt, p.chosen, p.rejected)).encode() for p in pairs]
    old = {hashlib.sha256(each).hexdigest()[:32]: [-1.0, -2.0] for each in content}
    Journal(tmp_path / "cache" / "reference-key.sqlite").put(old)
    close(cache.logprobs(policy, "key", pairs, 160), sequence_logprobs(policy.policy, pairs, 160))


@pytest.mark.parametrize("spoil", [_cut, _drop_the_table])
def test_a_damaged_file_of_groups_is_named(policy, cache, tmp_path, spoil):
    cache.logprobs(policy, "key", random_targets(3), 160)
    path = the_file(tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=rf"{path}: .*: delete this file"):
        cache.logprobs(policy, "key", random_targets(3), 160)


# ---- what names a policy ----


def test_a_key_names_base_model_and_every_value():
    policy = random_policy()
    updates = random_updates(policy)
    changed = dict(updates)
    name = sorted(updates)[-1]
    left = updates[name].left.clone()
    left[-1, -1] += 1e-6
    changed[name] = LowRankUpdate(left, updates[name].right)
    swapped = dict(updates)
    one, two = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    swapped[one], swapped[two] = updates[two], updates[one]
    keys = [policy_key("a", updates), policy_key("b", updates), policy_key("a", changed), policy_key("a", swapped)]
    assert len({*keys, policy_key("a", {})}) == 5
    assert policy_key("a", dict(reversed(updates.items()))) == keys[0]


def test_a_key_names_the_modules():
    update = LowRankUpdate(torch.ones(4, 1), torch.ones(1, 4))
    assert policy_key("a", {"k_proj": update}) != policy_key("a", {"v_proj": update})


def test_a_fresh_adapter_is_the_base_model():
    policy = random_policy()
    assert policy_key("a", policy.total()) == policy_key("a", {})
    assert policy_key("a", perturb(policy).total()) != policy_key("a", {})
