"""A corrector of real preference pairs: whether an independent reward model likes its corrections better.

    python bench/correction_quality.py

The corrector learns to turn rejected answers into chosen ones, and to leave chosen ones alone. It is judged on held-out
pairs and on answers of models that are not in its training data at all, by a reward model trained on pairs that it did
not see either: as it is, behind gates, and with a reward model of its own training pairs that approves of corrections.
"""

import argparse
from dataclasses import asdict
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, write_result
from correction_task import approving, corrector_folder, held_out, judge, training_rows
from everalign.correction import CorrectionOptions, Corrector
from everalign.correction.evaluation import CorrectionScores, evaluate_corrector
from everalign.evaluation.scoring import ScorerApprover, compare_answers
from everalign.modeling.runtime import prepare_process

# By so much have rewards to differ, or else neither answer wins; the judge's rewards deviate by about 1.
MARGIN = 0.1


def line(scores: CorrectionScores) -> list[str]:
    """A row of the table."""
    win = scores.win
    assert win is not None
    interval = "" if win.low is None else f"{win.low:+.3f} to {win.high:+.3f}"
    edits = [f"{scores.edit_rate:.2f}", f"{scores.copy_rate:.2f}", f"{scores.edit_ratio:.2f}"]
    return [str(scores.rows), f"{win.net:+.3f}", interval, f"{win.p_value:.1e}", *edits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="answers of each kind")
    parser.add_argument("--gates", nargs="+", type=float, default=[-0.3, -0.1], help="log-likelihoods that pass")
    parser.add_argument("--approvals", nargs="+", type=float, default=[0.0, 0.5], help="margins of the approver")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    folder = corrector_folder("corrector", str(data_folder() / "base-model"), training_rows())
    (referee, accuracy), (approver, approver_accuracy) = judge(), approving()
    answers, results = held_out(arguments.count), {}
    ways = {"as it is": (CorrectionOptions(), None)}
    ways |= {f"gate {gate:g}": (CorrectionOptions(gate=gate), None) for gate in arguments.gates}
    ways |= {f"approved, {m:g}": (CorrectionOptions(), ScorerApprover(approver, m)) for m in arguments.approvals}
    table = Table(title=f"corrections judged by a reward model of held-out accuracy {accuracy:.3f}")
    columns = ("corrector", "answers", "rows", "net win rate", "95 %", "p", "edited", "kept", "edits per token")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for way, (options, approval) in ways.items():
        corrector = Corrector.from_pretrained(folder, approver=approval)
        report = evaluate_corrector(
            answers, corrector, partial(compare_answers, referee, margin=MARGIN), options=options
        )
        results[way] = asdict(report)
        for kind, scores in report.kinds.items():
            table.add_row(way, kind, *line(scores))
        Console(width=130).print(table)
    accuracies = {"judge_accuracy": accuracy, "approver_accuracy": approver_accuracy}
    write_result(OUT / "correction_quality.json", {"settings": vars(arguments), **accuracies, "results": results})


if __name__ == "__main__":
    main()
