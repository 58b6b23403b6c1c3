"""The methods' formulas against closed forms, exhaustive search and finite differences."""

import math
from itertools import combinations

import pytest
import torch

from everalign.data.records import PreferenceSet
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.methods import METHODS, make_method
from everalign.methods.base import Task
from everalign.methods.baselines import Anchors
from everalign.methods.ewc import fisher_diagonal
from everalign.methods.gradient_projection import gem_projection
from everalign.methods.lifealign import AdapterAverage, fit_step
from everalign.training.hooks import RowTerms, Stage, StageHooks, make_batch, parameters, sum_by_row
from everalign.training.objectives import make_objective
from everalign.training.reference import sequence_logprobs
from learner_for_tests import task_rows
from models_for_tests import perturb, random_pairs, random_policy
from stages_for_tests import difference, train, weights


def stage_of(policy, rows=8, replayed=0, apart=0, objective="dpo", beta=None):
    pairs = random_pairs(rows)
    with policy.as_base():
        reference = sequence_logprobs(policy, pairs, 400)
    own = rows - replayed - apart
    return Stage(policy, make_objective(objective, beta), pairs, own, replayed, reference, 400)


def task(index=1, name="t"):
    return Task(name, (), index, seed=0)


# ---- what a stage computes ----


def loss_of(stage, numbers):
    """The objective's mean loss, row by row."""
    margins = []
    for number in numbers:
        (now,) = sequence_logprobs(stage.policy, [stage.rows[number]], 400)
        ratio = now - stage.reference[number]
        margins.append(stage.objective.options.beta * (ratio[0] - ratio[1]))
    return torch.nn.functional.softplus(-torch.stack(margins)).mean().item()


def test_a_stages_loss_is_the_objectives_mean():
    stage = stage_of(perturb(random_policy()))
    assert stage.loss([1, 2, 5]) == pytest.approx(loss_of(stage, [1, 2, 5]), rel=1e-5)


def test_a_stages_gradient_is_that_of_its_loss_by_finite_differences():
    stage = stage_of(perturb(random_policy()), beta=1.0)
    before = [None if p.grad is None else p.grad.clone() for p in parameters(stage.policy)]
    gradient = stage.gradient([0, 3, 4])
    assert before == [p.grad for p in parameters(stage.policy)]
    for number in (0, 1):
        parameter, place = parameters(stage.policy)[number], gradient[number].abs().argmax()
        flat, found = parameter.data.view(-1), []
        for step in (1e-2, -1e-2):
            flat[place] += step
            found.append(stage.loss([0, 3, 4]))
            flat[place] -= step
        slope = (found[0] - found[1]) / 2e-2
        assert gradient[number].view(-1)[place].item() == pytest.approx(slope, rel=2e-2)


class Terms(StageHooks):
    """Adds the square of each row's first log-probability, times a constant."""

    def __init__(self, weights=None):
        self.weights = weights

    def begin_stage(self, stage):
        values = [torch.full((2,), float(number)) for number in range(len(stage.rows))]
        return RowTerms(weights=self.weights, values={"place": values})

    def row_loss(self, logprobs, batch):
        assert torch.equal(batch["place"][::2], batch["place"][1::2])
        self.seen = batch["place"][::2]
        return 0.01 * logprobs[::2].square()


def test_terms_of_rows_join_the_loss_and_their_weights_its_rows(tmp_path):
    pairs, losses = random_pairs(8), {}
    for name, hooks in {"none": None, "terms": Terms(), "weights": Terms([0.0] * 8)}.items():
        policy = perturb(random_policy())
        result = train(policy, "dpo", pairs, tmp_path, hooks=None if hooks is None else {"hooks": hooks})
        losses[name] = result.curve[0]["loss"]
    start = torch.stack([value[0] for value in sequence_logprobs(perturb(random_policy()), pairs, 400)])
    added = 0.01 * start.square().mean().item()
    assert losses["terms"] == pytest.approx(losses["none"] + added, rel=1e-4)
    assert losses["weights"] == pytest.approx(added, rel=1e-4)


class FirstResponses(StageHooks):
    """Adds the square of the log-probability of each row's first computed response, times a constant."""

    def begin_stage(self, stage):
        return RowTerms()

    def row_loss(self, logprobs, batch):
        return sum_by_row(0.01 * logprobs.square(), batch)


@pytest.mark.parametrize("tokens_per_batch", [480, 60])
@pytest.mark.parametrize("objective", ["sft", "var"])
def test_terms_of_rows_count_by_rows_where_the_objective_counts_tokens(tmp_path, objective, tokens_per_batch):
    pairs, options = random_pairs(8), {"tokens_per_batch": tokens_per_batch}
    losses = [
        train(perturb(random_policy()), objective, pairs, tmp_path, hooks=hooks, **options).curve[0]["loss"]
        for hooks in (None, {"hooks": FirstResponses()})
    ]
    start = torch.stack(sequence_logprobs(perturb(random_policy()), pairs, 400)).square()
    added = 0.01 * (start[:, 0] if objective == "sft" else start.sum(dim=1)).mean().item()
    assert losses[1] - losses[0] == pytest.approx(added, rel=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [480, 60])
def test_the_margin_of_the_tasks_own_rows_is_told_apart(tmp_path, tokens_per_batch):
    pairs, policy = random_pairs(8), perturb(random_policy())
    now = torch.stack(sequence_logprobs(policy, pairs, 400))
    with policy.as_base():
        gain = now - torch.stack(sequence_logprobs(policy, pairs, 400))
    margins = 0.1 * (gain[:, 0] - gain[:, 1])
    for replayed, own in ((None, None), (3, margins[:5].mean().item())):
        hooks = {} if replayed is None else {"replayed": replayed}
        result = train(perturb(random_policy()), "dpo", pairs, tmp_path, hooks=hooks, tokens_per_batch=tokens_per_batch)
        point = result.curve[0]
        assert point["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
        assert point.get("own_margin") == (None if own is None else pytest.approx(own, rel=1e-4))


def test_what_a_stage_has_taught_is_what_its_own_rows_gained():
    curve = [{"margin": 5.0, "own_margin": 0.1 * step} for step in range(6)]
    del curve[1]["own_margin"]  # a step of replayed rows alone
    objective = make_objective("dpo", beta=0.5)
    assert objective.gained(curve) == pytest.approx(0.5 / 0.5)
    assert objective.gained([{"margin": 0.1 * step} for step in range(6)]) == pytest.approx(0.45 / 0.5)
    assert objective.gained(curve[:3]) is None


# ---- GEM ----


def by_enumeration(gradient, memory, strength):
    """The same quadratic programme, by trying every set of active bounds."""
    unit = memory / memory.norm(dim=1, keepdim=True)
    gram, linear = unit @ unit.T, unit @ gradient
    least = strength * gradient.norm()
    best, value = None, math.inf
    for size in range(len(unit) + 1):
        for free in combinations(range(len(unit)), size):
            dual = torch.full((len(unit),), float(least), dtype=torch.float64)
            if free:
                free = list(free)
                fixed = [i for i in range(len(unit)) if i not in free]
                right = -linear[free] - gram[free][:, fixed] @ dual[fixed]
                dual[free] = torch.linalg.solve(gram[free][:, free], right)
            found = 0.5 * dual @ gram @ dual + linear @ dual
            if bool((dual >= least - 1e-12).all()) and found < value:
                best, value = dual, found
    return gradient + unit.T @ best


@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_gems_projection_equals_an_exhaustive_search(seed, strength):
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    gradient = torch.randn(9, generator=generator, dtype=torch.float64) - 0.3 * memory.sum(0)
    found = gem_projection(gradient, memory, strength)
    assert torch.allclose(found, by_enumeration(gradient, memory, strength), atol=1e-6)
    assert (memory @ found / memory.norm(dim=1)).min() > -1e-6


def test_gem_with_one_earlier_task_is_a_gem():
    gradient, memory = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([[0.0, 1.0, 1.0]]).double()
    expected = gradient - (gradient @ memory[0]) / (memory[0] @ memory[0]) * memory[0]
    assert torch.allclose(gem_projection(gradient, memory, 0.0), expected, atol=1e-7)


def test_gem_leaves_a_gradient_that_nobody_loses_by():
    gradient = torch.tensor([1.0, 2.0])
    assert gem_projection(gradient, torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), 0.5) is gradient


# ---- OGPSA ----


def test_ogpsa_removes_the_span_of_earlier_gradients_tensor_by_tensor():
    policy = perturb(random_policy())
    method = make_method("ogpsa", refresh=1)
    learned = parameters(policy)
    earlier = [[torch.randn_like(p) for p in learned] for _ in range(2)]
    earlier.append([2 * value for value in earlier[0]])
    method.earlier_gradients = lambda: earlier
    for parameter in learned:
        parameter.grad = torch.randn_like(parameter)
    before = [p.grad.clone() for p in learned]
    method.adjust_gradients(policy)
    for number, parameter in enumerate(learned):
        for gradient in earlier:
            product = (parameter.grad * gradient[number]).sum() / gradient[number].norm()
            assert abs(product) < 1e-4
        removed = before[number] - parameter.grad
        assert abs((removed * parameter.grad).sum()) < 1e-3


# ---- EWC ----


def test_the_fisher_information_is_of_rows_and_not_of_their_mean():
    stage = stage_of(perturb(random_policy()), beta=1.0)
    found = fisher_diagonal(stage, range(3))
    rows = [stage.gradient([number]) for number in range(3)]
    expected = [torch.stack(parts).square().mean(0) for parts in zip(*rows, strict=True)]
    scale = torch.cat([value.flatten() for value in expected]).mean()
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted / scale, rtol=1e-4, atol=1e-6)
    mean = torch.cat([value.flatten() for value in found]).mean().item()
    assert mean == pytest.approx(1.0, rel=1e-4)
    batch = stage.gradient([0, 1, 2])
    assert not torch.allclose(found[0] * scale, batch[0].square(), rtol=0.05)


@pytest.mark.parametrize("online", [True, False])
def test_ewcs_penalty_is_half_the_weighted_square_and_0_at_the_earlier_weights(online):
    policy = perturb(random_policy())
    method = make_method("ewc", strength=3.0, online=online)
    stage = stage_of(policy, beta=1.0)
    method.begin_stage(stage)
    method.end_stage(stage)
    method.end_task(policy, task())
    penalty = method.penalty(policy)
    penalty.backward()
    assert penalty.item() == 0.0
    assert all(not p.grad.any() for p in parameters(policy) if p.grad is not None)
    fisher = [value.clone() for value in method._last]
    with torch.no_grad():
        for parameter in parameters(policy):
            parameter.add_(0.1)
    expected = 1.5 * sum(float((value * 0.01).sum()) for value in fisher)
    assert method.penalty(policy).item() == pytest.approx(expected, rel=1e-3)
    assert len(method.state_dict()) == 2 * len(fisher)


def test_online_ewc_keeps_one_term_and_separate_ewc_one_a_task():
    for online, terms in ((True, 1), (False, 2)):
        policy, method = perturb(random_policy()), make_method("ewc", online=online)
        for index in (1, 2):
            stage = stage_of(policy, beta=1.0)
            method.begin_stage(stage)
            method.end_stage(stage)
            method.end_task(policy, task(index))
        assert len({key.split("/")[1] for key in method.state_dict()}) == terms


def test_decay_without_the_online_form_is_refused():
    with pytest.raises(InputError) as error:
        make_method("ewc", online=False, decay=0.9)
    assert error.value.field == "decay"


# ---- O-LoRA and SLAO ----


def test_o_loras_update_is_the_exact_sum_and_keeps_the_earlier_as():
    policy, method = random_policy(), make_method("olora")
    total, rights = {}, []
    for index in (1, 2, 3):
        method.begin_task(policy, task(index))
        perturb(policy, seed=index)
        for name, update in policy.short_term().items():
            total[name] = total.get(name, 0) + update.dense()
        rights.append({name: update.right for name, update in policy.short_term().items()})
        method.end_task(policy, task(index))
    for name, update in policy.long_term().items():
        torch.testing.assert_close(update.dense(), total[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(update.right, torch.cat([right[name] for right in rights]))


def test_o_loras_penalty_is_the_sum_of_absolute_products():
    policy, method = random_policy(), make_method("olora", strength=0.5, shrinkage=0.2)
    method.begin_task(policy, task(1))
    perturb(policy, seed=1)
    first = {name: right.clone() for name, (_, right) in policy.factors().items()}
    expected = sum(
        0.2 * math.sqrt(float(left.square().sum() + right.square().sum())) for left, right in policy.factors().values()
    )
    assert method.penalty(policy).item() == pytest.approx(expected, rel=1e-5)
    method.end_task(policy, task(1))
    method.begin_task(policy, task(2))
    perturb(policy, seed=2)
    expected = 0.0
    for name, (left, right) in policy.factors().items():
        expected += 0.5 * float((first[name] @ right.T).abs().sum())
        expected += 0.2 * math.sqrt(float(left.square().sum() + right.square().sum()))
    assert method.penalty(policy).item() == pytest.approx(expected, rel=1e-5)


def test_slao_replaces_a_and_averages_b():
    policy, method = random_policy(), make_method("slao")
    average, own = {}, {}
    for index in (1, 2, 3):
        method.begin_task(policy, task(index))
        if index > 1:
            for name, (left, right) in policy.factors().items():
                assert torch.equal(left, own[name])
                torch.testing.assert_close(right @ right.T, torch.eye(len(right)), atol=1e-5, rtol=0)
        perturb(policy, seed=index)
        factors = policy.factors()
        own = {name: left for name, (left, _) in factors.items()}
        share = 1 / math.sqrt(index)
        average = {name: left * share + average.get(name, 0) * (1 - share) for name, left in own.items()}
        method.end_task(policy, task(index))
        for name, (left, right) in policy.factors().items():
            torch.testing.assert_close(left, average[name], rtol=1e-4, atol=1e-6)
            assert torch.equal(right, factors[name][1])


# ---- CPPO and COPR ----


def test_cppos_classes():
    method = make_method("cppo", bound=1.0, lowest=0.5, highest=2.0)
    levels = [-1.0, 0.0, 1.0]
    probability = torch.tensor([p for p in levels for _ in levels])
    reward = torch.tensor([r for _ in levels for r in levels])
    learn, retain = method.coefficients(probability, reward)
    assert learn.view(3, 3).tolist() == [[0.5, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 1.0, 2.0]]
    assert retain.view(3, 3).tolist() == [[0.5, 1.0, 0.5], [1.0, 1.0, 1.0], [0.5, 1.0, 2.0]]


def test_cppo_retains_nothing_where_nothing_has_changed():
    policy, method = perturb(random_policy()), make_method("cppo", strength=2.0)
    stage = stage_of(policy)
    method.begin_task(policy, task(1))
    assert method.begin_stage(stage) is None
    method.begin_task(policy, task(2))
    terms = method.begin_stage(stage)
    now = torch.cat(stage.logprobs(range(8)))
    lengths = torch.tensor([float(len(tokens)) for row in stage.rows for tokens in row.responses])
    batch = {
        "cppo_before": torch.cat(list(terms.values["cppo_before"])),
        "cppo_retain": torch.cat(list(terms.values["cppo_retain"])),
        "lengths": lengths,
        "row": torch.arange(8).repeat_interleave(2),
        "weight": torch.ones(8),
    }
    assert not method.row_loss(now, batch).any()
    moved = method.row_loss(now + lengths, batch)
    assert torch.allclose(moved, 2.0 * 2 * batch["cppo_retain"][::2], atol=1e-4)


def test_coprs_distance_is_0_at_the_target_and_its_multipliers_follow_the_excess():
    policy, method = perturb(random_policy()), make_method("copr", replay=1.0)
    stage = stage_of(policy, beta=1.0)
    rows = stage.rows
    method.begin_task(policy, task(1))
    terms = method.begin_stage(stage)
    assert terms.weights == [0.0] * 8
    targets = torch.stack(list(terms.values["copr_target"]))
    torch.testing.assert_close(targets.exp().sum(1), torch.ones(8))
    gap = (targets[:, 0] - targets[:, 1]).double()
    logprobs = torch.stack([gap, torch.zeros(8).double()], dim=1).flatten().float()
    batch = {name: torch.cat(list(values)) for name, values in terms.values.items()} | {"counts": torch.ones(8)}
    assert method.row_loss(logprobs, batch).abs().max() < 1e-8
    away = method.row_loss(torch.zeros(16), batch)
    expected = (math.log(0.5) - targets).square().sum(1) / 2
    torch.testing.assert_close(away, expected)
    # An advantage is never negative, so that a target never asks for less than before.
    now = torch.stack([value[0] - value[1] for value in stage.logprobs(range(8))])
    assert (gap.float() >= now - 1e-4).all()

    method._targets = {row.id: target for row, target in zip(rows, targets, strict=True)}
    method._names = ["old"] * 4
    method._new = {}
    second = Stage(policy, stage.objective, rows, 4, 4, stage.reference, 400)
    terms = method.begin_stage(second)
    batch = {name: torch.cat(list(values)) for name, values in terms.values.items()} | {"counts": torch.ones(8)}
    start = torch.cat(second.logprobs(range(8)))
    found = method.row_loss(start, batch)
    assert found[4:].abs().max() < 1e-6
    torch.testing.assert_close(found[:4], method_distance(start, batch)[:4] / 2)
    heavy = {**batch, "copr_weight": batch["copr_weight"] * 3}
    torch.testing.assert_close(method.row_loss(start, heavy)[:4], 3 * found[:4])
    method._excess = [(torch.tensor([0, 1, 1]), torch.tensor([9.0, 1.0, 3.0]))]
    method.after_step(policy)
    assert method._multipliers.tolist() == pytest.approx([math.exp(0.1 * 2.0)])


def method_distance(logprobs, batch):
    gap = logprobs[::2] - logprobs[1::2]
    shares = torch.stack([gap.sigmoid(), (-gap).sigmoid()], dim=1).log()
    return (shares - batch["copr_target"].view(-1, 2)).square().sum(1) / 2


# ---- anchors, averages, steps ----


def test_anchors_pull_only_what_got_worse():
    policy, anchors = perturb(random_policy()), Anchors(0.5)
    stage = stage_of(policy, rows=6, replayed=4)
    anchors.keep(stage, [0, 1, 2, 3, 4, 5], capacity=4)
    kept = torch.cat(stage.logprobs([2, 3, 4, 5]))
    terms = anchors.terms(stage)
    batch = {name: torch.cat(list(values)) for name, values in terms.values.items()}
    batch |= {"row": torch.arange(6).repeat_interleave(2), "weight": torch.ones(6)}
    now = torch.cat([torch.full((4,), -100.0), kept])
    assert not anchors.row_loss(now, batch).any()
    for change, chosen, rejected in ((0.4, 0.0, 0.08), (-0.4, 0.08, 0.0), (3.0, 0.0, 2.5), (-3.0, 2.5, 0.0)):
        assert anchors.row_loss(now + torch.tensor([change, 0.0] * 6), batch)[2:].tolist() == pytest.approx(
            [0.5 * chosen] * 4, abs=1e-4
        )
        assert anchors.row_loss(now + torch.tensor([0.0, change] * 6), batch)[2:].tolist() == pytest.approx(
            [0.5 * rejected] * 4, abs=1e-4
        )
    again = Anchors(0.5)
    again.load_state_dict(anchors.state_dict())
    torch.testing.assert_close(again.terms(stage).values["anchor"], terms.values["anchor"])


def test_an_average_of_equal_weights_is_these_and_follows_its_formula():
    policy, average = perturb(random_policy()), AdapterAverage(0.9)
    start = weights(policy)
    average.update(policy)
    average.update(policy)
    average.apply(policy)
    assert difference(start, weights(policy)) < 1e-7
    average.reset()
    expected = None
    for step in range(30):
        with torch.no_grad():
            for parameter in parameters(policy):
                parameter.fill_(float(step))
        average.update(policy)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    average.apply(policy)
    assert parameters(policy)[0].flatten()[0].item() == pytest.approx(expected, rel=1e-5)


def test_the_fitted_step_has_the_lowest_loss_of_all():
    policy = perturb(random_policy(), size=0.5)
    stage = stage_of(policy, rows=9, replayed=4, apart=2, beta=1.0)
    trained, groups = policy.factors(), [[5, 6], [], [7, 8]]
    losses = {}
    for step in (0.4, 0.6, 0.8, 1.0, 1.2):
        policy.write_factors({name: (left * step, right) for name, (left, right) in trained.items()})
        losses[step] = (stage.loss([5, 6]) + stage.loss([7, 8])) / 2
    policy.write_factors(trained)
    best = fit_step(stage, groups)
    assert best == min(losses, key=losses.get)
    for name, (left, _) in policy.factors().items():
        torch.testing.assert_close(left, trained[name][0] * best)
    policy.write_factors(trained)
    assert fit_step(stage, [[], []]) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gdumb_learns_its_buffer_and_nothing_else(share):
    method = make_method("gdumb", replay=share, capacity=7)
    for index, name in enumerate(("warm", "brief", "calm"), start=1):
        new = Task(name, task_rows(name, 10), index, seed=0)
        learned = [*method.rows(new), *method.own_rows(new)]
        method.end_task(random_policy(), new)
        assert learned == method.buffer.rows()
        assert 0 < len(learned) <= 7
        sizes = method.buffer.tasks()
        assert len(sizes) == index
        assert max(sizes.values()) - min(sizes.values()) <= 1


def test_a_review_is_of_the_task_and_of_every_earlier_one_that_has_rows():
    method = make_method("er", review=0.3)
    stage = stage_of(random_policy(), rows=9, replayed=5)
    for name, count in (("first", 3), ("second", 2)):
        method.buffer.add(name, task_rows("warm", count), fraction=1.0)
    assert method.begin_stage(stage_of(random_policy(), rows=4)) is None
    assert len(method.rows(task(3, "third"))) == 5
    terms = method.begin_stage(stage)
    review = terms.review
    assert review.share == 0.3
    assert [list(group) for group in review.groups] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    # Nothing else is added.
    batch = make_batch(stage.rows, [0, 5], stage.objective, True, stage.reference, terms)
    assert method.row_loss(torch.zeros(4), batch) is None


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("gem", "strength", -1.0),
        ("gem", "refresh", 0),
        ("ogpsa", "strength", 1.5),
        ("ogpsa", "memory_rows", 0),
        ("ewc", "strength", math.nan),
        ("ewc", "fisher_rows", 0),
        ("ewc", "decay", 2.0),
        ("olora", "shrinkage", -0.1),
        ("cppo", "bound", math.inf),
        ("copr", "rate", -1.0),
        ("gdumb", "replay", 1.1),
        ("er", "anchors", -1.0),
        ("er", "review", 1.5),
        ("lifealign", "average", 1.0),
        ("lifealign", "step", "measured"),
    ],
)
def test_bad_arguments_name_themselves(name, argument, value):
    with pytest.raises(InputError) as error:
        make_method(name, **{argument: value})
    assert error.value.field == argument


@pytest.mark.parametrize("argument", ["anchors", "review"])
@pytest.mark.parametrize("name", ["er", "lifealign"])
def test_what_is_for_replayed_rows_is_refused_without_any(name, argument):
    with pytest.raises(InputError, match="is for replayed rows, and replay is 0") as error:
        make_method(name, replay=0.0, **{argument: 0.1})
    assert error.value.field == argument


@pytest.mark.parametrize("name", ["copr", "lifealign-rf"])
@pytest.mark.parametrize("objective", ["var", "snkl", "correction"])
def test_methods_of_pairs_refuse_other_rows_before_anything_is_loaded(name, objective):
    with pytest.raises(InputError, match=f"{name} learns from preferences, and the objective {objective}"):
        make_method(name).check_fits(objective, None, False)
    make_method(name).check_fits("dpo", None, False)


def test_copr_refuses_a_reference():
    with pytest.raises(InputError, match="would ignore reference"):
        make_method("copr").check_fits("dpo", "base", False)


def test_gems_gradient_is_no_longer_than_it_was_clipped_to():
    policy = perturb(random_policy(), size=0.5)
    method = make_method("gem")
    learned = parameters(policy)
    for parameter in learned:
        parameter.grad = torch.ones_like(parameter)
    size = math.sqrt(sum(parameter.numel() for parameter in learned))
    memories = [[-torch.ones_like(parameter) for parameter in learned] for _ in range(3)]
    method.earlier_gradients = lambda: memories
    method.adjust_gradients(policy)
    after = torch.cat([parameter.grad.flatten() for parameter in learned])
    assert 0 < after.norm().item() <= size * (1 + 1e-5)
    assert (after @ torch.cat([part.flatten() for part in memories[0]])).item() > 0


def test_a_fitted_steps_rows_are_held_back_by_place():
    method = make_method("lifealign", space="product", step="fitted")
    few = PreferenceSet.of([row for _ in range(10) for row in task_rows("warm", 5)])
    repeated = Task("t", few, 1, seed=0)
    assert (len(method.own_rows(repeated)), len(method.apart(repeated))) == (45, 5)
    short = Task("t", task_rows("warm", 39), 1, seed=0)
    assert (len(method.own_rows(short)), len(method.apart(short))) == (39, 0)


def test_a_tasks_update_is_not_fitted_on_earlier_tasks_alone():
    policy = perturb(random_policy(), size=0.5)
    method = make_method("lifealign", space="product", step="fitted", keep=1.0, energy=1.0)
    few = Task("t", task_rows("warm", 5), 2, seed=0)
    method.buffer.add("earlier", task_rows("brief", 4), fraction=1.0)
    method.rows(few)
    method.begin_stage(stage_of(policy, rows=9, replayed=4))
    before = {name: update.dense() for name, update in policy.total().items()}
    method.end_task(policy, few)
    for name, update in policy.total().items():
        torch.testing.assert_close(update.dense(), before[name], atol=1e-5, rtol=1e-4)


def test_cppo_takes_the_best_and_the_worst_answer_of_scored_rows():
    from everalign.methods.cppo import _best_and_worst

    def row(*weights):
        return TokenizedRow("r", [1], tuple([2] for _ in weights), weights)

    assert _best_and_worst(row(1.0, 1.0), first_is_best=True) == (0, 1)
    assert _best_and_worst(row(0.2, 1.7, 0.1), first_is_best=False) == (1, 2)
    assert _best_and_worst(row(0.4, 0.4), first_is_best=False) == (0, 0)
    assert _best_and_worst(row(1.0), first_is_best=True) == (0, 0)


@pytest.mark.parametrize(
    ("objective", "weights", "signs"),
    [
        ("dpo", (1.0, 1.0), (1, -1)),
        ("sft", (1.0, 1.0), (1, -1)),
        ("var", (1.0, 1.0), (0, 0)),
        ("snkl", (0.5, 0.5), (0, 0)),
        ("var", (0.11, 0.11, 0.11), (0, 0, 0)),
        ("var", (0.3, 1.2, 0.3), (-1, 1, -1)),
        ("var", (2.0, 2.0, 0.5), (1, 1, -1)),
        ("var", (0.7,), (1,)),
    ],
)
def test_anchors_leave_answers_alone_whose_rewards_are_equal(objective, weights, signs):
    rows = tuple(TokenizedRow(id, [1], tuple([2, 3] for _ in weights), weights) for id in "ab")
    stage = Stage(random_policy(), make_objective(objective), rows, 1, 1, None, 400)
    anchors = Anchors(1.0)
    anchors.keep(stage, [1], capacity=5)
    found = anchors.terms(stage).values["anchor_sign"]
    assert tuple(found[1].tolist()) == signs
    assert not found[0].any()


def test_all_arguments_of_the_methods_are_options_of_the_command_line():
    from inspect import signature

    from everalign.learning.options import MethodOptions

    arguments = {name for kind in METHODS.values() for name in signature(kind).parameters}
    assert arguments - {"args", "kwargs"} == set(MethodOptions.model_fields)
