"""How many answers the identity warm-up should copy: copy rate, over-editing and net win rate by its proportion.

    python bench/correction_identity.py

Every corrector sees the same corrections; before, it copies a share of the same rows' answers once. A larger share is
more training in all, as in the paper.
"""

import argparse
from dataclasses import asdict
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from common import OUT, data_folder, write_result
from correction_task import corrector_folder, held_out, judge, training_rows
from everalign.correction import Corrector
from everalign.correction.evaluation import evaluate_corrector
from everalign.data import CorrectionSet
from everalign.evaluation.scoring import compare_answers
from everalign.modeling.runtime import prepare_process

MARGIN = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.02, 0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--rows", type=int, default=4000, help="corrections to learn from")
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=300, help="answers of each kind")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    rows = training_rows()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: arguments.rows].tolist()
    rows = CorrectionSet(tuple(rows[i] for i in chosen), "pairs")
    (referee, accuracy), answers, results = judge(), held_out(arguments.count), {}
    table = Table(title=f"by proportion of the warm-up; judge of held-out accuracy {accuracy:.3f}")
    for column in (
        "share",
        "answers",
        "net win rate",
        "95 %",
        "edited",
        "edited though good",
        "kept",
        "edits per token",
    ):
        table.add_column(column, justify="left" if column == "answers" else "right")
    for share in arguments.shares:
        settings = {"identity": share, "identity_epochs": 1.0, "epochs": arguments.epochs}
        folder = corrector_folder(f"identity-{share:g}", str(data_folder() / "base-model"), rows, **settings)
        compare = partial(compare_answers, referee, margin=MARGIN)
        report = evaluate_corrector(answers, Corrector.from_pretrained(folder), compare)
        results[str(share)] = asdict(report)
        for kind, scores in {"all": report.overall, **report.kinds}.items():
            assert scores.win is not None
            over = "" if scores.over_edit_rate is None else f"{scores.over_edit_rate:.2f}"
            interval = f"{scores.win.low:+.3f} to {scores.win.high:+.3f}"
            edits = (f"{scores.edit_rate:.2f}", over, f"{scores.copy_rate:.2f}", f"{scores.edit_ratio:.2f}")
            table.add_row(f"{share:g}", kind, f"{scores.win.net:+.3f}", interval, *edits)
    Console(width=120).print(table)
    write_result(OUT / "correction_identity.json", {"settings": vars(arguments), "results": results})


if __name__ == "__main__":
    main()
