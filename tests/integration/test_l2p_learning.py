"""L2P in a run: prompts in scores and answers, the reference without them, what cannot hold them, what it refuses."""

import json

import pytest
import torch

from everalign import AdapterOptions, Learner, TrainingOptions
from everalign.bench.recipe import Bench
from everalign.data import ScoredSet
from everalign.data.chat_tokens import encode_prompt
from everalign.errors import InputError
from everalign.learning.answer_evaluation import AnswerSettings, evaluate_run
from everalign.learning.recipe import Recipe, completed
from everalign.methods import make_method
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.sampling import greedy_continuations
from learner_for_tests import FAST, adapter_weights, held_out, make_learner, same_weights, save_answering_model, tasks

SMALL = {"pool_size": 4, "prompt_length": 2, "top_prompts": 2, "prompt_rate": 5.0}


def l2p(**changes):
    return make_method("l2p", **{**SMALL, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learner(model, tmp_path_factory):
    """Has learned two tasks."""
    found = make_learner(model, tmp_path_factory.mktemp("l2p") / "run", l2p(), sample_answers=2)
    found.learn_all(tasks("warm", "brief"))
    return found


def test_the_reference_is_the_model_without_prompts_and_the_rate_is_the_prompts(learner):
    stages = [version.manifest.stages[0] for version in learner.run.versions]
    assert [stage.reference for stage in stages] == ["base", "base"]
    assert all(stage.step0_margin != 0 for stage in stages)
    facts = json.loads((learner.run.path / "run.json").read_text())
    assert facts["settings"]["reference"] == "base"
    assert not set(AdapterOptions.model_fields) & set(facts["settings"])
    curve = (learner.run.path / "versions" / "001-warm" / "training.jsonl").read_text().splitlines()
    assert json.loads(curve[0])["learning_rate"] == pytest.approx(5 * FAST["learning_rate"])


def test_scores_are_those_of_the_policy_with_prompts_and_of_the_base_model_without(learner, model):
    """Compared with the plain model, which is given the prompts' vectors in place of tokens."""
    plain, tokenizer, pool = load_model(str(model)), load_tokenizer(str(model)), learner.policy.prompts
    embeddings, margins = plain.get_input_embeddings(), {"now": [], "zero": []}
    for row in held_out("brief"):
        found = {"now": [], "zero": []}
        for answer in (row.chosen, row.rejected):
            prompt = encode_prompt(tokenizer, row.prompt)
            tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                query = plain.model(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0)
                best = torch.cosine_similarity(query[None], pool.keys).argsort(descending=True)[:2]
                read = embeddings(torch.tensor(prompt + tokens))
                for name, front in (("now", pool.vectors[best].flatten(0, 1)), ("zero", read[:0])):
                    logits = plain(inputs_embeds=torch.cat([front, read])[None]).logits[0, -len(tokens) - 1 : -1]
                    log_probs = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
                    found[name].append(log_probs.mean().item())
        for name, (chosen, rejected) in found.items():
            margins[name].append(chosen - rejected)
    run = learner.run
    assert run.versions[-1].scores["brief"].margin == pytest.approx(sum(margins["now"]) / 5, abs=1e-4)
    assert run.zero_shot["brief"].margin == pytest.approx(sum(margins["zero"]) / 5, abs=1e-4)
    assert all(score.kl_previous > 0 for score in run.versions[-1].scores.values())


def test_sample_answers_are_written_with_prompts(learner, model):
    tokenizer = learner.tokenizer
    for task, answers in learner.run.versions[-1].answers.items():
        prompts = [encode_prompt(tokenizer, answer.prompt) for answer in answers]
        written = greedy_continuations(learner.policy, prompts, [tokenizer.eos_token_id], 160)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        assert texts == [answer.answer for answer in answers]
        assert texts != [answer.answer for answer in learner.run.first_answers[task]]


def test_a_version_is_restored_and_gone_back_to(learner, model, tmp_path):
    again = make_learner(model, learner.run.path, l2p(), resume=True, sample_answers=2)
    for name in ("vectors", "keys"):
        assert torch.equal(getattr(again.policy.prompts, name), getattr(learner.policy.prompts, name))
    again.rollback("001")
    assert same_weights(dict(again.policy.prompts.state_dict()), adapter_weights(learner.run.path, 0))
    again.rollback("000")
    assert again.policy.prefix_length == 0
    fresh = make_learner(model, tmp_path / "fresh", l2p())
    assert same_weights(dict(again.policy.prompts.state_dict()), dict(fresh.policy.prompts.state_dict()))
    again.rollback("002")
    assert same_weights(dict(again.policy.prompts.state_dict()), adapter_weights(learner.run.path, 1))
    assert again.policy.prefix_length == 4


def test_no_adapter_and_no_model_is_exported(learner, model, tmp_path):
    for export in (learner.export, learner.export_adapter):
        with pytest.raises(InputError, match="no adapter and no merged model can hold them"):
            export(tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    adapter = learner.run.path / "versions" / "001-warm" / "adapter"
    with pytest.raises(InputError, match="no adapter and no merged model can hold them"):
        make_learner(model, tmp_path / "run", base_adapter=adapter)


def test_evaluation_writes_answers_with_prompts(learner):
    settings = AnswerSettings(max_new_tokens=6, limit=2, standard=False, compat=True, every=True)
    found = evaluate_run(learner.run, settings=settings)
    texts = {version: [] for version in ("000", "001-warm", "002-brief")}
    for shown in found["answers"].values():
        for one in shown:
            for version, answer in one["answers"].items():
                texts[version].append(answer["text"])
    assert len({tuple(found) for found in texts.values()}) == 3
    prompts = [encode_prompt(learner.tokenizer, one["prompt"]) for one in found["answers"]["warm"]]

    def written():
        tokens = greedy_continuations(learner.policy, prompts, [learner.tokenizer.eos_token_id], 6)
        return [learner.tokenizer.decode(one, skip_special_tokens=True) for one in tokens]

    assert texts["002-brief"][:2] == written()
    with learner.policy.as_base():
        assert texts["000"][:2] == written()


def test_a_run_that_python_code_began_is_continued_from_the_command_line(learner):
    recipe = completed(Recipe.from_flags({"output": str(learner.run.path)}))
    arguments = recipe.learner_arguments(needs_tasks=False)
    assert (arguments["adapter"], arguments["training"].reference) == (None, "base")
    assert arguments["method"].settings() == learner.method.settings()


def test_a_supervised_stage_and_scored_rows_are_learned_too(model, tmp_path):
    learner = make_learner(model, tmp_path / "sft", l2p(), options={"sft_epochs": 1.0})
    learner.learn(tasks("warm")[0][1], "warm")
    assert [stage.stage for stage in learner.run.versions[0].manifest.stages] == ["sft", "dpo"]
    scored = ScoredSet.of([{"prompt": f"q{i}", "completions": ["a", "bb"], "rewards": [0.0, 1.0]} for i in range(8)])
    learner = make_learner(model, tmp_path / "var", l2p(strength=0.0), "var")
    keys = learner.policy.prompts.keys.detach().clone()
    learner.learn(scored, "scored")
    # Keys learn by the pull alone.
    assert torch.equal(learner.policy.prompts.keys, keys)


def test_rows_are_cut_so_that_prompts_fit_in_front(model, tmp_path):
    lines = []
    learner = make_learner(model, tmp_path / "run", l2p(), lines=lines, options={"max_length": 4096})
    assert learner._setup.options.max_length == 4096  # rotary positions: the model reads on
    assert any("with 4 in front of every prompt, while" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": TrainingOptions(reference="stage_start")}, "the reference of l2p is the base model"),
        ({"training": TrainingOptions(reference="previous_task")}, "the reference of l2p is the base model"),
        ({"adapter": AdapterOptions()}, "l2p learns prompts and no adapter, and would ignore rank"),
        ({"objective": "correction"}, "cannot hold the prompts that l2p learns"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused_before_the_model_is_loaded(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        Learner("no-such-model", l2p(), output=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


# ---- recipes and benches ----

FLAGS = {"model": "tiny", "output": "runs/a", "method": "l2p", "tasks": [{"name": "a", "train": "a.jsonl"}]}


def test_a_recipe_makes_it_without_an_adapter_whatever_the_preset():
    arguments = Recipe.from_flags({**FLAGS, "preset": "paper", "top_prompts": 3}).learner_arguments()
    assert arguments["adapter"] is None
    assert arguments["method"].settings()["top_prompts"] == 3
    printed = Recipe.from_flags({**FLAGS, "prompt_rate": 100.0}).complete()
    assert "adapter" not in printed
    assert printed["training"]["reference"] == "base"
    again = Recipe.model_validate(printed)
    assert again.complete() == printed
    assert again.learner_arguments()["method"].rate_factor == 100.0


@pytest.mark.parametrize(("flag", "value"), [("rank", 4), ("targets", "q_proj"), ("reference", "stage_start")])
def test_flags_that_it_would_ignore_are_refused(flag, value):
    with pytest.raises(InputError, match="l2p"):
        Recipe.from_flags({**FLAGS, flag: value}).learner_arguments()


def test_in_a_bench_what_the_others_share_is_left_out():
    bench = Bench.model_validate(
        {
            "models": {"tiny": "tiny"},
            "tasks": {"a": {"train": "a.jsonl", "test": "b.jsonl"}},
            "seeds": [0],
            "training": {"reference": "stage_start", "learning_rate": 1e-3},
            "adapter": {"rank": 4},
            "contenders": {"er": {"method": "er"}, "l2p": {"method": "l2p"}},
        }
    )
    bench.check_contenders()
    assert bench.learn_recipe("er", {}, "tiny", 0).adapter.rank == 4
    recipe = bench.learn_recipe("l2p", {}, "tiny", 0)
    assert recipe.complete()["training"]["learning_rate"] == 1e-3
    assert recipe.complete()["training"]["reference"] == "base"
