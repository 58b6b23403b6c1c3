"""Writes the files beside it: what a user of version 0.1.0 has on disk.

    git worktree add old 6aa5258 && cd tests/kept && PYTHONPATH=../../old/src python make.py

Tests read what is committed here and never write it anew: later code has to go on with these very bytes.
"""

import json
import os
import random
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from everalign.chat_client import Completion
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from everalign.cli import main
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector
from everalign.evaluation.judge import JudgeScorer, reward_cache
from everalign.evaluation.scorers import RewardModel
from everalign.learning.run_data import load_run
from everalign.serving.store import Exchange, Feedback, FeedbackStore
from everalign.storage import Journal

HERE = Path(__file__).resolve().parent
TASKS = {"warm": ("yes, gladly!", "no."), "brief": ("ok", "well, let me see")}
STEPS = "--learning-rate 2e-2 --batch-size 4 --max-length 64 --checkpoint-steps 1 --epochs 2"
LEARN = f"{STEPS} --rank 2 --targets q_proj,v_proj --sample-answers 0"
TWO_TASKS = " ".join(f"--task {name}=data/{name}.jsonl,data/{name}.test.jsonl" for name in TASKS)
LIFELONG = f"learn --model model {TWO_TASKS} {LEARN} --sft-epochs 1 --method lifealign --objective fpo --no-report"


def run(command):
    """Run a command of the command line in this process."""
    assert main(command.split()) == 0, command


def killed(command, patch):
    """Run a command in a process that `patch` ends in the middle."""
    child = os.fork()
    if not child:
        patch()
        main(command.split())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, command


def write(name, rows):
    Path("data").mkdir(exist_ok=True)
    Path("data", name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model():
    """Two layers with random weights, and a tokenizer of one token a byte."""
    special = ["<s>", "</s>", "<pad>"]
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    tokenizer.save_pretrained("model")


def make_data():
    for name, (good, bad) in TASKS.items():
        for file, numbers in ((f"{name}.jsonl", range(12)), (f"{name}.test.jsonl", range(100, 106))):
            write(file, [{"prompt": f"q{i}?", "chosen": f"{good} {i}", "rejected": bad} for i in numbers])
    chance = random.Random(0)
    scored = [
        {
            "prompt": f"q{i}?",
            "completions": ["yes", "no", "maybe"],
            "rewards": [round(chance.random(), 3) for _ in range(3)],
        }
        for i in range(16)
    ]
    write("scored.jsonl", scored[:12])
    write("scored.test.jsonl", scored[12:])
    write("answers.jsonl", [{key: value for key, value in row.items() if key != "rewards"} for row in scored[:6]])
    for file, numbers in (("corrections.jsonl", range(24)), ("corrections.test.jsonl", range(100, 108))):
        rows = [(f"q{i}?", f"no {i}" if i % 2 else f"yes {i}", f"yes {i}") for i in numbers]
        write(file, [dict(zip(("question", "answer", "correction"), row, strict=True)) for row in rows])


def kill_in_task_two():
    """Leave without a word once the second checkpoint of the second task's fpo stage is complete."""
    replace, seen = os.replace, []

    def crashing(source, target, **arguments):
        replace(source, target, **arguments)
        seen.extend([target] if str(target).endswith("checkpoint-2/complete.json") else [])
        if len(seen) == 4:
            os._exit(9)

    os.replace = crashing


def kill_after_one_batch():
    put = Journal.put

    def crashing(self, values):
        put(self, values)
        os._exit(9)

    Journal.put = crashing


def make_store():
    """Twenty corrected answers, most of them judged: the first sixteen are learned as a task, the rest waits."""
    now = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
    with FeedbackStore.open("sqlite:///feedback.db") as store:
        for i in range(20):
            if i == 16:
                learn = f"learn --from-feedback sqlite:///feedback.db --model model --objective dpo --no-report {LEARN}"
                run(f"{learn} --output learned --method er --minimum 6 --key-share 1 --gate 0.9 --held-out 0.25")
            messages = ({"role": "user", "content": f"q{i}?"},)
            key, created = f"{i % 2:012d}", now + timedelta(minutes=i)
            said = {"rating": None, "preferred": None, "edited_text": f"yes, {i}"}
            if i % 4 == 3:
                said = {"rating": 1, "preferred": None, "edited_text": None}
            store.add_exchange(
                Exchange(
                    id=f"chatcmpl-{i}", created=created, key_id=key, upstream="default", model="small",
                    messages=messages,
                    original=f"no {i}", returned=f"yes {i}", outcome="applied", reason=None, mode="correct",
                    corrector="000", template="everalign-1", usage={"total_tokens": 12},
                )
            )  # fmt: skip
            if i != 19:
                store.add_feedback(
                    Feedback(
                        exchange=f"chatcmpl-{i}",
                        key_id=key,
                        user=None,
                        tags=("kept",),
                        comment=None,
                        created=created,
                        **said,
                    )
                )


class Judge:
    """Answers without a server."""

    base_url, model = "http://127.0.0.1:9/v1", "judge"

    def complete_many(self, conversations, **_):
        for index, _ in enumerate(conversations):
            yield index, Completion(f'{{"score": {1 + index % 9}}}', 7, 2, "stop")


def make_expected():
    """What the old code makes of these files."""
    corrector, rewards = Corrector.from_pretrained("corrector"), RewardModel.from_folder("reward")
    runs = {name: load_run(Path(name)) for name in ("run", "rated", "correcting", "learned")}
    free = CorrectionOptions(guards=NO_GUARDS, max_new_tokens=12)
    expected = {
        "corrections": [corrector.correct(f"q{i}?", f"no {i}", free).text for i in range(4)],
        "rewards": rewards.score(["q1?", "q2?"], ["yes", "no"]),
        "scores": {name: run.scores("accuracy").matrix for name, run in runs.items() if name != "correcting"},
        "versions": {name: [version.id for version in run.versions] for name, run in runs.items()},
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def make_all():
    make_model()
    make_data()
    run(f"{LIFELONG} --output run")
    killed(f"{LIFELONG} --output killed", kill_in_task_two)
    scored = "--task rated=data/scored.jsonl,data/scored.test.jsonl"
    run(f"learn --model model {scored} {LEARN} --method er --objective var --output rated --no-report")
    corrections = "--data data/corrections.jsonl --test data/corrections.test.jsonl"
    run(f"correct train --model model {corrections} --output corrector --learning-rate 3e-3 --batch-size 8 --epochs 2")
    edited = "--task edited=data/corrections.jsonl,data/corrections.test.jsonl"
    lifelong = f"--model corrector {edited} {LEARN} --max-length 256 --method er --objective correction"
    run(f"learn {lifelong} --output correcting --no-report")
    pairs = "--data data/warm.jsonl --test data/warm.test.jsonl"
    run(f"reward train --model model {pairs} --output reward --learning-rate 2e-3 --batch-size 4 --max-length 64")
    killed(
        "reward score --model reward --data data/answers.jsonl --output scored.jsonl --batch-size 6",
        kill_after_one_batch,
    )
    rows = [json.loads(line) for line in Path("data/answers.jsonl").read_text().splitlines()]
    pairs = [(row["prompt"], text) for row in rows for text in row["completions"]]
    JudgeScorer(Judge(), cache=reward_cache(Path("judge"))).score(*zip(*pairs, strict=True))
    make_store()
    make_expected()


if __name__ == "__main__":
    os.chdir(HERE)
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("make.py", "README.md"):
            path.unlink()
    make_all()
    for lock in HERE.rglob("*.lock"):
        lock.unlink()
    # Nothing of the machine that wrote them.
    for recipe in HERE.rglob("recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(f"{HERE}/", ""))
    for facts in HERE.rglob("run.json"):
        machine = {"cpu": "", "cores": 2, "platform": "Linux", "threads": 1}
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"machine": machine}, indent=2))
