"""The same batch, the same adapter: TRL's DPOTrainer and ours give the same loss, margins and gradients."""

import pytest
import torch

from everalign.data.collate import collate
from everalign.data.records import Preference
from everalign.data.tokenization import tokenize_preferences
from everalign.modeling.policy import Policy
from everalign.training.objectives import make_objective
from everalign.training.options import StageOptions
from everalign.training.reference import Reference, sequence_logprobs
from everalign.training.stage import train_stage
from models_for_tests import perturb, random_model
from tokenizers_for_tests import byte_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

ROWS = [
    ("What is 2 + 2?", " It is 4.", " No idea"),
    ("Hi", " Hello! How can I help you today?", " What"),
    ("Tell me a long story about a fox", " No", " Once upon a time there was a fox, and then there was none."),
    ("Name a colour: ", "blue", "seven"),
]
RANK, ALPHA, BETA = 4, 8.0, 0.1


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    """Ours, with an adapter that has learned something."""
    return perturb(Policy(random_model(vocabulary=len(tokenizer)), RANK, ALPHA, ["q_proj", "v_proj", "down_proj"]))


@pytest.fixture(scope="module")
def pairs(tokenizer):
    rows = [Preference(prompt=prompt, chosen=chosen, rejected=rejected) for prompt, chosen, rejected in ROWS]
    return tokenize_preferences(rows, tokenizer, max_length=256)


@pytest.fixture
def theirs(policy, tokenizer, tmp_path):
    """TRL's trainer on the same base model with the same adapter."""
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*ROWS, strict=True)), strict=True))
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(ROWS),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_train_epochs=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    trainer = trl.DPOTrainer(
        random_model(vocabulary=len(tokenizer)),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=config,
    )
    parameters = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in policy.state_dict().items():
            parameters[their_name(name)].copy_(value)
    return trainer


def their_name(name):
    return name.removeprefix("peft.").replace(".stm.", ".default.")


def their_batch(trainer, tokenizer):
    """All rows in one batch, in their order, as their own collator lays them out."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return trainer.data_collator([{key: row[key] for key in columns} for row in trainer.train_dataset])


def our_batch(policy, pairs, objective):
    with policy.as_base():
        reference = torch.cat(sequence_logprobs(policy, pairs, 200))
    return {**objective.collate(pairs, shared=True), "reference": reference}


def gradients_of(policy, pairs, objective):
    batch = our_batch(policy, pairs, objective)
    policy.zero_grad()
    objective.loss(policy, batch, batch["count"])[0].backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def test_the_tokens_are_the_same(theirs, pairs, tokenizer):
    batch, ours = their_batch(theirs, tokenizer), collate(pairs, shared=False)
    mask = batch["attention_mask"]
    # They put all chosen sequences before the rejected ones, we a pair's two beside each other.
    order = torch.arange(len(mask)).view(2, -1).T.flatten()
    mask = mask[order]
    assert torch.equal(batch["input_ids"][order] * mask, ours["input_ids"])
    assert torch.equal(mask, ours["attention_mask"])
    rows, columns = batch["completion_mask"][order].nonzero(as_tuple=True)
    assert torch.equal(rows * mask.shape[1] + columns - 1, ours["predictors"])
    assert torch.equal(rows, ours["sequences"])


@pytest.mark.parametrize("name", ["dpo", "fpo"])
def test_margins_loss_and_every_gradient_are_the_same(theirs, policy, pairs, tokenizer, name):
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, their_batch(theirs, tokenizer))
    loss.backward()
    expected = {key: p.grad for key, p in theirs.model.named_parameters() if p.requires_grad}

    objective = make_objective(name, beta=BETA, gamma=0.0 if name == "fpo" else None)
    batch = our_batch(policy, pairs, objective)
    policy.zero_grad()
    ours, metrics = objective.loss(policy, batch, batch["count"])
    ours.backward()
    gradients = {their_name(key): p.grad for key, p in policy.named_parameters() if p.requires_grad}

    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["margin"].mean().item() == pytest.approx(theirs._metrics["train"]["rewards/margins"][0], abs=1e-5)
    assert metrics["margin"].abs().min() > 1e-3
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-5)


def test_three_optimiser_steps_are_the_same(theirs, policy, pairs, tokenizer, tmp_path):
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    theirs.train()
    with policy.as_base():
        reference = sequence_logprobs(policy, pairs, 200)
    options = StageOptions(
        learning_rate=1e-3,
        epochs=3.0,
        batch_size=len(ROWS),
        tokens_per_batch=180,
        warmup=0.0,
        scheduler="constant",
        logging_steps=1,
        checkpoint_steps=0,
    )
    objective = make_objective("dpo", beta=BETA)
    gradients = gradients_of(policy, pairs, objective)
    result = train_stage(
        policy, objective, pairs, options, None, seed=0, reference=lambda: Reference("base", reference)
    )
    parameters = dict(theirs.model.named_parameters())
    try:
        for name, value in policy.state_dict().items():
            assert (value - start[name]).abs().max() > 1e-3
            # Steps of 1e-3. Adam divides a gradient by its own size, so that where there is next to none (a median one
            # is 1e-2) its rounding moves an element further than the rest.
            distance, rounded = (value - parameters[their_name(name)]).abs(), gradients[name].abs() < 1e-5
            assert distance[~rounded].max() < 1e-6
            assert rounded.sum() <= 1
            assert distance.max() < 2e-5
        losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in result.curve] == pytest.approx(losses, abs=1e-5)
    finally:
        policy.load_state_dict(start)
