"""Training a corrector: what it learns, what its folder holds, how weights count, and that a killed one goes on."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corrections_for_tests import FAST, corrections, corrector
from everalign.correction import (
    CorrectionEncoder,
    CorrectorOptions,
    get_template,
    load_corrector_files,
    train_corrector,
)
from everalign.correction.tokenization import answer_only, both, correction_only, tokenize_corrections
from everalign.correction.training import corrector_report
from everalign.data import Correction, CorrectionSet
from everalign.data.collate import collate
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.trainable import FullModel
from everalign.training.base_objective import LikelihoodObjective
from models_for_tests import random_groups, random_model, random_policy, saved_model
from tiers_for_tests import slow_but

QUICK = FAST.replace(epochs=1, checkpoint_steps=0)


def encoder(template="everalign-1"):
    return CorrectionEncoder(load_tokenizer(str(saved_model())), get_template(template))


def groups(rows, texts=correction_only):
    return tokenize_corrections(rows, encoder(), 256, texts).rows


def train(output, rows=None, options=QUICK, model=None, **arguments):
    return train_corrector(model or str(saved_model()), rows or corrections(16), output, options=options, **arguments)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def by_hand(model, group, response):
    """Log-probabilities of a response's tokens, and the likeliest ones, of transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([group.prompt + response])).logits[0, len(group.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0], logits.argmax(-1).tolist()


# ---- what it learns ----


def test_it_learns_to_correct_and_to_keep():
    trained = corrector()
    rows = groups(corrections(20, 100), both)
    before = corrector_report(FullModel(load_model(str(saved_model()))).eval(), rows, 2000)
    assert trained.report.perplexity < before.perplexity / 5
    # Every correction begins like this, and half of the answers.
    assert trained.report.starts_by_copying == 0.5
    assert (trained.report.rows, trained.report.identities) == (20, 10)
    assert {name: stage.steps for name, stage in trained.stages.items()} == {"identity": 1, "correction": 20}


def test_the_folder_is_a_plain_language_model_with_its_template():
    trained = corrector()
    files = load_corrector_files(trained.path)
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    made = files.encoder(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(trained.path).eval()
    assert next(model.parameters()).dtype == torch.float32
    assert (made.template.id, files.facts) == ("everalign-1", trained.facts)
    prompt = torch.tensor([made.prompt("q3?", "no 3")])
    with torch.no_grad():
        found = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.decode(found[0, prompt.shape[1] :].tolist()) == "yes"
    assert files.facts.data == corrections().fingerprint
    assert files.facts.held_out == asdict(trained.report)
    assert files.facts.settings["learning_rate"] == FAST.learning_rate
    assert not trained.path.with_name("corrector.training").exists()


def test_the_embedded_assistant_learns_too(tmp_path):
    options = CorrectorOptions(learning_rate=2e-3, epochs=3, batch_size=8, objectives=("kind",))
    trained = train(tmp_path / "out", corrections(), options, model="tiny", test=corrections(20, 100))
    assert trained.report.perplexity < 15
    assert trained.report.starts_by_copying == 0.5
    assert trained.facts.max_length == 256  # what the model can take
    assert trained.facts.objectives == ("kind",)


# ---- the report ----


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_report_by_hand(family):
    # The one shares prompts and computes the head apart, the other does neither.
    model = load_model(str(saved_model(family)))
    texts = ["one", "two", "three", "four and more", "one"]
    rows = [Correction(f"q{i}", text, texts[-i]) for i, text in enumerate(texts)]
    encoded = groups(rows, both)
    # One answer that greedy decoding would give from its first token on to its last.
    greedy = []
    for _ in range(3):
        greedy.append(by_hand(model, encoded[0], [*greedy, 0])[1][len(greedy)])
    encoded = (replace(encoded[0], responses=(greedy, greedy)), *encoded[1:])
    report = corrector_report(FullModel(model).eval(), encoded, 700)
    logs, firsts, copies = ([], []), [], []
    for group in encoded:
        for place, response in enumerate(group.responses):
            log_probs, best = by_hand(model, group, response)
            logs[place].append(log_probs)
        firsts.append(best[0] == response[0])
        copies.append(best == response)
    assert report.perplexity == pytest.approx(math.exp(-torch.cat(logs[0]).mean().item()), rel=1e-4)
    assert report.copy_log_likelihood == pytest.approx(torch.cat(logs[1]).mean().item(), rel=1e-4)
    assert report.starts_by_copying == sum(firsts) / 5
    assert report.copies == sum(copies) / 5 > 0
    identities = [group.responses[0] == group.responses[1] for group in encoded]
    assert report.identities == sum(identities)
    assert report.keeps == sum(copies) / sum(identities)


def test_without_identities_nothing_is_kept():
    report = corrector_report(FullModel(load_model(str(saved_model()))), groups(corrections(2)[1:], both), 500)
    assert (report.identities, report.keeps) == (0, None)


# ---- the loss ----


def heavy(rows, *weights):
    return [replace(row, weight=weight) for row, weight in zip(rows, weights, strict=True)]


def losses(model, rows, batches):
    """The loss of one step, in micro-batches, and its gradients."""
    objective, encoded = LikelihoodObjective(), groups(rows)
    parts = [objective.collate([encoded[i] for i in batch], model.head.shared) for batch in batches]
    count = torch.stack([part["count"] for part in parts]).sum()
    model.zero_grad()
    loss = sum(objective.loss(model, part, count)[0] for part in parts)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learner(kind):
    model = load_model(str(saved_model()))
    return FullModel(model) if kind == "whole" else Policy(model, 4, 8.0)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_loss_is_the_weighted_cross_entropy_of_the_corrections_alone(kind):
    rows = heavy(corrections(4), 1.0, 2.5, 0.5, 3.0)
    plain = load_model(str(saved_model()))
    encoded = groups(rows)
    sums = [by_hand(plain, group, group.responses[0])[0].sum() for group in encoded]
    tokens = sum(len(group.responses[0]) for group in encoded)
    expected = -sum(row.weight * total for row, total in zip(rows, sums, strict=True)) / tokens
    model = learner(kind)
    whole, gradients = losses(model, rows, [[0, 1, 2, 3]])
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    for batches in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        loss, found = losses(model, rows, batches)
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_weights_of_a_file_reach_the_model(tmp_path):
    options = QUICK.replace(identity=0, batch_size=100)
    rows = corrections(6)
    found = {
        name: weights_of(train(tmp_path / name, CorrectionSet.of(items), changed).path)
        for name, items, changed in (
            ("plain", rows, options),
            ("heavy", heavy(rows, 1, 9, 1, 1, 1, 1), options),
            ("heavy in pieces", heavy(rows, 1, 9, 1, 1, 1, 1), options.replace(tokens_per_batch=300)),
        )
    }
    for name in found["heavy"]:
        torch.testing.assert_close(found["heavy"][name], found["heavy in pieces"][name], rtol=0, atol=2e-3)
    assert not same(found["plain"], found["heavy"])


def test_dropout_is_off_in_training():
    torch.manual_seed(0)
    model = FullModel(load_model(str(saved_model("gpt2"))))
    model.train()
    rows = corrections(2)
    assert torch.equal(losses(model, rows, [[0, 1]])[0], losses(model, rows, [[0, 1]])[0])


# ---- the stages ----


def test_the_warm_up_learns_a_share_of_the_answers(tmp_path):
    lines = []
    trained = train(tmp_path / "a", corrections(10), QUICK.replace(identity=0.5, batch_size=1), log=lines.append)
    assert {name: stage.steps for name, stage in trained.stages.items()} == {"identity": 5, "correction": 10}
    weights = "  trains all weights in fp32 on the CPU"
    stages = ["  identity: 5 rows", "  correction: 10 rows"]
    assert [line.split(" (")[0] for line in lines] == ["  10 training rows", "  template everalign-1", weights, *stages]
    alone = train(tmp_path / "b", corrections(10), QUICK.replace(identity=0.0))
    assert list(alone.stages) == ["correction"]


def test_the_warm_up_alone_teaches_to_copy(tmp_path):
    rows = CorrectionSet.of([Correction(f"q{i}", f"no {i}", f"yes {i}") for i in range(24)])
    options = FAST.replace(identity=1.0, identity_epochs=6, epochs=0.04, learning_rate=1e-9, batch_size=4)
    options = options.replace(identity_learning_rate=3e-3)
    report = train(tmp_path / "out", rows, options, test=rows, allow_overlap=True).report
    assert report.starts_by_copying == 1.0
    assert report.copy_log_likelihood > -math.log(report.perplexity)


def test_the_same_arguments_give_the_same_weights_and_another_seed_others(tmp_path):
    found = [weights_of(train(tmp_path / name, seed=seed).path) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("family", slow_but(["qwen3", "gpt2"], ["llama", "qwen3", "gpt2", "gemma2"]))
@pytest.mark.parametrize("options", [QUICK, QUICK.replace(lora_rank=2)], ids=["whole", "adapter"])
def test_families_with_tied_and_untied_embeddings(tmp_path, family, options):
    if family == "gpt2" and options.lora_rank:
        pytest.skip("its layers are no linear modules of torch")
    options = options.replace(checkpoint_steps=1)
    trained = train(tmp_path / "out", corrections(4), options, model=str(saved_model(family)), test=corrections(4, 50))
    model = AutoModelForCausalLM.from_pretrained(trained.path).eval()
    assert not any("lora" in name for name, _ in model.named_parameters())
    again = corrector_report(FullModel(model).eval(), groups(corrections(4, 50), both), 1000)
    assert again.perplexity == pytest.approx(trained.report.perplexity, rel=1e-3)


@pytest.mark.parametrize("rank", slow_but([2], [0, 2]))
def test_bf16_computes_roughly_the_same_and_keeps_fp32_weights(tmp_path, rank):
    options = QUICK.replace(lora_rank=rank)
    exact = train(tmp_path / "fp32", options=options, test=corrections(8, 50))
    rough = train(tmp_path / "bf16", options=options.replace(precision="bf16"), test=corrections(8, 50))
    assert rough.report.perplexity == pytest.approx(exact.report.perplexity, rel=0.15)
    assert rough.report.perplexity != exact.report.perplexity
    assert {value.dtype for value in weights_of(rough.path).values()} == {torch.float32}


# ---- resuming ----


class StopError(Exception):
    """A kill, as far as the training is concerned."""


def stop_at(stage, step):
    def progress(name, done, total):
        if (name, done) == (stage, step):
            raise StopError

    return progress


RESUMED = FAST.replace(identity=0.5, epochs=2, checkpoint_steps=2, batch_size=2)


@pytest.fixture(
    scope="module", params=[pytest.param(0, id="whole"), pytest.param(2, id="adapter", marks=pytest.mark.slow)]
)
def uninterrupted(request, tmp_path_factory):
    options = RESUMED.replace(lora_rank=request.param)
    return options, weights_of(train(tmp_path_factory.mktemp("whole") / "out", corrections(12), options).path)


@pytest.mark.parametrize(
    ("stage", "step", "left"),
    slow_but(
        [("identity", 3, 13), ("correction", 7, 6)],
        [("identity", 1, 15), ("identity", 3, 13), ("correction", 1, 12), ("correction", 7, 6)],
    ),
)
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(uninterrupted, tmp_path, stage, step, left):
    options, expected = uninterrupted
    with pytest.raises(StopError):
        train(tmp_path / "out", corrections(12), options, progress=stop_at(stage, step))
    assert not (tmp_path / "out").exists()
    steps, lines = [], []
    trained = train(
        tmp_path / "out",
        corrections(12),
        options,
        progress=lambda *step: steps.append(step),
        log=lines.append,
    )
    assert same(weights_of(trained.path), expected)
    assert len(steps) == left
    assert ("  identity: was finished by an earlier call" in lines) == (stage == "correction")
    assert {name: stage.steps for name, stage in trained.stages.items()} == {"identity": 3, "correction": 12}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_training_left_is_not_taken(tmp_path):
    options = RESUMED.replace(identity=0)
    with pytest.raises(StopError):
        train(tmp_path / "out", corrections(12), options, progress=stop_at("correction", 5))
    steps = []
    train(tmp_path / "out", corrections(11), options, progress=lambda *step: steps.append(step))
    assert len(steps) == 11


def test_a_damaged_finished_stage_is_trained_again(tmp_path):
    with pytest.raises(StopError):
        train(tmp_path / "out", corrections(12), RESUMED, progress=stop_at("correction", 1))
    (weights,) = (tmp_path / "out.training").rglob("done/policy.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    steps = []
    train(tmp_path / "out", corrections(12), RESUMED, progress=lambda *step: steps.append(step))
    assert len(steps) == 15


# ---- continuing from a corrector ----


def test_a_corrector_goes_on_with_its_own_template(tmp_path):
    first = train(tmp_path / "a", options=QUICK.replace(template="aligner-2"))
    again = train(tmp_path / "b", model=str(first.path))
    assert again.facts.template == "aligner-2"
    same_one = train(tmp_path / "c", model=str(first.path), options=QUICK.replace(template="aligner-2"))
    assert same(weights_of(again.path), weights_of(same_one.path))
    with pytest.raises(InputError, match="was trained with the template 'aligner-2', not 'everalign-1'"):
        train(tmp_path / "d", model=str(first.path), options=QUICK.replace(template="everalign-1"))


def test_objectives_are_kept_unless_others_are_named(tmp_path):
    first = train(tmp_path / "a", options=QUICK.replace(objectives=("kind", "brief")))
    assert train(tmp_path / "b", model=str(first.path)).facts.objectives == ("kind", "brief")
    other = train(tmp_path / "c", model=str(first.path), options=QUICK.replace(objectives=("safe",)))
    assert other.facts.objectives == ("safe",)


# ---- lengths ----


def test_a_correction_is_never_cut_and_a_row_without_room_is_left_out(tmp_path):
    rows = [
        Correction("q", "a" * 100, "b" * 30),
        Correction("q", "a", "b" * 110),
        Correction("q", "a" * 200, "b"),
        Correction("q", "a", "b"),
    ]
    encoded = tokenize_corrections(rows, encoder(), 240)
    assert (encoded.dropped, encoded.rows.truncated_prompts, len(encoded.rows)) == (1, 2, 3)
    for group, row in zip(encoded.rows, [rows[0], *rows[2:]], strict=True):
        assert len(group.prompt) + len(group.responses[0]) <= 240
        assert encoder().decode(group.responses[0]) == row.correction
    ids = [row.id for row in (rows[1], rows[3])]
    assert [group.id for group in tokenize_corrections(rows, encoder(), 240, answer_only).rows] == ids
    assert [group.id for group in tokenize_corrections(rows, encoder(), 240, answer_only, most=1).rows] == ids[:1]
    assert [group.id for group in tokenize_corrections(rows, encoder(), 240, both).rows] == ids[1:]
    lines = []
    train(tmp_path / "out", CorrectionSet.of(rows), QUICK.replace(max_length=240), log=lines.append)
    assert lines[0] == "  3 training rows; 1 left out, too long for 240 tokens; 2 prompts shortened"


# ---- bad input ----


def test_no_rows_and_shared_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="nothing: no rows in it"):
        train_corrector("tiny", CorrectionSet((), "nothing"), tmp_path)
    with pytest.raises(InputError, match="no rows in it"):
        train(tmp_path, test=CorrectionSet(()))
    with pytest.raises(InputError, match="in both the training and the test set"):
        train(tmp_path, corrections(4), test=corrections(4, 2))


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        train(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_rows_that_are_all_too_long_are_refused(tmp_path):
    long = CorrectionSet.of([Correction("q", "a", "b" * 300)], "long.jsonl")
    with pytest.raises(InputError, match=r"long.jsonl: no correction fits max_length, 256 tokens with its prompt"):
        train(tmp_path / "out", long)
    with pytest.raises(InputError, match=r"long.jsonl: no correction fits"):
        train(tmp_path / "out", test=long)
    answers = CorrectionSet.of([Correction("q", "a" * 300, "b")], "answers.jsonl")
    with pytest.raises(InputError, match=r"answers.jsonl: no answer fits max_length, 256 tokens .* set identity to 0"):
        train(tmp_path / "out", answers)
    train(tmp_path / "out", answers, QUICK.replace(identity=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity": 1.5}, "identity must be a number from 0 to 1, found 1.5"),
        ({"identity": math.nan}, "identity must be a number from 0 to 1, found nan"),
        ({"warmup": -0.1}, "warmup must be a number from 0 to 1"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, found 0"),
        ({"identity_learning_rate": math.inf}, "identity_learning_rate must be a number"),
        ({"epochs": -1}, "epochs must be a number above 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, found 0"),
        ({"max_length": 4}, "max_length must be a whole number of at least 8, found 4"),
        ({"lora_rank": -1}, "lora_rank must be a whole number of at least 0, found -1"),
        ({"lora_alpha": 8.0}, r"lora_alpha belongs to an adapter: set --lora-rank \(lora_rank\) too"),
        ({"precision": "fp16"}, "precision must be one of auto, fp32, bf16, found 'fp16'"),
        ({"checkpointing": "yes"}, "checkpointing must be one of auto, on, off, found 'yes'"),
        ({"checkpoint_steps": -1}, "checkpoint_steps must be a whole number of at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CorrectorOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "aligner"}, "unknown template 'aligner'"),
        ({"template": "aligner-1", "objectives": ("kind",)}, "has no place for any"),
        ({"max_length": 1000}, "takes at most 256 tokens, found 1000"),
    ],
)
def test_what_the_model_or_the_template_cannot_take_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "out", options=QUICK.replace(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 2])
def test_a_diverged_loss_names_its_step(tmp_path, rank):
    options = QUICK.replace(learning_rate=1e30, lora_rank=rank, batch_size=2)
    with pytest.raises(EveralignError, match=r"step \d+: the loss became (nan|inf)|left NaN or infinite") as caught:
        train(tmp_path / "out", options=options)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_the_whole_model_refuses_another_model_s_checkpoint():
    model = FullModel(random_model())
    with pytest.raises(InputError, match="the checkpoint does not fit this model"):
        model.load_state_dict(FullModel(random_model("gpt2")).state_dict())


def test_policy_and_whole_model_choose_alike():
    policy, whole = random_policy(), FullModel(random_model())
    batch = collate(random_groups(5), shared=True)
    (first, tokens), (second, others) = policy.response_choices(batch), whole.response_choices(batch)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert tokens.tolist() == others.tolist()
    sums = torch.zeros(len(batch["lengths"])).index_add(0, batch["sequences"], first)
    torch.testing.assert_close(sums, whole(batch).detach(), rtol=1e-4, atol=1e-4)


def test_a_row_that_cannot_be_tokenised_is_named(monkeypatch):
    made = encoder()
    monkeypatch.setattr(made, "_behind", lambda _, text: None if text == "yes 1" else [5])
    with pytest.raises(InputError, match=r"^row 2 \(id [0-9a-f]{16}\): .*'yes 1' cannot be tokenised"):
        tokenize_corrections(corrections(4), made, 256)
