"""Correctors and reward models that learn on a base model quantised as it is loaded, and end in plain weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from cli_for_tests import run as cli
from cli_for_tests import write_rows
from corrections_for_tests import FAST as CORRECTING
from corrections_for_tests import corrections
from everalign import Corrector
from everalign.correction import CorrectionEncoder, CorrectorOptions, get_template, train_corrector
from everalign.correction import training as correction_training
from everalign.correction.tokenization import both, tokenize_corrections
from everalign.correction.training import corrector_report
from everalign.data.tokenization import pad_right, tokenize_answers
from everalign.errors import InputError
from everalign.evaluation.scorers import RewardModel
from everalign.modeling import base_weights
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint, tiny_assistant_path
from everalign.modeling.policy import Policy
from everalign.modeling.reward_model import (
    RewardNetwork,
    add_adapter,
    load_classifier,
    load_reward_model,
    sequence_rewards,
    set_padding,
)
from everalign.modeling.trainable import FullModel, computing_on
from everalign.training import reward_model as reward_training
from everalign.training.options import RewardOptions
from everalign.training.reward_model import train_reward_model
from models_for_tests import packed, saved_model
from rewards_for_tests import FAST as REWARDING
from rewards_for_tests import pairs
from tokenizers_for_tests import byte_tokenizer

pytest.importorskip("bitsandbytes", reason="quantises: pip install everalign[quantize]")

RANK = 8
REWARD = REWARDING.replace(quantize="nf4", lora_rank=RANK, learning_rate=3e-3)
CORRECTION = CORRECTING.replace(quantize="nf4", lora_rank=RANK, learning_rate=3e-3)
CPU = torch.device("cpu")


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def answers(rows):
    return [row.prompt for row in rows for _ in range(2)], [text for row in rows for text in (row.chosen, row.rejected)]


def rewards_of(classifier, model, precision="fp32"):
    """Rewards (N, 2), not centred, of held-out chosen and rejected answers."""
    rows = tokenize_answers(*answers(pairs(20, 100)), load_tokenizer(str(model)), 64)[0]
    return sequence_rewards(RewardNetwork(classifier, precision).eval(), rows, 1000).view(-1, 2)


def held_out_rows(model):
    encoder = CorrectionEncoder(load_tokenizer(str(model)), get_template("everalign-1"))
    return tokenize_corrections(corrections(20, 100), encoder, 256, both).rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded assistant in fp32, so that nothing is rounded when it is written again.

    Quantisation moves the logits of models with random weights much further than those of one that has learned.
    """
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_pretrained(tiny_assistant_path(), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(model, tmp_path_factory):
    """A trained reward model, what its training said, and the quantised classifier before it was merged."""
    lines, before, merge = [], [], reward_training.with_adapter_merged

    def merging(adapted, plain):
        kinds = {type(part).__name__ for name, part in adapted.named_modules() if name.endswith("proj.base_layer")}
        head = adapted.base_model.model.score.modules_to_save["default"]
        before.append(SimpleNamespace(kinds=kinds, rewards=rewards_of(adapted, model), head=head.weight.clone()))
        return merge(adapted, plain)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_training, "with_adapter_merged", merging)
        trained = train_reward_model(
            str(model), pairs(), tmp_path_factory.mktemp("reward") / "reward",
            test=pairs(20, 100), options=REWARD, log=lines.append,
        )  # fmt: skip
    return SimpleNamespace(trained=trained, lines=lines, before=before[0])


@pytest.fixture(scope="module")
def corrector(model, tmp_path_factory):
    """A trained corrector, what its training said, and how it did on the quantised base model."""
    lines, before, merged = [], [], correction_training._merged

    def merging(learner, name):
        if isinstance(learner, Policy):
            parts = learner.language_model.named_modules()
            kinds = {type(part).__name__ for name, part in parts if name.endswith("proj.base_layer")}
            report = corrector_report(learner.eval(), held_out_rows(model), 1000)
            before.append(SimpleNamespace(kinds=kinds, report=report))
        return merged(learner, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correction_training, "_merged", merging)
        trained = train_corrector(
            str(model), corrections(), tmp_path_factory.mktemp("corrector") / "corrector",
            test=corrections(20, 100), options=CORRECTION, log=lines.append,
        )  # fmt: skip
    return SimpleNamespace(trained=trained, lines=lines, before=before)


# ---- what is learned, and what is written ----


@pytest.mark.parametrize("made", ["reward", "corrector"])
def test_plain_weights_with_an_update_of_the_adapter_s_rank_are_written(made, model, request):
    found = request.getfixturevalue(made)
    before, after = weights_of(model), weights_of(found.trained.path)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert not any("lora" in name or "quant" in name for name in after)
    assert "quantization_config" not in json.loads((found.trained.path / "config.json").read_text())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        name = f"model.layers.0.{part}.weight"
        # The plain weights, not what their quantisation made of them.
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4) == RANK
    facts = found.trained.facts
    assert facts.settings["quantize"] == "nf4"
    plain = load_model(str(model))
    expected = plain if made == "corrector" else load_classifier(str(model), fresh_head=True).base_model
    assert facts.base_fingerprint == f"{model_fingerprint(expected)}-nf4"
    what = "an adapter of rank 8 on a base model that is quantised to nf4, in fp32 on the CPU"
    assert f"  trains {what}" in found.lines
    assert any("merged into the plain weights; the merged model scores" in line for line in found.lines)


def test_the_merged_reward_model_is_what_was_scored_and_close_to_what_was_learned(reward, model):
    assert reward.before.kinds == {"Linear4bit"}
    assert reward.trained.report.accuracy > 0.9
    rewards = rewards_of(load_reward_model(reward.trained.path)[0].classifier, model)
    log_loss = nn.functional.softplus(rewards[:, 1] - rewards[:, 0]).mean().item()
    assert log_loss == pytest.approx(reward.trained.report.log_loss, rel=1e-3)
    learned = nn.functional.softplus(reward.before.rewards[:, 1] - reward.before.rewards[:, 0]).mean().item()
    assert log_loss != pytest.approx(learned, rel=1e-3)
    prompts, completions = answers(pairs())
    centred = torch.tensor(RewardModel.from_folder(reward.trained.path).score(prompts, completions))
    assert centred.mean().abs() < 1e-5
    moved = ((rewards - reward.before.rewards).std() / rewards.std()).item()
    assert 0.001 < moved < 0.1


def test_the_merged_corrector_is_what_was_scored_and_close_to_what_was_learned(corrector, model):
    (before,) = corrector.before  # merged once
    assert before.kinds == {"Linear4bit"}
    rows, report = held_out_rows(model), corrector.trained.report
    written = AutoModelForCausalLM.from_pretrained(corrector.trained.path)
    found = corrector_report(FullModel(written).eval(), rows, 1000)
    assert report.perplexity == pytest.approx(found.perplexity, rel=1e-3)
    assert report.perplexity != pytest.approx(before.report.perplexity, rel=1e-3)
    base = corrector_report(FullModel(load_model(str(model))).eval(), rows, 1000)
    assert report.perplexity < base.perplexity / 5
    assert report.perplexity == pytest.approx(before.report.perplexity, rel=0.2)


def test_bf16_computes_roughly_the_same(reward, corrector, model, tmp_path):
    options = REWARD.replace(precision="bf16")
    rough = train_reward_model(str(model), pairs(), tmp_path / "reward", test=pairs(20, 100), options=options)
    assert rough.report.accuracy > 0.9
    assert rough.report.log_loss != reward.trained.report.log_loss
    assert {value.dtype for value in weights_of(rough.path).values()} == {torch.float32}
    # Rounded in memory, the weights gave the figures that those on disk give.
    rewards = rewards_of(load_reward_model(rough.path)[0].classifier, model, "bf16")
    log_loss = nn.functional.softplus(rewards[:, 1] - rewards[:, 0]).mean().item()
    assert log_loss == pytest.approx(rough.report.log_loss, rel=1e-3)
    options, rows = CORRECTION.replace(precision="bf16"), corrections(20, 100)
    rough = train_corrector(str(model), corrections(), tmp_path / "corrector", test=rows, options=options)
    assert rough.report.perplexity == pytest.approx(corrector.trained.report.perplexity, rel=0.15)
    assert rough.report.perplexity != corrector.trained.report.perplexity


# ---- the score head ----


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_score_head_is_a_plain_linear_module_that_learns_in_fp32(precision, quantize):
    classifier = load_classifier(str(saved_model()), True, precision=precision, quantize=quantize)
    assert isinstance(classifier.score, nn.Linear)
    kinds = {type(part).__name__ for name, part in classifier.named_modules() if name.endswith("proj")}
    assert kinds == {"Linear4bit" if quantize else "Linear"}
    set_padding(classifier, load_tokenizer(str(saved_model())))
    adapted = add_adapter(classifier, 4, 8.0, 0, "model")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    head = adapted.base_model.model.score.modules_to_save["default"]
    assert isinstance(head, nn.Linear)
    rewards = RewardNetwork(adapted, precision)
    assert "classifier.base_model.model.score.modules_to_save.default.weight" in rewards.state_dict()
    rewards(pad_right([[5, 6, 7], [8, 9]], rewards.padding)).sum().backward()
    assert head.weight.grad.norm() > 0


def test_the_head_of_the_trained_reward_model_has_moved(reward, model):
    fresh = load_classifier(str(model), fresh_head=True).score.weight
    after = weights_of(reward.trained.path)["score.weight"]
    assert 0.01 < ((after - fresh).norm() / fresh.norm()).item() < 1
    assert torch.equal(after, reward.before.head)


def test_a_head_of_several_modules_stays_plain(tmp_path):
    tokenizer = byte_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kinds = {}
    for name, part in load_classifier(str(tmp_path), True, quantize="nf4").named_modules():
        if isinstance(part, nn.Linear):
            kinds.setdefault(name.partition(".")[0], set()).add(type(part).__name__)
    assert kinds == {"roberta": {"Linear4bit"}, "classifier": {"Linear", "_ScoreHead"}}


# ---- computing elsewhere in less memory ----


def test_weights_in_the_precision_of_the_products_give_the_same_bits_and_come_back():
    rows, plain = held_out_rows(saved_model()), load_model(str(saved_model()))
    learner = FullModel(plain, "bf16").eval()
    expected = corrector_report(learner, rows, 1000)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with computing_on(plain, CPU, "bf16"):
        assert {p.dtype for name, p in plain.named_parameters() if "proj" in name} == {torch.bfloat16}
        assert {p.dtype for name, p in plain.named_parameters() if "proj" not in name} == {torch.float32}
        assert corrector_report(learner, rows, 1000) == expected
        plain.model.rotary_emb.inv_freq = torch.zeros(4)  # as a move to another device replaces it
    assert same(plain.state_dict(), before)
    assert corrector_report(learner, rows, 1000) == expected
    with pytest.raises(ZeroDivisionError), computing_on(plain, CPU, "bf16"):
        raise ZeroDivisionError
    assert same(plain.state_dict(), before)
    with computing_on(plain, CPU, "fp32"):
        assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_rewards_of_weights_in_bf16_are_the_same_bits():
    classifier = load_classifier(str(saved_model()), fresh_head=True)
    set_padding(classifier, load_tokenizer(str(saved_model())))
    expected = rewards_of(classifier, saved_model(), "bf16")
    with computing_on(classifier, CPU, "bf16"):
        assert classifier.score.weight.dtype == torch.float32
        assert torch.equal(rewards_of(classifier, saved_model(), "bf16"), expected)


# ---- going on ----


class StopError(Exception):
    """A kill, as far as the training is concerned."""


TRAININGS = {
    "reward": (train_reward_model, pairs, REWARD.replace(epochs=1, checkpoint_steps=1)),
    "corrector": (train_corrector, corrections, CORRECTION.replace(epochs=1, identity=0.0, checkpoint_steps=1)),
}


def steps_until(last, kind, output, quantize):
    """The steps of a training that is killed at one of them."""
    train, rows, options = TRAININGS[kind]
    done = []

    def progress(_, step, total):
        done.append(step)
        if step == last:
            raise StopError

    with pytest.raises(StopError):
        train(str(saved_model()), rows(), output, options=options.replace(quantize=quantize), progress=progress)
    return done


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize(("first", "second"), [(None, "nf4"), ("nf4", None)])
def test_trainings_with_and_without_it_do_not_mix(kind, first, second, tmp_path):
    assert steps_until(3, kind, tmp_path / "out", first) == [1, 2, 3]
    assert steps_until(2, kind, tmp_path / "out", second) == [1, 2]
    assert steps_until(4, kind, tmp_path / "out", first) == [3, 4]


def test_checkpoints_without_it_have_the_names_that_they_had_before_it_existed():
    """Computed by the code before."""
    encoder, encoded = SimpleNamespace(fingerprint="encoding"), SimpleNamespace(fingerprint="pairs")
    for rank, names in ((0, ("f3dc2af59f22bcaf", "2c2e53ceb26770cf")), (4, ("2a033573d455abbe", "4b92027dd438f9dd"))):
        key = correction_training._training_key("base", encoder, {}, CorrectorOptions(lora_rank=rank), 0)
        assert key == names[0]
        assert reward_training._training_key("base", "template", encoded, RewardOptions(lora_rank=rank), 0) == names[1]


# ---- what cannot work ----


def refused(kind, tmp_path, model, message):
    train, rows, options = TRAININGS[kind]
    with pytest.raises(InputError, match=message) as caught:
        train(str(model), rows(), tmp_path / "out", options=options)
    assert caught.value.field == "quantize"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("kind", TRAININGS)
def test_what_cannot_be_quantised_is_refused_before_training(kind, tmp_path, monkeypatch):
    refused(
        kind, tmp_path, packed(saved_model(), tmp_path / "packed"),
        "packed is quantised already, with bitsandbytes: leave quantize out, or name the plain model",
    )  # fmt: skip
    (tmp_path / "adapter").mkdir()
    Policy(load_model(str(saved_model())), 2, 4.0).save_adapter(tmp_path / "adapter")
    refused(
        kind, tmp_path, tmp_path / "adapter",
        r"quantize nf4: an adapter is merged into plain weights; write the merged model first",
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=0, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "shallow")
    tokenizer.save_pretrained(tmp_path / "shallow")
    refused(kind, tmp_path, tmp_path / "shallow", "shallow has no linear modules below its head that could be quant")
    monkeypatch.setattr(base_weights, "find_spec", lambda name: None)
    for part in (correction_training, reward_training):
        monkeypatch.setattr(part, "load_tokenizer", None)  # it is found before anything is loaded
    refused(kind, tmp_path, saved_model(), r"quantize nf4 needs bitsandbytes: pip install 'everalign\[quantize\]'")


@pytest.mark.parametrize("options", [RewardOptions, CorrectorOptions])
def test_bad_options_are_refused_by_name(options):
    for value in ("int4", "NF4", True, 4):
        with pytest.raises(InputError, match="quantize must be one of nf4, found "):
            options(quantize=value, lora_rank=4)
    with pytest.raises(InputError, match=r"quantize freezes .* set --lora-rank \(lora_rank\) too") as caught:
        options(quantize="nf4")
    assert caught.value.field == "quantize"
    assert options(quantize="nf4", lora_rank=1).quantize == "nf4"


# ---- from outside ----


@pytest.mark.parametrize("verb", ["reward", "correct"])
def test_the_flag(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", pairs(16) if verb == "reward" else corrections(16))
    arguments = [verb, "train", "--model", str(saved_model()), "--data", "rows.jsonl", "--output", "out"]
    code, _, error = cli(capsys, *arguments, "--quantize", "nf4")
    assert code == 2
    assert "error: --quantize freezes the model's own weights, and an adapter learns" in error
    code, _, error = cli(capsys, *arguments, "--quantize", "int4", "--lora-rank", "4")
    assert code == 2
    assert "error: --quantize must be one of nf4, found 'int4'" in error
    code, _, error = cli(capsys, *arguments, "--quantize", "nf4", "--lora-rank", "4")
    assert code == 0, error
    facts = "everalign_reward.json" if verb == "reward" else "corrector.json"
    assert json.loads((Path("out") / facts).read_text())["settings"]["quantize"] == "nf4"


def test_one_call_in_python(tmp_path):
    options = {"quantize": "nf4", "lora_rank": 4, "epochs": 0.1, "identity": 0.0}
    corrector = Corrector.train(str(saved_model()), corrections(16), tmp_path / "corrector", **options)
    assert corrector.correct("q1?", "no 1").text
    reward = RewardModel.train(
        str(saved_model()), pairs(16), tmp_path / "reward", quantize="nf4", lora_rank=4, epochs=0.1
    )
    assert len(reward.score(["q1?"], ["yes! 1"])) == 1
