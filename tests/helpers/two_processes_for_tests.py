"""What one process, or each of two, does: stages, a run with every method, a reward model and a corrector."""

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from corrections_for_tests import FAST as CORRECTING
from corrections_for_tests import corrections
from everalign import RolloutOptions, distributed
from everalign.correction import train_corrector
from everalign.data import Scored, ScoredSet
from everalign.errors import EveralignError, GateRefusedError, InputError
from everalign.methods import make_method
from everalign.training.reward_model import train_reward_model
from learner_for_tests import held_out, make_learner, save_answering_model, save_model, task_rows
from models_for_tests import perturb, random_policy, random_rows, saved_model
from rewards_for_tests import FAST as REWARDING
from rewards_for_tests import pairs
from stages_for_tests import train, weights

# Whole steps; a last step of one row, fewer than processes; rows that do not go round; a penalty in every step.
STAGES = {
    "dpo": {"rows": 16, "tokens_per_batch": 120},
    "sft": {"rows": 17, "tokens_per_batch": 180},
    "var": {"rows": 11, "tokens_per_batch": 90},
    "snkl": {"rows": 7, "tokens_per_batch": 90, "batch_size": 3},
    "fpo": {"rows": 9, "tokens_per_batch": 60, "batch_size": 3, "penalty": True},
}
# By method: the objective that it learns, and settings under which there is something of every part of it. All
# methods, and all objectives.
RUNS = {
    "lifealign": (
        "fpo",
        {"space": "product", "replay": 0.5, "anchors": 0.1, "average": 0.8, "step": "fitted", "review": 0.25},
    ),
    "er": ("snkl", {"replay": 0.5, "anchors": 0.1}),
    "gem": ("hypo", {"replay": 0.5, "refresh": 2}),
    "ogpsa": ("hypo-ln", {"replay": 0.5, "refresh": 2}),
    "copr": ("dpo", {"replay": 0.5}),
    "gdumb": ("sft", {"replay": 0.5}),
    "ewc": ("focalpo", {"fisher_rows": 3}),
    "olora": ("dpo+hypo-ln", {"shrinkage": 0.01}),
    "l2p": ("fpo-normalised", {"pool_size": 4, "prompt_length": 2, "top_prompts": 2, "prompt_rate": 5.0}),
    "lifealign-rf": ("dpo", {"own_answers": 1.0, "average": 0.8}),
    "cppo": ("dpo", {}),
    "slao": ("var", {}),
    "experts": ("dpo", {}),
    "stl": ("sft", {}),
    "seqft": ("correction", {}),
    "mtl": ("dpo", {}),
}
# A last step of one row, and small batches, so that there are several for two processes.
OPTIONS = {"learning_rate": 1e-3, "batch_size": 2, "tokens_per_batch": 60, "logging_steps": 1}


def square(policy):
    return 0.1 * sum(p.square().sum() for p in policy.parameters() if p.requires_grad)


def run_stages(folder: Path, stages=STAGES, prepare=lambda policy: None):
    """By stage: final weights, every step's gradients, every step's loss and metrics."""
    results = {}
    for name, settings in stages.items():
        gradients = []
        policy = perturb(random_policy())
        prepare(policy)
        options = {key: value for key, value in settings.items() if key not in ("rows", "penalty")}
        hooks = {
            "gradient_hook": lambda policy, seen=gradients: seen.append(
                torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
            ),
            "penalty": square if settings.get("penalty") else None,
        }
        rows = random_rows(name, settings["rows"], longest=30)
        result = train(policy, name, rows, folder / name, hooks=hooks, checkpoint_steps=2, **options)
        unlike = ("epoch", "step", "learning_rate", "grad_norm")
        curve = [{key: value for key, value in entry.items() if key not in unlike} for entry in result.curve]
        results[name] = (weights(policy), gradients, curve)
    return results


# ---- whole runs ----


def save_models(folder: Path) -> None:
    """The models that the runs start from."""
    save_model(folder / "model")
    save_answering_model(folder / "answering")
    shutil.copytree(saved_model(), folder / "long")  # reads the long prompts of a corrector
    train_reward_model(str(folder / "model"), pairs(8), folder / "reward", options=REWARDING.replace(epochs=1))


def rows_of(name: str, objective: str, count: int, start: int = 0):
    if objective == "correction":
        return corrections(count, start, f"{name} {start}")
    rows = task_rows(name, count, start)
    return ScoredSet(tuple(map(Scored.from_preference, rows)), rows.source) if objective == "var" else rows


def run_method(models: Path, output: Path, name: str) -> None:
    """Two tasks of five rows by a method; of LifeAlign as many as it needs to fit a step on.

    The corrector's gate refuses its first task.
    """
    objective, arguments = RUNS[name]
    options, count = dict(OPTIONS), 41 if name == "lifealign" else 5
    if name in ("lifealign", "seqft"):
        options |= {"batch_size": 8, "tokens_per_batch": 1200 if name == "seqft" else 240}
    if objective == "correction":
        options, count = options | {"max_length": 200, "learning_rate": 1e-2}, 11
    learner = make_learner(
        models / {"lifealign-rf": "answering", "seqft": "long"}.get(name, "model"),
        output,
        make_method(name, **arguments),
        objective,
        options=options,
        gate=1.0 if name in ("seqft", "er") else None,
    )
    test = held_out if objective != "correction" else lambda name, count: corrections(count, 100, name)
    with suppress(GateRefusedError):
        learner.learn_all([(task, rows_of(task, objective, count), test(task, 5)) for task in ("warm", "brief")])


def run_prompts(models: Path, output: Path) -> None:
    """A task of prompts alone: the policy answers, a reward model scores."""
    learner = make_learner(
        models / "answering",
        output,
        make_method("er"),
        "var",
        options={**OPTIONS, "max_length": 48, "batch_size": 4},
        reward=str(models / "reward"),
        rollouts=RolloutOptions(samples=3, max_new_tokens=24),
    )
    learner.learn(ScoredSet.of([{"prompt": f"q{i}?"} for i in range(7)], "prompts.jsonl"), "prompts")


def run_all(models: Path, folder: Path) -> None:
    """All of it, each in a folder of its own."""
    for name in RUNS:
        run_method(models, folder / name, name)
    train_reward_model(
        str(models / "model"), pairs(9), folder / "reward", test=pairs(5, 100), options=REWARDING.replace(epochs=1)
    )
    run_prompts(models, folder / "prompts")
    train_corrector(
        str(models / "long"),
        corrections(11),
        folder / "corrector",
        test=corrections(5, 100),
        options=CORRECTING.replace(epochs=1, lora_rank=4),
    )


# ---- the processes ----


def exchange():
    """What the processes tell each other, by the helpers alone: each value should be the same in both."""

    def fails(own):
        if 1 in own:
            raise InputError("row 1 is bad", field="row")
        return own

    @distributed.on_main
    def main_fails():
        raise EveralignError("the disk is full")

    seen = {
        "shared": [distributed.share(lambda own: [2 * x for x in own], list(range(n))) for n in (0, 1, 2, 5)],
        "sum": distributed.add_up(lambda own: [torch.tensor([float(sum(own))]), torch.ones(2, 2)], [1, 2, 3])[0].item(),
        "gathered": distributed.gather(distributed.rank()),
        "from_main": distributed.on_main(lambda: (distributed.rank(), distributed.world()))(),
        "nested": distributed.share(lambda own: distributed.share(lambda some: list(some), own), [1, 2, 3]),
    }
    for name, call in {"error": lambda: distributed.share(fails, [0, 1, 2]), "main": main_fails}.items():
        try:
            call()
        except EveralignError as error:
            seen[name] = (type(error).__name__, str(error))
    return seen


def join(environment: dict[str, str]) -> None:
    """Become one of several processes."""
    os.environ.update(environment)
    # The process that this one is forked from may have trained, alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    distributed.start()


def main(models: Path, output: Path, environment: dict[str, str]) -> None:
    """What one of the processes does."""
    join(environment)
    result = {"exchange": exchange(), "stages": run_stages(output / "checkpoints")}
    run_all(models, output)
    torch.save(result, output / f"result.{environment['RANK']}")
    torch.distributed.destroy_process_group()


def environments(timeout: float = 120.0) -> list[dict[str, str]]:
    """What a launcher tells each of two processes that talk over gloo."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        distributed.TIMEOUT: f"{timeout}",
    }
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def run_both(processes, main, models, output: Path) -> None:
    """Run `main(models, output, environment)` in two processes, both of which must end well."""
    workers = [processes.Process(target=main, args=(models, output, one), daemon=True) for one in environments()]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0]
