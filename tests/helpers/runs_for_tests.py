"""Synthetic run directories with known numbers, written as the learner writes them."""

import hashlib
import json
from pathlib import Path

LIFEALIGN = {
    "harmless": [0.52, [0.81, 0.795, 0.78]],
    "helpful": [0.55, [0.56, 0.84, 0.825]],
    "truthful": [0.48, [0.47, 0.5, 0.77]],
}
SEQUENTIAL = {
    "harmless": [0.52, [0.83, 0.71, 0.605]],
    "helpful": [0.55, [0.57, 0.86, 0.74]],
    "truthful": [0.48, [0.46, 0.49, 0.79]],
}


def score(accuracy, pairs=200):
    return {
        "accuracy": accuracy,
        "margin": round(accuracy - 0.5, 6),
        "reward_accuracy": round(accuracy - 0.01, 6),
        "kl_previous": 0.0123,
        "pairs": pairs,
    }


def write_run(
    path: Path,
    accuracies=None,
    *,
    method="lifealign",
    consolidates=None,
    pairs=200,
    parents=None,
    untested=(),
    **facts,
) -> Path:
    """A run over the tasks of `accuracies`: {task: [zero-shot, [score after each task in turn]]}."""
    accuracies = LIFEALIGN if accuracies is None else accuracies
    consolidates = method == "lifealign" if consolidates is None else consolidates
    tested = {task: values for task, values in accuracies.items() if task not in untested}
    path.mkdir(parents=True)
    _write_json(path / "run.json", _facts(method) | facts)
    _write_json(path / "zero_shot.json", {"scores": {task: score(v[0], pairs) for task, v in tested.items()}})
    parent = "000"
    for index, task in enumerate(accuracies, 1):
        name = f"{index:03}-{index}"
        scores = {t: score(v[1][index - 1], pairs) for t, v in tested.items() if len(v[1]) >= index}
        write_version(path, index, name, task, parents[index - 1] if parents else parent, scores, consolidates)
        parent = name
    (path / "current").write_text(f"{parent}\n")
    return path


def write_version(path, index, name, task, parent, scores, consolidates=False):
    directory = path / "versions" / name
    directory.mkdir(parents=True)
    before = {t: s | {"accuracy": round(s["accuracy"] - 0.02, 6)} for t, s in scores.items()}
    _write_json(
        directory / "scores.json",
        {"scores": scores, "before_consolidation": before if consolidates else None},
    )
    lines = [json.dumps(line) for line in _training()]
    (directory / "training.jsonl").write_text("\n".join(lines) + "\n")
    if consolidates:
        _write_json(directory / "consolidation.json", [module(i, index) for i in range(4)])
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
    _write_json(directory / "manifest.json", _manifest(index, task, parent, task in scores, files))


def module(i, index=1):
    return {
        "module": f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj",
        "energy_kept": 0.91 + 0.01 * i,
        "rank": 2 + i,
        "projected_energy": 0.1 * (index - 1),
        "norm_before": 3.0,
        "norm_after": 2.0,
        "memory_rank": 4 * index,
        "discarded_energy": 0.001 * i,
        "bank_lost_energy": 0.0,
    }


def _facts(method):
    return {
        "format": 1,
        "everalign": "0.1.0",
        "model": "tiny-assistant",
        "model_fingerprint": "5f2d9c0a77e1b3c4",
        "method": {"name": method, "keep": 0.5, "energy": 0.9},
        "objective": "fpo",
        "settings": {"learning_rate": {"sft": 1e-4, "fpo": 5e-6}, "max_length": 512, "beta": 0.1},
        "seed": 7,
        "created": "2026-03-01T10:00:00+00:00",
        "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"cpu": "AMD EPYC", "cores": 2, "platform": "Linux-6.1-x86_64"},
    }


def _manifest(index, task, parent, tested, files):
    data = {"source": f"data/{index}.jsonl", "rows": 3000, "fingerprint": f"{index:064x}"}
    stage = {"epochs": 3.0, "steps": 60, "rows": 3000, "replayed": 600 * (index - 1)}
    return {
        "format": 1,
        "index": index,
        "name": task,
        "parent": parent,
        "created": "2026-03-01T10:05:00+00:00",
        "train": data,
        "test": data | {"rows": 200, "fingerprint": f"{index + 100:064x}"} if tested else None,
        "stages": [
            stage | {"stage": "sft", "reference": "base", "seconds": 41.26, "step0_margin": None},
            stage | {"stage": "fpo", "reference": "stage_start", "seconds": 95.0, "step0_margin": 0.0417},
        ],
        "replay_ids": [],
        "files": files,
    }


def _training():
    common = {"epoch": 1.0, "learning_rate": 1e-4, "grad_norm": 0.9}
    for step in range(10, 70, 10):
        yield common | {"stage": "sft", "step": step, "loss": 2.5 - 0.02 * step}
    for step in range(10, 70, 10):
        yield common | {"stage": "fpo", "step": step, "loss": 0.17 - 0.001 * step, "margin": 0.02 * step}


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=1))
