"""What a reward-weighted step costs beside a plain supervised step on the same tokens, in alternation.

python bench/var_step.py
"""

import argparse
import statistics
import time
from typing import Any

import torch

from common import OUT, write_result
from everalign.data.tokenization import TokenizedRow
from everalign.modeling.loading import load_tokenizer
from everalign.modeling.runtime import prepare_process
from everalign.training.objectives import make_objective
from var_contenders import start
from var_task import draw_questions, encoded, prompt, right_answers


def batches(count: int, size: int) -> list[tuple[list[TokenizedRow], list[TokenizedRow]]]:
    """The same questions and answers as rows of either objective, cut into steps."""
    tokenizer, rows = load_tokenizer("tiny"), []
    for number, question in enumerate(draw_questions(count * size, False, 0)):
        text = sorted(right_answers(question))[number % 7]
        group = encoded(tokenizer, prompt(question), [text])
        (answer,) = group.responses
        weight = 0.25 + number % 5
        rows.append(
            (
                TokenizedRow.pair(group.id, group.prompt, answer, answer, 1.0),
                TokenizedRow(group.id, group.prompt, (answer,), (weight,)),
            )
        )
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [([pair for pair, _ in part], [group for _, group in part]) for part in parts]


def step(policy: Any, objective: Any, rows: Any, optimizer: torch.optim.Optimizer) -> None:
    """One whole step: layout, loss, gradients, update."""
    batch = policy.on_device(objective.collate(rows, policy.head.shared))
    loss, _ = objective.loss(policy, batch, batch["count"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each objective in a round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    policy, data = start().train(), batches(arguments.steps, arguments.batch_size)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    objectives = [make_objective(name) for name in ("sft", "var")]
    seconds: dict[str, list[float]] = {"sft": [], "var": []}
    for number in range(arguments.rounds + 1):
        for place in (0, 1) if number % 2 else (1, 0):
            began = time.process_time()
            for rows in data:
                step(policy, objectives[place], rows[place], optimizer)
            if number:  # the first round warms up
                seconds[objectives[place].name].append(time.process_time() - began)
    ratios = [ours / plain for ours, plain in zip(seconds["var"], seconds["sft"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"a VAR step takes {ratio:.3f} times the processor time of an SFT step (median of {len(ratios)} pairs,")
    print(f"from {min(ratios):.3f} to {max(ratios):.3f})")
    write_result(OUT / "var_step.json", {"settings": vars(arguments), "ratio": ratio, "ratios": ratios})


if __name__ == "__main__":
    main()
