"""`everalign bench`: contenders that learn nothing, methods in files, what answers are worth, lean scoring."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cli_for_tests import run, write_rows
from everalign.bench import execution
from everalign.bench.data import choose_asked, load_rows, prompt_with_system
from everalign.bench.recipe import Bench
from everalign.data.chat_tokens import ChatFormat
from everalign.evaluation.scorers import RewardModel
from everalign.methods import LifeAlign, SingleTask
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.training.reward_model import train_reward_model
from learner_for_tests import (
    ANSWERS,
    adapter_weights,
    held_out,
    make_learner,
    same_weights,
    save_answering_model,
    save_model,
    task_rows,
    tasks,
)
from rewards_for_tests import FAST, pairs, reward_model, saved_model

SWAPPED = f"{Path(__file__).parents[2] / 'bench' / 'controls.py'}:SwappedReplay"
CHAT = [
    {"prompt": [{"role": "user", "content": f"chat {i}"}], "output": f"well {i}", "model": "someone"} for i in range(3)
]
CHAT += [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello!"}]}]


def recipe(folder: Path, **changes) -> str:
    content = {
        "models": {"small": "model"},
        "tasks": {name: {"train": f"{name}.jsonl", "test": f"{name}.test.jsonl"} for name in ("warm", "brief")},
        "seeds": [0, 1],
        "training": {"batch_size": 4, "max_length": 64, "warmup": 0.0, "learning_rate": 0.02},
        "adapter": {"rank": 4, "targets": "q_proj,v_proj"},
        "baseline": "er",
        "forward_transfer": False,
        "contenders": {
            "er": {"method": "er", "objective": "dpo"},
            "stl": {"method": "stl", "objective": "dpo"},
            "swapped": {"method": {"name": SWAPPED, "replay": 0.5}, "objective": "dpo"},
            "plain": {"method": "none"},
            "told": {"method": "none", "system": {"warm": "Say yes."}},
        },
        "answers": {"prompts": 3, "max_new_tokens": 6, "reward_model": "reward"},
        "chat": {"rows": "chat.jsonl"},
        **changes,
    }
    path = folder / "bench.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    save_answering_model(folder / "model")
    for name in ANSWERS:
        write_rows(folder / f"{name}.jsonl", task_rows(name))
        write_rows(folder / f"{name}.test.jsonl", held_out(name))
    write_rows(folder / "chat.jsonl", CHAT)
    train_reward_model(str(saved_model()), pairs(8, start=500), folder / "reward", options=FAST.replace(epochs=1))
    return folder


@pytest.fixture
def work(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(execution, "START", "fork")
    return files


@pytest.fixture(scope="module")
def compared(files):
    """A comparison of all contenders, made once."""
    from everalign.cli import main

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(files)
        patched.setattr(execution, "START", "fork")
        assert main(["bench", recipe(files), "--output", "out"]) == 0
    (found,) = json.loads((files / "out" / "test.json").read_text())["models"]
    records = [json.loads(path.read_text()) for path in sorted((files / "out" / "records").iterdir())]
    folder = files / "out" / "answers"
    said = {
        (name, seed): json.loads(next(folder.glob(f"{name}.small.test.{seed}.*")).read_text())
        for name in found["contenders"]
        for seed in (0, 1)
    }
    return found, records, said


def per_token(folder, prompts, answers):
    """Log-likelihoods per token under the base model, one answer at a time."""
    model, tokenizer = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    found = []
    for ids, (answer,) in ChatFormat(tokenizer).encode(prompts, [(one,) for one in answers]):
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        found.append(logits[range(len(ids) - 1, len(ids) + len(answer) - 1), answer])
    return found


def test_an_instruction_is_scored_against_the_base_model_without_it(files, compared):
    found, records, _ = compared
    told = next(record for record in records if record["contender"] == "told")
    rows = held_out("warm")
    sums = {}
    for name, prompts in (
        ("with", [prompt_with_system(row.prompt, "Say yes.") for row in rows]),
        ("without", [row.prompt for row in rows]),
    ):
        for side in ("chosen", "rejected"):
            sums[name, side] = per_token(files, prompts, [getattr(row, side) for row in rows])
    told_pairs = zip(sums["with", "chosen"], sums["with", "rejected"], strict=True)
    accuracy = np.mean([bool(chosen.mean() > rejected.mean()) for chosen, rejected in told_pairs])
    gained = [
        (sums["with", "chosen"][i].sum() - sums["without", "chosen"][i].sum())
        > (sums["with", "rejected"][i].sum() - sums["without", "rejected"][i].sum())
        for i in range(len(rows))
    ]
    assert told["scores"]["accuracy"]["matrix"] == [
        [None, None],
        [accuracy, told["scores"]["accuracy"]["zero_shot"][1]],
    ]
    assert told["scores"]["reward_accuracy"]["matrix"][1] == [np.mean(gained), 0.5]
    chosen = float(torch.stack([one.mean() for one in sums["with", "chosen"]]).mean())
    assert told["scores"]["chosen_logprob"]["matrix"][1][0] == pytest.approx(chosen, abs=1e-4)
    contender = found["contenders"]["told"]
    assert contender["costs"]["processor_seconds"] == contender["costs"]["kept"] == 0
    assert contender["numbers"]["accuracy"]["backward_transfer"] == {}
    plain = found["contenders"]["plain"]["tasks"]
    assert plain["accuracy"] == found["zero_shot"]["accuracy"]
    assert plain["reward_accuracy"] == {"brief": 0.5, "warm": 0.5}


def test_wins_lengths_and_perplexity_are_those_of_the_answers(files, compared):
    found, _, said = compared
    scorer = RewardModel.from_folder(files / "reward")

    def rewards(file):
        return {
            task: scorer.score([one["prompt"] for one in ones], [one["text"] for one in ones])
            for task, ones in file["answers"].items()
        }

    for name, contender in found["contenders"].items():
        numbers, files_of = contender["answers"], [said[name, seed] for seed in (0, 1)]
        answers = [ones for file in files_of for ones in file["answers"].values()]
        assert [len(ones) for ones in answers] == [3, 3, 3, 3]
        assert numbers["length"]["mean"] == pytest.approx(
            np.mean([len(one["text"]) for ones in answers for one in ones])
        )
        unfinished = np.mean([not one["ended"] for ones in answers for one in ones])
        assert numbers["unfinished"]["mean"] == pytest.approx(unfinished)
        assert numbers["reward"]["mean"] == pytest.approx(
            np.mean([list(rewards(file).values()) for file in files_of]), abs=1e-5
        )
        if name == "er":
            assert "reward_win_rate" not in numbers
            continue
        outcomes = []
        for seed, file in enumerate(files_of):
            mine, its = rewards(file), rewards(said["er", seed])
            for task, ones in file["answers"].items():
                same = [a["text"] == b["text"] for a, b in zip(ones, said["er", seed]["answers"][task], strict=True)]
                outcomes += [
                    0.5 if equal else float(a > b) for equal, a, b in zip(same, mine[task], its[task], strict=True)
                ]
        win = numbers["reward_win_rate"]
        assert win["mean"] == pytest.approx(np.mean(outcomes))
        assert win["mean"] == pytest.approx(np.mean(list(win["tasks"].values())))
        assert win["low"] <= win["mean"] <= win["high"]
        assert 0 < numbers["reward_win_rate_lc"]["mean"] < 1
        assert {"p_value", "p_holm"} <= numbers["reward_win_rate_lc"].keys()
    answers = {name: one["answers"] for name, one in found["contenders"].items()}
    # What has no one policy, or an instruction for a task, has no perplexity of chat; one with an instruction no KL.
    assert [name for name in answers if "perplexity" not in answers[name]] == ["stl", "told"]
    assert "kl" not in answers["told"]
    assert answers["plain"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert answers["er"]["kl"]["mean"] > 0
    assert answers["plain"]["length"]["difference"]["value"] == pytest.approx(
        answers["plain"]["length"]["mean"] - answers["er"]["length"]["mean"]
    )
    prompts = [row["prompt"] if "prompt" in row else row["messages"][:1] for row in CHAT]
    found = torch.cat(per_token(files, prompts, [row.get("output", "hello!") for row in CHAT]))
    assert answers["plain"]["perplexity"]["mean"] == pytest.approx(float((-found.mean()).exp()), rel=1e-3)


def test_finished_runs_stay_and_the_report_shows_the_answers(capsys, work, compared, monkeypatch):
    stamps = {path: path.stat().st_mtime_ns for path in (work / "out" / "records").iterdir()}
    assert {path.name for path in stamps} == {path.name for path in (work / "out" / "answers").iterdir()}
    monkeypatch.setattr(RewardModel, "score", lambda *_: pytest.fail("scored twice"))
    monkeypatch.setattr(RewardModel, "cut_note", lambda _, prompts, texts: [f"4 of {len(texts)} answers are cut"])
    code, printed, err = run(capsys, "bench", recipe(work), "--output", "out")
    assert code == 0, err
    # Five contenders, two seeds, two tasks, three prompts.
    assert "note: 4 of 60 answers are cut" in printed
    assert "4 of 60 answers are cut" in (work / "out" / "test.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert all(title in printed for title in ("Answers on small", "wins % at equal length", "KL to base", "perplexity"))
    page = (work / "out" / "test.html").read_text()
    assert all(text in page for text in ("Share of prompts won, by task.", "Wins by task on small"))

    # The method's file is locked with the recipe, and named by the run.
    records = [path.name for path in stamps]
    name = next(name for name in records if name.startswith("swapped"))
    (work / "mine.py").write_text(Path(SWAPPED.rpartition(":")[0]).read_text() + "\n# edited\n")
    digests = set()
    for text in ("", "x = 1\n"):
        with (work / "mine.py").open("a") as file:
            file.write(text)
        changed = recipe(work, contenders={"swapped": {"method": "mine.py:SwappedReplay"}}, baseline=None)
        digests.add(Bench.read(Path(changed)).digest)
    assert len(digests) == 2
    assert name in records


def test_lean_scoring_changes_no_score_that_is_kept(tmp_path):
    model = save_model(tmp_path / "model")
    for method in (LifeAlign, SingleTask):
        runs = []
        for name, lean in (("full", {}), ("lean", {"forward_transfer": False, "drift": False})):
            learner = make_learner(model, tmp_path / f"{method.name}-{name}", method(), **lean)
            learner.learn_all(tasks())
            runs.append(learner.run)
        full, lean = runs
        assert same_weights(*(adapter_weights(one.path) for one in runs))
        for metric in ("accuracy", "reward_accuracy", "margin"):
            rows = [one.scores(metric).matrix for one in runs]
            for i, (before, after) in enumerate(zip(*rows, strict=True)):
                assert list(before)[: i + 1] == list(after)[: i + 1]
        assert full.scores().summary | {"forward_transfer": None} == lean.scores().summary
        last = lean.versions[1]
        assert list(last.scores) == (["warm", "brief"] if method is LifeAlign else ["brief"])
        assert last.before is None
        assert last.scores["brief"].kl_previous is None
        assert full.versions[1].scores["brief"].kl_previous is not None


ER = {"method": "er", "objective": "dpo"}
REFUSED = [
    ({"told": {"method": "er", "system": "Be kind."}}, "bench.yaml:", "contenders.told.system: is the instruction of"),
    ({"told": {"method": "none", "objective": "dpo"}}, "bench.yaml:", "told.objective: the method none learns nothing"),
    ({"told": {"method": {"name": "none", "replay": 0.1}}}, "bench.yaml:", "contenders.told.method: the method none"),
    ({"told": {"method": "none", "tune": {"replay": [0.1]}}}, "bench.yaml:", "contenders.told.tune: the method none"),
    ({"told": {"method": "none", "system": {"worm": "x"}}}, "bench.yaml:", "unknown task 'worm': did you mean 'warm'?"),
    ({"told": {"method": "none", "tune": {"system": [1, 2]}}}, "bench.yaml:", "must be a text, or a mapping from"),
    (
        {"mine": {"method": "mine_is_gone.py:Mine"}},
        "bench.yaml:",
        "contenders.mine: mine_is_gone.py:Mine: mine_is_gone",
    ),
]


@pytest.mark.parametrize(("contenders", "place", "message"), REFUSED)
def test_bad_contenders_are_refused_with_their_line(capsys, work, tmp_path, contenders, place, message):
    path = recipe(work, contenders={"er": ER, **contenders}, answers=None, chat=None)
    code, _, err = run(capsys, "bench", path, "--output", str(tmp_path / "out"))
    assert (code, place in err, message in err) == (2, True, True), err
    assert not (tmp_path / "out" / "records").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {"prompts": 0}}, "answers.prompts must be"),
        ({"answers": {"reward_model": "nowhere"}}, "answers.reward_model: nowhere: no such folder"),
        ({"answers": {"reward_model": "model"}}, "answers.reward_model: model: not a reward model"),
        ({"answers": {"reward_model": "$GONE_REWARD"}}, "answers.reward_model: $GONE_REWARD: the environment variable"),
        ({"answers": {"reward_model": "SEEN"}}, "was trained on 1 prompts that are judged in warm"),
        ({"answers": {"max_new_tokens": 127}}, "leaves room for 1 of a prompt on small, and every prompt of warm is"),
        ({"chat": {"rows": "gone.jsonl"}}, "chat.rows: gone.jsonl: no such file"),
        ({"chat": {"rows": "warm.jsonl"}}, "chat.rows: warm.jsonl: 9 prompts are trained on in warm"),
        ({"chat": {"rows": "bad.jsonl"}}, "bad.jsonl:1: field 'completions': no such column"),
        ({"chat": {"rows": "chat.jsonl", "limits": 1}}, "chat.limits is not an option of"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_line(capsys, work, tmp_path, changes, message):
    (work / "bad.jsonl").write_text('{"prompt": "q?"}\n')
    if changes.get("answers") == {"reward_model": "SEEN"}:
        changes = {"answers": {"reward_model": str(reward_model().path)}}
    path = recipe(work, contenders={"er": {**ER, "tune": {"learning_rate": [0.01, 0.02]}}}, **changes)
    code, _, err = run(capsys, "bench", path, "--output", str(tmp_path / "out"), "--tune")
    assert (code, message in err) == (2, True), err
    assert "bench.yaml:" in err or "bad.jsonl:1" in err
    assert not (tmp_path / "out" / "records").exists()


@pytest.mark.parametrize(("max_length", "method", "longest"), [(64, "er", None), (512, "er", 128), (512, "l2p", 103)])
def test_chat_rows_are_cut_to_what_all_contenders_can_read(work, max_length, method, longest):
    write_rows(work / "long.jsonl", [{"prompt": "hi", "output": "well " * 200}, *CHAT])
    contenders = {"er": ER, "other": {"method": method, "objective": "dpo"}}
    path = recipe(work, contenders=contenders, chat={"rows": "long.jsonl"}, training={"max_length": max_length})
    bench = Bench.read(Path(path))
    asked = choose_asked(bench, load_rows(bench, "test"))["small"]
    assert (asked.max_chat_tokens, asked.chat_cut, len(asked.chat)) == (longest, 1, 5)


def test_an_instruction_is_tuned_without_counting_as_a_trial_of_a_method(capsys, work, tmp_path):
    contenders = {
        "er": ER,
        "told": {"method": "none", "tune": {"system": ["Be brief.", {"warm": "Say yes.", "brief": "Say ok."}]}},
    }
    path = recipe(work, contenders=contenders, answers=None, chat=None)
    code, printed, err = run(capsys, "bench", path, "--output", str(tmp_path / "out"), "--tune", "--only", "told")
    assert code == 0, err
    chosen = json.loads((tmp_path / "out" / "chosen.json").read_text())
    assert chosen["chosen"]["small"]["told"]["system"] in contenders["told"]["tune"]["system"]
    assert len(chosen["trials"]["small"]["told"]) == 2
    assert "Be brief." in printed
