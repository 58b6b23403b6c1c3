"""What each of several processes runs: the stages of `STAGES`; writes its weights and gradients to OUTPUT.RANK."""

import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from models_for_tests import perturb, random_policy, random_rows
from stages_for_tests import train, weights

# Whole steps; a last step of one row, fewer than processes; rows that do not go round; a penalty in every step.
STAGES = {
    "dpo": {"rows": 16, "tokens_per_batch": 120},
    "sft": {"rows": 17, "tokens_per_batch": 180},
    "var": {"rows": 11, "tokens_per_batch": 90},
    "snkl": {"rows": 7, "tokens_per_batch": 90, "batch_size": 3},
    "fpo": {"rows": 9, "tokens_per_batch": 60, "batch_size": 3, "penalty": True},
}


def square(policy):
    return 0.1 * sum(p.square().sum() for p in policy.parameters() if p.requires_grad)


def run_stages(folder: Path):
    """By stage: final weights, every step's gradients, every step's loss."""
    results = {}
    for name, settings in STAGES.items():
        gradients = []
        policy = perturb(random_policy())
        options = {key: value for key, value in settings.items() if key not in ("rows", "penalty")}
        hooks = {
            "gradient_hook": lambda policy, seen=gradients: seen.append(
                torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
            ),
            "penalty": square if settings.get("penalty") else None,
        }
        pairs = random_rows(name, settings["rows"], longest=30)
        result = train(policy, name, pairs, folder / name, hooks=hooks, checkpoint_steps=2, **options)
        results[name] = (weights(policy), gradients, [entry["loss"] for entry in result.curve])
    return results


def main(output: Path, environment: dict[str, str]) -> None:
    """What one of the processes does."""
    os.environ.update(environment)
    # The process that this one is forked from may have trained, alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    torch.save(run_stages(output / "checkpoints"), output / f"result.{environment['RANK']}")
    torch.distributed.destroy_process_group()
