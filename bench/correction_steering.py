"""A corrector steered: how much it edits at each strength, on rows that nothing was chosen on.

python bench/correction_steering.py
"""

import argparse
from statistics import fmean

import numpy
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from common import OUT, data_folder, write_result
from correction_task import approving, corrector_folder, is_short, judge, pairs, training_rows
from everalign.contrib import SteeredEngine, SteeringFacts, SteeringOptions, steer_corrector
from everalign.correction import Corrector
from everalign.correction.edits import edit_share, words
from everalign.data import CorrectionSet
from everalign.data.records import correction_of
from everalign.modeling.runtime import prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200, help="that the direction is extracted from")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--strengths", nargs="+", type=float, default=[-0.2, -0.1, -0.05, 0.05, 0.1, 0.2])
    parser.add_argument("--count", type=int, default=150, help="rows that are corrected at each strength")
    parser.add_argument("--settings", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    folder = corrector_folder("corrector", str(data_folder() / "base-model"), training_rows())
    known = [correction_of(row) for row in pairs("hh_harmless", "test") if is_short(row.chosen, row.rejected)]
    options = SteeringOptions(rows=arguments.rows, trials=arguments.trials, strengths=tuple(arguments.strengths))
    written = folder / "steering.json"
    if written.exists():
        facts = SteeringFacts.model_validate_json(written.read_text())
    else:
        facts = steer_corrector(folder, CorrectionSet(tuple(known), "hh"), options=options, log=print)
    rows = [row for row in pairs("safe_rlhf", "test") if is_short(row.rejected)][: arguments.count]
    asked = [(row.prompt, row.rejected) for row in rows]
    engine, ((judging, _), (approving_, _)) = SteeredEngine.from_pretrained(folder), (judge(), approving())
    plain = Corrector.from_pretrained(folder).correct_batch(asked)
    table = Table(title=f"layers {facts.layers}, strengths {facts.lowest:g} to {facts.highest:g}")
    for column in ("strength", "edited", "changed", "judge", "other reward model"):
        table.add_column(column, justify="right")
    results = []
    for strength in numpy.linspace(facts.lowest, facts.highest, arguments.settings).tolist():
        found = Corrector(engine.at(strength)).correct_batch(asked)
        texts = [one.text for one in found]
        share = fmean(edit_share(words(row.rejected), words(text)) for row, text in zip(rows, texts, strict=True))
        rewards = [fmean(scorer.score([row.prompt for row in rows], texts)) for scorer in (judging, approving_)]
        changed = fmean(one.changed for one in found)
        results.append({"strength": strength, "edit_share": share, "changed": changed, "rewards": rewards})
        table.add_row(f"{strength:+.2f}", f"{share:.3f}", f"{changed:.2f}", *(f"{reward:+.3f}" for reward in rewards))
    correlation = float(
        spearmanr([row["strength"] for row in results], [row["edit_share"] for row in results]).statistic
    )
    same = [one.text for one in Corrector(engine).correct_batch(asked)] == [one.text for one in plain]
    Console(width=120).print(table)
    print(f"Spearman {correlation:.3f}; strength 0 gives the unsteered texts: {same}")
    found_facts = {"facts": facts.model_dump(), "spearman": correlation, "zero_is_unsteered": same}
    write_result(OUT / "correction_steering.json", {"settings": vars(arguments), **found_facts, "results": results})


if __name__ == "__main__":
    main()
