"""A reward model: what it learns, what its folder holds, and that an answer's reward depends on nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaForSequenceClassification,
)

from everalign.data import PreferenceSet
from everalign.data.tokenization import TokenizedRow, pad_right, tokenize_answers, tokenize_preferences
from everalign.errors import EveralignError, InputError
from everalign.evaluation.scorers import RewardModel
from everalign.modeling.loading import load_tokenizer
from everalign.modeling.reward_model import (
    FACTS_FILE,
    RewardNetwork,
    add_adapter,
    load_classifier,
    load_reward_model,
    sequence_rewards,
    set_padding,
)
from everalign.training.options import RewardOptions
from everalign.training.reward_model import BradleyTerryObjective, reward_report, train_reward_model
from models_for_tests import FAMILIES, random_model, saved_model
from rewards_for_tests import FAST, pairs, reward_model
from tokenizers_for_tests import CHATML, byte_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A copy of the trained reward model, to be spoilt."""
    return shutil.copytree(reward_model().path, tmp_path / "reward")


def answers(rows=None):
    """Prompts and completions of both answers of all rows."""
    rows = pairs(12, 200) if rows is None else rows
    return [row.prompt for row in rows for _ in range(2)], [text for row in rows for text in (row.chosen, row.rejected)]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- training ----


def test_it_learns_to_tell_held_out_answers_apart():
    trained = reward_model()
    assert trained.report.accuracy > 0.9
    assert trained.report.log_loss < 0.4
    assert trained.report.pairs == 20
    assert trained.training.steps == 15
    assert trained.facts.accuracy == trained.report.accuracy


def test_the_embedded_assistant_learns_it_too(tmp_path):
    options = RewardOptions(learning_rate=1e-3, epochs=2, batch_size=8)
    trained = train_reward_model("tiny", pairs(), tmp_path / "reward", test=pairs(20, 100), options=options)
    assert trained.report.accuracy > 0.9
    assert trained.facts.max_length == 256  # what the model can take


def test_the_training_answers_are_centred():
    trained = reward_model()
    prompts, completions = answers(pairs())
    rewards = torch.tensor(RewardModel.from_folder(trained.path).score(prompts, completions))
    assert rewards.mean().abs() < 1e-5
    assert rewards.std(correction=0).item() == pytest.approx(trained.facts.scale, abs=1e-5)


def test_many_pairs_are_centred_by_some_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr("everalign.training.reward_model.CENTRED_BY", 4)
    trained = train_reward_model(str(saved_model()), pairs(16), tmp_path / "reward", options=FAST.replace(epochs=0.5))
    prompts, completions = answers(list(pairs(16))[::4])
    rewards = torch.tensor(RewardModel.from_folder(trained.path).score(prompts, completions))
    assert rewards.mean().abs() < 1e-5
    assert rewards.std(correction=0).item() == pytest.approx(trained.facts.scale, abs=1e-5)


def test_the_same_arguments_give_the_same_weights_and_another_seed_others(tmp_path):
    options = FAST.replace(epochs=1)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained = train_reward_model(str(saved_model()), pairs(16), tmp_path / name, options=options, seed=seed)
        assert trained.report is None
        assert trained.facts.accuracy is None
        weights.append(load_file(trained.path / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["score.weight"], weights[2]["score.weight"])


def test_an_adapter_learns_it_too_and_leaves_a_plain_classifier(tmp_path):
    options = FAST.replace(lora_rank=8, learning_rate=1e-2)
    trained = train_reward_model(str(saved_model()), pairs(), tmp_path / "reward", test=pairs(20, 100), options=options)
    assert trained.report.accuracy > 0.9
    before, after = (load_file(folder / "model.safetensors") for folder in (saved_model(), trained.path))
    # What no adapter sits on stays as it was; the head is trained as a whole.
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    update = after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 8
    fresh = load_classifier(str(saved_model()), fresh_head=True)
    assert not torch.equal(after["score.weight"], fresh.score.weight)
    assert not any("lora" in name for name in after)


def test_an_adapter_is_merged_where_the_tokenizer_has_no_padding_of_its_own(tmp_path):
    """The token that is added lengthens the embedding of both models: of the one that learns and of the plain one."""
    shutil.copytree(saved_model(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    options = FAST.replace(lora_rank=8, epochs=0.1)
    trained = train_reward_model(str(tmp_path / "model"), pairs(), tmp_path / "reward", options=options)
    before, after = (load_file(folder / "model.safetensors") for folder in (saved_model(), trained.path))
    assert len(after["model.embed_tokens.weight"]) == len(before["model.embed_tokens.weight"]) + 1
    assert not after["model.embed_tokens.weight"][-1].any()
    assert RewardModel.from_folder(trained.path).score(["q"], ["a"])


@pytest.mark.parametrize("rank", [0, 8])
def test_bf16_learns_it_and_its_rewards_are_computed_so(rank, tmp_path):
    rate = 1e-2 if rank else FAST.learning_rate
    options = FAST.replace(precision="bf16", lora_rank=rank, learning_rate=rate)
    lines = []
    trained = train_reward_model(
        str(saved_model()), pairs(), tmp_path / "reward", test=pairs(20, 100), options=options, log=lines.append
    )
    what = "an adapter of rank 8" if rank else "all weights, which stay fp32,"
    assert lines[0] == f"  trains {what} in bf16 on the CPU"
    assert trained.report.accuracy > 0.9
    assert {value.dtype for value in load_file(trained.path / "model.safetensors").values()} == {torch.float32}
    prompts, completions = answers()
    mixed = torch.tensor(RewardModel.from_folder(trained.path).score(prompts, completions))
    edit(trained.path / FACTS_FILE, settings={**trained.facts.settings, "precision": "fp32"})
    exact = torch.tensor(RewardModel.from_folder(trained.path).score(prompts, completions))
    assert not torch.equal(mixed, exact)
    assert (mixed - exact).abs().max() < 0.05 * exact.std()
    # The head computes in fp32: bf16 would give only a few hundred different numbers.
    assert (mixed.bfloat16().double() != mixed.double()).float().mean() > 0.9


def test_an_adapter_as_model_starts_from_what_it_has_learned(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_model(), dtype=torch.float32), config)
    adapted.save_pretrained(tmp_path)
    classifier, merged = load_classifier(str(tmp_path), fresh_head=True), adapted.merge_and_unload()
    assert all(
        torch.equal(value, dict(classifier.named_parameters())[name])
        for name, value in merged.named_parameters()
        if name.startswith("model.")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision must be one of auto, fp32, bf16, found 'fp16'"),
        ({"lora_rank": -1}, "lora_rank must be a whole number of at least 0"),
        ({"lora_alpha": 8.0}, r"lora_alpha belongs to an adapter: set --lora-rank \(lora_rank\) too"),
    ],
)
def test_adapter_and_precision_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RewardOptions(**options)


def classifier_of(family="llama", seed=0):
    tokenizer = load_tokenizer(str(saved_model(family)))
    classifier = load_classifier(str(saved_model(family)), fresh_head=True, seed=seed)
    set_padding(classifier, tokenizer)
    return RewardNetwork(classifier), tokenizer


def test_a_weight_counts_like_repeated_rows():
    model, tokenizer = classifier_of()
    rows = pairs(3)
    weighted = [replace(row, weight=weight) for row, weight in zip(rows, (1.0, 2.0, 1.0), strict=True)]
    objective = BradleyTerryObjective(model.padding, 0.01)
    losses = []
    for items in (weighted, [rows[0], rows[1], rows[1], rows[2]]):
        encoded = tokenize_preferences(items, tokenizer, 64)
        losses.append(objective.loss(model, objective.collate(encoded, False), torch.tensor(4))[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_smaller_micro_batches_change_no_weight(tmp_path):
    options = FAST.replace(epochs=1)
    weights = []
    for tokens in (10_000, 130):
        folder = tmp_path / str(tokens)
        changed = options.replace(tokens_per_batch=tokens)
        train_reward_model(str(saved_model()), pairs(16), folder, options=changed)
        weights.append(load_file(folder / "model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-3)


def test_dropout_is_off_in_training():
    model, _ = classifier_of("gpt2")
    model.train()
    batch = pad_right([[5, 6, 7], [5, 6, 7]], model.padding)
    torch.testing.assert_close(*model(batch).split(1), rtol=0, atol=1e-6)


def test_a_diverged_loss_names_its_step(tmp_path):
    with pytest.raises(EveralignError, match=r"step \d+: the loss became (nan|inf)") as caught:
        train_reward_model(str(saved_model()), pairs(16), tmp_path / "out", options=FAST.replace(learning_rate=1e30))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


# ---- bad input ----


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        train_reward_model(str(saved_model()), pairs(2), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    train_reward_model(str(saved_model()), pairs(4), tmp_path, options=FAST.replace(epochs=1))
    assert (tmp_path / FACTS_FILE).is_file()


def test_no_rows_and_shared_rows_are_refused(tmp_path):
    with pytest.raises(InputError, match="nothing: no rows in it"):
        train_reward_model("tiny", PreferenceSet((), "nothing"), tmp_path)
    with pytest.raises(InputError, match="no rows in it"):
        train_reward_model("tiny", pairs(2), tmp_path, test=PreferenceSet(()))
    with pytest.raises(InputError, match="in both the training and the test set"):
        train_reward_model("tiny", pairs(4), tmp_path, test=pairs(4, 2))


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="cannot load a tokenizer from the folder"):
        train_reward_model(str(tmp_path / "model"), pairs(2), tmp_path / "out")


def test_a_classifier_of_more_labels_is_refused(tmp_path):
    config = random_model().config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot load a sequence classifier with one label"):
        load_classifier(str(tmp_path), fresh_head=True)


def test_only_the_head_may_be_missing(tmp_path, folder):
    with pytest.raises(InputError, match=r"lack 1 of the model's parameters, such as score\.weight"):
        load_classifier(str(saved_model()), fresh_head=False)
    # A model of one more layer than the folder has weights for.
    shutil.copytree(saved_model(), tmp_path / "model")
    edit(tmp_path / "model" / "config.json", num_hidden_layers=3)
    with pytest.raises(InputError, match=r"lack \d+ of the model's parameters, such as model\.layers\.2"):
        load_classifier(str(tmp_path / "model"), fresh_head=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("epochs", -1.0),
        ("checkpointing", "yes"),
        ("batch_size", 0),
        ("tokens_per_batch", 0),
        ("max_length", 7),
        ("centring", -0.1),
        ("centring", float("inf")),
    ],
)
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(InputError, match=option):
        RewardOptions(**{option: value})


def test_a_length_that_the_model_cannot_take_is_refused(tmp_path):
    with pytest.raises(InputError, match="takes at most 256 tokens, found 257"):
        train_reward_model(str(saved_model()), pairs(2), tmp_path, options=FAST.replace(max_length=257))


def test_pairs_that_the_limit_makes_equal_are_refused():
    tokenizer = load_tokenizer(str(saved_model()))
    rows = PreferenceSet.of([{"prompt": "p", "chosen": "same beginning a", "rejected": "same beginning b"}])
    with pytest.raises(InputError, match="identical"):
        tokenize_preferences(rows, tokenizer, 8)


# ---- one answer, one reward ----


def tokens_of(row):
    return row.prompt + row.responses[0]


def test_scoring_equals_an_unbatched_forward_by_plain_transformers():
    trained = reward_model()
    classifier = AutoModelForSequenceClassification.from_pretrained(trained.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    prompts, completions = answers()
    found = RewardModel.from_folder(trained.path, tokens_per_batch=200).score(prompts, completions)
    rows = tokenize_answers(prompts, completions, tokenizer, 64)[0]
    with torch.no_grad():
        alone = [classifier(torch.tensor([tokens_of(row)])).logits.item() - trained.facts.mean for row in rows]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding_changes_no_reward(side):
    trained = reward_model()
    classifier = AutoModelForSequenceClassification.from_pretrained(trained.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.path, padding_side=side)
    texts = [f"q{i}?" + "yes! " * i + "</s>" for i in range(1, 6)]
    with torch.no_grad():
        found = classifier(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    ours = RewardModel.from_folder(trained.path)
    expected = ours.score([f"q{i}?" for i in range(1, 6)], ["yes! " * i for i in range(1, 6)])
    torch.testing.assert_close(found - trained.facts.mean, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_rewards_do_not_depend_on_the_batch(family):
    model, tokenizer = classifier_of(family)
    rows = tokenize_answers(*answers(), tokenizer, 64)[0]
    together = sequence_rewards(model, rows, 10_000)
    alone = sequence_rewards(model, rows, 1)
    backwards = sequence_rewards(model, rows[::-1], 300).flip(0)
    assert together.std() > 1e-3
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-5)


SHARING = [
    TokenizedRow("long", list(range(10, 40)), ([5, 6, 7], [5, 6, 7, 8, 9], [5], list(range(50, 70))), (1.0,) * 4),
    TokenizedRow("alone", [8, 9], ([3, 4, 5],), (1.0,)),
    TokenizedRow("long", list(range(10, 40)), ([5, 6, 9], [5, 6, 7]), (1.0,) * 2),
    TokenizedRow("short", [8, 9, 10], ([3], [4, 3]), (1.0,) * 2),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_share_a_prompt_have_the_rewards_that_transformers_gives_each_alone(family):
    model, _ = classifier_of(family)
    texts = [row.prompt + answer for row in SHARING for answer in row.responses]
    with torch.no_grad():
        alone = torch.stack([model.classifier(torch.tensor([tokens])).logits[0, 0] for tokens in texts])
    assert model.head.why_no_prefix_sharing is None
    assert alone.std() > 1e-2
    for tokens in (1, 60, 10_000):  # each alone, some together, all together
        torch.testing.assert_close(sequence_rewards(model, SHARING, tokens), alone, rtol=0, atol=1e-5)


def test_a_long_list_of_answers_is_cut_into_rows():
    model, _ = classifier_of()
    row = TokenizedRow("row", [5, 6, 7], tuple([8, 9, 10 + i % 90] for i in range(800)), (1.0,) * 800)
    widths = []
    model.register_forward_pre_hook(lambda _, given: widths.append(given[0]["input_ids"].shape[1]))
    rewards = sequence_rewards(model, [row], 4096)
    assert max(widths) <= 3 + 1024
    assert torch.allclose(rewards[:90], rewards[90:180], atol=1e-5)


def test_one_that_does_not_follow_a_mask_computes_each_answer_anew(monkeypatch):
    model, _ = classifier_of()
    expected = sequence_rewards(model, SHARING, 100)
    model.head.why_no_prefix_sharing = "for some reason"
    monkeypatch.setattr(model.head, "last_states", None)
    torch.testing.assert_close(sequence_rewards(model, SHARING, 100), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_pairs_with_one_prompt_teach_what_they_teach_apart(rank):
    model, tokenizer = classifier_of("gemma2")
    if rank:
        model = RewardNetwork(add_adapter(model.classifier, rank, 8.0, 0, "model"))
    else:
        model.classifier.requires_grad_(True)
    assert model.head.shared
    objective = BradleyTerryObjective(model.padding, 0.01)
    rows = [replace(row, weight=weight) for row, weight in zip(pairs(3), (1.0, 2.0, 0.5), strict=True)]
    encoded, gradients = tokenize_preferences(rows, tokenizer, 64), []
    for shared in (False, True):
        model.zero_grad()
        batch = objective.collate(encoded, shared)
        loss, metrics = objective.loss(model, batch, batch["count"])
        loss.backward()
        learned = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        gradients.append([loss.detach(), metrics["margin"], *learned])
    assert len(gradients[0]) > 4
    for apart, together in zip(*gradients, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_an_encoder_is_as_good_a_backbone(tmp_path):
    tokenizer = byte_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    DistilBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trained = train_reward_model(
        str(tmp_path / "model"), pairs(), tmp_path / "reward", test=pairs(20, 100), options=FAST
    )
    assert trained.report.accuracy > 0.9
    scorer = RewardModel.from_folder(trained.path)
    prompts, completions = answers()
    alone = [scorer.score([prompt], [text])[0] for prompt, text in zip(prompts, completions, strict=True)]
    assert scorer.score(prompts, completions) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("own", [None, "</s>"])
def test_a_tokenizer_without_its_own_padding_gets_a_token_that_is_not_the_end(own, tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = own
    random_model("gpt2", vocabulary=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trained = train_reward_model(str(tmp_path / "model"), pairs(4), tmp_path / "reward", options=FAST)
    model, loaded, _ = load_reward_model(trained.path)
    assert loaded.pad_token_id == model.padding == len(tokenizer)
    assert model.padding != loaded.eos_token_id
    assert loaded.padding_side == "right"
    table = model.classifier.get_input_embeddings().weight
    assert len(table) == len(tokenizer) + 1
    assert not table[-1].any()


def test_the_reward_is_read_at_the_end_of_the_answer():
    # The last token alone differs: what is read before it would be equal.
    model, _ = classifier_of()
    for prompt in ([5, 6, 7], [5, 6]):
        rows = [TokenizedRow("row", prompt, ([*[7] * (3 - len(prompt)), last],), (1.0,)) for last in (8, 9)]
        first, second = sequence_rewards(model, rows, 100).tolist()
        assert abs(first - second) > 1e-4


def test_an_answer_is_cut_on_its_own_and_keeps_its_beginning():
    tokenizer = load_tokenizer(str(saved_model()))
    both, cut = tokenize_answers(["p" * 30] * 2, ["a" * 5, "b" * 40], tokenizer, 32)
    alone, _ = tokenize_answers(["p" * 30], ["a" * 5], tokenizer, 32)
    assert tokens_of(both[0]) == tokens_of(alone[0])
    assert [len(tokens_of(row)) for row in both] == [32, 32]
    assert cut == 2
    text = tokenizer.decode(tokens_of(both[1]))
    assert text == "p" * 8 + "b" * 24


def test_a_scorer_says_how_many_answers_it_cuts():
    scorer = RewardModel.from_folder(reward_model().path)
    assert scorer.cut_note(["q1?", "q2?"], ["yes!", "no."]) == []
    (note,) = scorer.cut_note(["q1?", "q2?", "q? " * 80], ["yes!", "no. " * 80, "yes!"])
    assert note.startswith("2 of 3 answers are cut, with their prompts, to the 64 tokens that the reward model reads")


def test_a_cut_that_ends_in_padding_is_refused():
    tokenizer = load_tokenizer(str(saved_model()))
    with pytest.raises(InputError, match="answer 2: ends in the padding token '<pad>'"):
        tokenize_answers(["p"] * 2, ["fine", "aaaaaa<pad>tail"], tokenizer, 8)


# ---- the folder ----


def test_the_folder_says_what_it_is():
    trained = reward_model()
    facts = json.loads((trained.path / FACTS_FILE).read_text())
    assert facts["base_model"] == str(saved_model())
    assert facts["data"] == pairs().fingerprint
    assert facts["accuracy"] == trained.report.accuracy
    assert facts["settings"]["learning_rate"] == FAST.learning_rate
    assert facts["max_length"] == 64


def test_another_template_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="the chat template is not the one that this reward model was trained with"):
        RewardModel.from_folder(folder)


def test_a_folder_without_facts_and_damaged_facts_are_refused(folder):
    edit(folder / FACTS_FILE, mean="high")
    with pytest.raises(InputError, match=f"{FACTS_FILE}: field 'mean'"):
        load_reward_model(folder)
    (folder / FACTS_FILE).write_text("{")
    with pytest.raises(InputError, match="damaged JSON"):
        load_reward_model(folder)
    (folder / FACTS_FILE).unlink()
    with pytest.raises(InputError, match=f"not a reward model \\(it has no {FACTS_FILE}\\)"):
        load_reward_model(folder)


def test_rewards_that_are_not_finite_are_refused(folder):
    model, tokenizer, facts = load_reward_model(folder)
    with torch.no_grad():
        model.classifier.score.weight.fill_(float("nan"))
    with pytest.raises(EveralignError, match="NaN or infinite rewards"):
        RewardModel(model, tokenizer, facts).score(["p"], ["a"])


def test_the_fingerprint_knows_the_weights_and_the_mean(folder):
    model, tokenizer, facts = load_reward_model(folder)
    first = RewardModel(model, tokenizer, facts).fingerprint
    assert RewardModel.from_folder(folder).fingerprint == first
    moved = RewardModel(model, tokenizer, facts.model_copy(update={"mean": facts.mean + 1}))
    assert moved.fingerprint != first
    with torch.no_grad():
        model.classifier.score.weight[0, 0] += 0.1
    assert RewardModel(model, tokenizer, facts).fingerprint != first


# ---- the report ----


def test_the_report_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    report = reward_report(rewards, torch.tensor([[2, 1], [3, 3], [1, 2], [4, 2]]))
    assert report.accuracy == 2.5 / 4
    expected = torch.nn.functional.softplus(-torch.tensor([1.0, 0.0, -1.0, 2.0])).mean().item()
    assert report.log_loss == pytest.approx(expected)
    assert report.length_correlation == pytest.approx(1.0)
    assert report.temperature > 0
    assert 0 <= report.calibrated_error <= 1


def test_constant_lengths_have_no_correlation_and_separated_pairs_no_temperature():
    report = reward_report(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.ones(2, 2))
    assert report.length_correlation is None
    assert report.temperature is None
    assert report.calibrated_error is None
