"""Estimates: sizes and work against what training itself counts, formulas against torch's own counter, and value."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from everalign.data.collate import collate, training_plan
from everalign.data.replay import ReplayBuffer
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.estimate.machines import MACHINES, Layout, find_machine
from everalign.estimate.prediction import Clock, Range, predicted_memory
from everalign.estimate.shape import (
    Saved,
    meta_policy,
    model_from_config,
    saved_bytes,
    saved_bytes_on_cpu,
    shape_of,
)
from everalign.estimate.value import Value, WinRate, parse_api_price, read_win_rate
from everalign.estimate.work import Rows, Work, pooled, work_of_batches
from everalign.learning.options import AdapterOptions
from everalign.modeling.loading import load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import SavedBytes
from everalign.training.objectives import make_objective
from models_for_tests import FAMILIES, random_model

ADAPTER = AdapterOptions(rank=4, alpha=8.0)


def pairs(count: int, prompt: int = 12, answer: int = 8) -> list[TokenizedRow]:
    return [
        TokenizedRow.pair(str(i), [3 + (i + k) % 80 for k in range(prompt)], [5] * answer, [6] * (answer - i % 3))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(random_model("llama"), ADAPTER.rank, ADAPTER.alpha)


@pytest.fixture(scope="module")
def empty() -> Policy:
    model = random_model("llama")
    return meta_policy(model.to("meta"), ADAPTER)


# ---- sizes ----


def test_a_model_without_weights_has_the_sizes_of_one_with_weights(policy, empty):
    there, here = shape_of(empty, on_cpu=True), shape_of(policy, on_cpu=True)
    assert there == here
    assert here.trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = {p.data_ptr(): p for p in policy.parameters() if not p.requires_grad}
    assert here.weight_bytes == sum(p.numel() * p.itemsize for p in frozen.values())


def test_of_routed_experts_those_count_that_a_token_is_given():
    model = random_model("mixtral")
    shape = shape_of(Policy(model, 4, 8.0), on_cpu=True)
    config, layer = model.config, model.model.layers[0]
    stacks = sum(p.numel() for p in layer.mlp.experts.parameters())
    linear = sum(m.weight.numel() for m in layer.self_attn.modules() if hasattr(m, "in_features"))
    routed = stacks * config.num_experts_per_tok // config.num_local_experts
    assert routed < stacks
    assert shape.matrices >= config.num_hidden_layers * routed
    assert shape.matrices < config.num_hidden_layers * (stacks + linear)


@pytest.mark.parametrize("objective", ["dpo", "sft"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_counted_without_weights(family, objective):
    model = random_model(family).to("meta")
    policy = meta_policy(model, ADAPTER)
    shape = shape_of(policy, on_cpu=False)
    assert shape.matrices > 0
    assert shape.weight_bytes > 0
    assert saved_bytes(policy, make_objective(objective), pairs(2)).total > 0


# ---- operations ----


def test_operations_of_a_step_are_those_that_torch_counts(policy):
    objective, rows = make_objective("dpo"), pairs(6, prompt=40, answer=20)
    shape = shape_of(policy, on_cpu=True)
    batch = objective.collate(rows, policy.head.shared)
    batch["reference"] = torch.zeros(2 * len(rows))
    policy.train()
    with FlopCounterMode(display=False) as counter:
        loss, _ = objective.loss(policy, batch, batch["count"])
        loss.backward()
    policy.zero_grad()
    counts = counter.get_flop_counts()["Global"]
    # Products alone: the library's attention on a processor is not counted, and blocks of ours are no pairs.
    products = sum(n for op, n in counts.items() if str(op).startswith(("aten.mm", "aten.addmm")))
    work = work_of_batches([rows], lambda part: objective.collate(part, True), True, packed=True)
    clock = Clock(shape, MACHINES["h100"], "fp32", saved=0.0)
    predicted = clock.flops(Work(work.tokens, work.targets, 0, 1), "training")
    assert predicted == pytest.approx(products, rel=0.1)


def test_attention_is_counted_over_pairs_that_see_each_other():
    rows = pairs(3, prompt=10, answer=6)
    work = work_of_batches([rows], lambda part: collate(part, True), True, packed=True)
    visible = 0
    for row in rows:
        batch = collate([row], shared=True)
        segments, prefixes = batch["segments"], batch["prefixes"]
        seen = (segments[:, None] == segments[..., None]) | (segments[:, None] == prefixes[..., None])
        visible += int((seen & (segments[:, None] > 0)).tril().sum())
    assert work.pairs == visible


def test_a_pass_back_costs_what_the_formulas_say(policy):
    shape = shape_of(policy, on_cpu=True)
    clock = Clock(shape, MACHINES["h100"], "bf16", saved=0.0)
    work = Work(tokens=1000, targets=100, pairs=5000, batches=1)
    head = 100 * shape.vocabulary * shape.hidden
    adapters = shape.rank * shape.adapted
    assert clock.flops(work, "training") == (
        1000 * (4 * shape.matrices + 6 * adapters) + 4 * head + 12 * 5000 * shape.attention
    )
    assert (
        clock.flops(work, "forward") == 2 * 1000 * (shape.matrices + adapters) + 2 * head + 4 * 5000 * shape.attention
    )
    twice = Clock(shape, MACHINES["h100"], "bf16", saved=0.0, recomputed=True)
    again = 2 * 1000 * (shape.matrices + adapters) + 4 * 5000 * shape.attention
    assert twice.flops(work, "training") == clock.flops(work, "training") + again
    memory = clock.flops(work, "training", memory_rank=7) - clock.flops(work, "training")
    assert memory == 4 * 1000 * 7 * shape.adapted


# ---- memory ----


def test_two_layers_tell_what_all_layers_keep_on_a_processor():
    model = random_model("llama", layers=5)
    policy, objective = Policy(model, ADAPTER.rank, ADAPTER.alpha), make_objective("dpo")
    found = saved_bytes_on_cpu(model.config, "fp32", ADAPTER, objective, layers=5)
    row = TokenizedRow.pair("counted", [3] * 128, [4] * 64, [5] * 64)
    batch = {**objective.collate([row], True), "reference": torch.zeros(2)}
    with SavedBytes(policy) as saved:
        objective.loss(policy, batch, batch["count"])
    assert found.total == pytest.approx(saved.total, rel=0.02)


def test_what_is_kept_grows_with_the_rows_of_a_batch(empty):
    objective = make_objective("dpo")
    one, three = (saved_bytes(empty, objective, pairs(n)) for n in (1, 3))
    assert three.total > 2 * one.total
    assert 0 < one.layer < one.total


def test_autocast_is_there_again_after_counting(empty):
    kept = torch.autocast, torch.is_autocast_enabled
    saved_bytes(empty, make_objective("dpo"), pairs(1))
    assert (torch.autocast, torch.is_autocast_enabled) == kept


def test_activations_are_computed_twice_where_memory_is_short(empty):
    shape, machine = shape_of(empty, on_cpu=False), MACHINES["l4"]
    saved = Saved(total=30e9, layer=15e9, tokens=1000)
    large = predicted_memory(shape, machine, saved, 1000, 100, 0, "auto", kl=False)
    assert large.checkpointing
    assert large.parts["activations"] < 30e9
    small = predicted_memory(shape, machine, saved, 100, 100, 0, "auto", kl=False)
    assert not small.checkpointing
    assert small.parts["activations"] == pytest.approx(3e9)
    off = predicted_memory(shape, machine, saved, 1000, 100, 0, "off", kl=False)
    assert not off.fits
    assert predicted_memory(shape, machine, saved, 10, 100, 0, "on", kl=False).checkpointing


# ---- several processes ----


def test_processes_divide_work_and_exchange_gradients_and_layers(policy):
    shape, machine = shape_of(policy, on_cpu=False), MACHINES["h100"]
    layers = [p for name, p in policy.named_parameters() if ".layers." in name and not p.requires_grad]
    assert shape.layer_bytes == sum(p.numel() * p.itemsize for p in layers) < shape.weight_bytes
    one, eight, shared, far = (
        Clock(shape, machine, "bf16", 0.0, layout=layout)
        for layout in (Layout(), Layout(8), Layout(8, fsdp=True), Layout(64, fsdp=True))
    )
    assert one.exchanged(3, "training", 1) == 0
    reduced = 2 * 4 * shape.trained * 7 / 8 / machine.link
    assert eight.exchanged(3, "training", 1) == pytest.approx(reduced)
    gathered = shape.layer_bytes * 7 / 8 / machine.link
    assert shared.exchanged(3, "training", 1) == pytest.approx(reduced + 2 * 3 * gathered)
    assert shared.exchanged(3, "forward", 0) == pytest.approx(3 * gathered)
    # The base is shared on a machine; gradients cross the network.
    assert far.exchanged(3, "training", 1) == pytest.approx(
        2 * 4 * shape.trained * 63 / 64 / machine.network + 2 * 3 * gathered
    )
    work = Work(8e6, 2e6, 1e9, 16)
    times = [clock.seconds(work, "training", steps=1, uneven=1.0) for clock in (one, eight, shared)]
    assert times[1].low == pytest.approx((times[0].low - machine.step) / 8 + machine.step)
    assert times[1].high < times[2].high < times[0].high
    assert eight.seconds(work, "training", 0, 1, 2.0).low > times[1].low
    # 9 batches take as long as 16: one process has two.
    assert eight.seconds(replace(work, batches=9), "forward").low > eight.seconds(work, "forward").low


def test_a_shared_base_takes_less_memory(empty):
    shape, saved = shape_of(empty, on_cpu=False), Saved(1e9, 1e8, 1000)
    arguments = (shape, MACHINES["h100"], saved, 1000, 100, 0, "off", False, None)
    alone, whole, shared = (
        predicted_memory(*arguments, layout).parts for layout in (Layout(), Layout(8), Layout(8, fsdp=True))
    )
    assert whole["learned"] == 20 / 16 * alone["learned"]
    assert alone["weights"] == whole["weights"] == shape.weight_bytes
    assert shared["weights"] == pytest.approx(shape.weight_bytes - shape.layer_bytes * 7 / 8)
    assert shared["gathered layers"] == 2 * shape.layer_bytes / shape.layers


# ---- rows ----


def test_sets_are_pooled_in_their_shares():
    one, other = Rows(pairs(3), 3000), Rows(pairs(5, prompt=30), 1000)
    both = pooled([one, other])
    assert both.count == 4000
    assert sum(len(row.prompt) == 12 for row in both.sample) == pytest.approx(0.75 * len(both.sample), abs=1)


def test_a_plan_of_many_rows_has_the_steps_of_training():
    lengths = [10 + i % 7 for i in range(123)]
    plan = training_plan(lengths, 8, 64, 1.5, seed=0)
    assert plan.steps == -(-round(1.5 * 123) // 8)


def test_a_buffer_keeps_as_many_rows_as_is_predicted():
    from everalign.estimate.work import replayed_rows

    for capacity in (3000, 25, 7):
        buffer, own = ReplayBuffer(capacity), [Rows(pairs(4), n) for n in (50, 33, 71)]
        predicted, kept = replayed_rows(own, 0.2, capacity)
        for number, rows in enumerate(own):
            assert (0 if predicted[number] is None else predicted[number].count) == len(buffer.rows())
            buffer.add(f"task-{number}", rows.spread_over(rows.count), 0.2)
        assert kept == len(buffer)


@pytest.mark.parametrize("capacity", [3000, 25, 7, 1])
def test_gdumb_learns_as_many_rows_as_is_predicted(capacity):
    from everalign.estimate.work import balanced_rows, replayed_rows

    own, buffer = [Rows(pairs(4), 50) for _ in range(4)], ReplayBuffer(capacity)
    earlier, _ = replayed_rows(own, 0.2, capacity)
    for number, rows in enumerate(own):
        name = f"task-{number}"
        buffer = buffer.balanced_with(name, rows.spread_over(rows.count), 0.2, seed=0)
        new, old = balanced_rows(rows, earlier[number], number, 0.2, capacity)
        assert new.count + (0 if old is None else old.count) == len(buffer)
        assert abs(new.count - buffer.tasks()[name]) <= 1


def test_rows_that_a_buffer_holds_already_are_replayed_first():
    from everalign.estimate.work import replayed_rows

    predicted, kept = replayed_rows([Rows(pairs(4), 50), Rows(pairs(4), 50)], 0.2, 25, [Rows(pairs(2), 18)])
    assert [rows.count for rows in predicted if rows is not None] == [18, 25]
    assert kept == 25


# ---- value ----

RATE = WinRate(0.6, 0.55, 0.65, "judge_win_rate", 200, "002-b")


def test_value_is_what_better_answers_bring_less_the_cost():
    worth = Value(RATE, each=0.5, cost=(100.0, 80.0, 125.0), answers=2000)
    assert worth.per_answer == pytest.approx((0.1, 0.05, 0.15))
    assert worth.net == pytest.approx((100.0, -25.0, 220.0))
    assert worth.break_even == pytest.approx((1000.0, 80 / 0.15, 2500.0))


def test_worse_answers_cost_and_never_pay():
    worth = Value(WinRate(0.4, 0.3, 0.55, "judge_win_rate", 20, "001-a"), 1.0, (10.0, 9.0, 11.0), 100)
    assert worth.net[0] == pytest.approx(-30.0)
    assert worth.net[1] == pytest.approx(-51.0)
    assert worth.break_even == (None, pytest.approx(90.0), None)
    assert worth.to_dict()["break_even_answers"][0] is None


def evaluation(tmp_path, results, **more):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": results, **more}))
    return path


def result(version="001-a", task="t", prompts=100, **metrics):
    return {"version": version, "task": task, "prompts": prompts, "metrics": metrics}


def test_the_newest_version_counts_over_all_tasks(tmp_path):
    path = evaluation(
        tmp_path,
        [
            result("000", judge_win_rate=[0.5, 0.5, 0.5]),
            result("001-a", judge_win_rate=[0.9, 0.8, 0.95]),
            result("002-b", "t", 300, judge_win_rate=[0.6, 0.5, 0.7], reward_win_rate=[0.1, 0.0, 0.2]),
            result("002-b", "u", 100, judge_win_rate=[0.8, 0.6, 1.0]),
        ],
    )
    found = read_win_rate(path)
    assert (found.version, found.metric, found.prompts) == ("002-b", "judge_win_rate", 400)
    assert found.value == pytest.approx(0.65)
    half = math.hypot(300 * 0.1, 100 * 0.2) / 400
    assert (found.low, found.high) == pytest.approx((0.65 - half, 0.65 + half))


@pytest.mark.parametrize(
    ("results", "what"),
    [
        ([], "no version"),
        ([result("000", judge_win_rate=[0.5, 0.4, 0.6])], "no version"),
        ([result(rouge_l=[0.5, 0.4, 0.6])], "no win rate among them"),
        ([result(judge_win_rate=[0.5, 0.6, 0.4])], "judge_win_rate"),
        ([result(judge_win_rate=[1.5, 1.4, 1.6])], "judge_win_rate"),
        ([result(prompts=0, judge_win_rate=[0.5, 0.4, 0.6])], "no prompt"),
        ("nothing", "results"),
    ],
)
def test_an_evaluation_that_says_nothing_is_refused(tmp_path, results, what):
    with pytest.raises(InputError, match=what):
        read_win_rate(evaluation(tmp_path, results))


def test_an_evaluation_that_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_win_rate(tmp_path)
    broken = tmp_path / "results.json"
    broken.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_win_rate(broken)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1"])
def test_prices_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="--api-price"):
        parse_api_price(text)


def test_prices_are_two_numbers():
    assert parse_api_price("2.5, 10") == (2.5, 10.0)
    assert parse_api_price(None) is None


# ---- machines ----


def test_machines_are_found_by_name_and_unknown_ones_named():
    assert find_machine(" H100 ") is MACHINES["h100"]
    assert find_machine("cpu") is None
    with pytest.raises(InputError, match="did you mean h100"):
        find_machine("h10")
    for machine in MACHINES.values():
        assert machine.source
        assert machine.share[0] < machine.share[1] <= 1
        assert machine.peak("bf16") > machine.peak("fp32")


def test_the_middle_of_a_range_is_as_far_from_both_ends():
    assert Range(2.0, 8.0).middle == 4.0
    assert (Range(1, 2) + Range(3, 4)).times(2) == Range(8, 12)


def test_quantised_weights_are_counted_by_their_bits():
    """Of linear modules but the head, 4 bits and a scale for 64 of them; nothing needs bitsandbytes."""
    sizes = {}
    for quantize in (None, "nf4"):
        model = model_from_config("tiny", None, "fp32", load_tokenizer("tiny"), quantize)
        sizes[quantize] = shape_of(meta_policy(model, AdapterOptions()), on_cpu=False)
    matrices = sizes[None].matrices
    assert sizes["nf4"].matrices == matrices > 500_000
    assert sizes[None].weight_bytes - sizes["nf4"].weight_bytes == pytest.approx(matrices * (4 - 4.5 / 8), abs=1)
