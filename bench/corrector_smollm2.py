"""SmolLM2-135M-Instruct as a corrector of real answers: which settings, and does it make answers better?

    python bench/corrector_judges.py judge judge-smollm2 approver    # who judges, and who approves
    python bench/corrector_smollm2.py train lora     # about an hour on one core; variants may run side by side
    python bench/corrector_smollm2.py train full
    python bench/corrector_smollm2.py verify         # which answers each variant leaves as they are: minutes
    python bench/corrector_smollm2.py validation     # variants, gates and an approver, on validation answers
    python bench/corrector_smollm2.py test --way "lora-10, approved 0.5"
    python bench/corrector_smollm2.py pairs --way "lora-10, approved 0"    # fifty changed answers, to be read blind

It learns from seven sets of corrections, from pairs whose rejected answer becomes the chosen one, and from good answers
that stay. It is judged on answers of other models, which are in no training file: harmful and harmless, true and false,
and of any quality. Rows that share a question with these are left out of training; the judge has seen neither. What is
finished stays in bench/out/corrector_smollm2 and is not repeated.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common import OUT, correction_rows, data_folder, over_runs, write_blind_pairs, write_result
from corrector_judges import KINDS, MOST, answers, outputs, own_pairs, question_of, reward_model
from everalign.correction import CorrectionOptions, Corrector
from everalign.correction.batch import correct_batches, journal_facts
from everalign.correction.corrector import Corrected
from everalign.correction.corrector_files import load_corrector_files
from everalign.correction.evaluation import evaluation_report
from everalign.correction.options import CorrectorOptions
from everalign.correction.tokenization import both, tokenize_corrections
from everalign.correction.training import train_corrector
from everalign.data import Correction, CorrectionSet
from everalign.evaluation.answers import win_rate, write_answers
from everalign.evaluation.scorers import RewardModel
from everalign.evaluation.scoring import compare_answers
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import prepare_process
from everalign.modeling.speculative import Verified
from everalign.storage import Journal, write_json
from everalign.training.reference import sequence_logprobs

FOLDER = OUT / "corrector_smollm2"
CORRECTIONS = (
    "aligner_alpacaeval",
    "alpaca_regenerated",
    "criticeval_correction",
    "gsm8k_correction",
    "qa_feedback_correction",
    "selfee_revision",
    "shepherd_correction",
)
# Characters of a question with answer and correction: about 350 tokens.
LONGEST = 1400
# Tokens of an answer that SmolLM2 is asked to improve; longer ones count as unfinished.
LONGEST_IMPROVED = 160
# The smallest difference of the judge's rewards that counts; they deviate by about 1.
MARGIN = 0.1
COMMON: dict[str, Any] = {"epochs": 1.0, "batch_size": 16, "max_length": 512, "precision": "bf16"}
LORA, FULL = {"lora_rank": 32, "learning_rate": 4e-4}, {"learning_rate": 5e-5}
# How each variant is trained, and the share of its rows that are good answers.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": (LORA, 0.5),
    "full": (FULL, 0.5),
    "lora-30": (LORA, 0.3),
    "lora-10": ({**LORA, "identity": 0.0}, 0.1),
    "6.5M": ({"learning_rate": 5e-4, "epochs": 2.0, "identity": 0.0}, 0.1),
}
# The variant that is no SmolLM2 but the base model.
SMALL = "6.5M"
# Gates, in nats: by how much some token has to be likelier than the answer's, and the correction than the answer.
CERTAINTIES, RATIOS = (0.5, 1.0, 2.0, 3.0, 4.0), (0.0, 2.0, 5.0, 10.0, 20.0)
APPROVALS = (0.0, 0.1, 0.2, 0.3, 0.5)
# Only answers are corrected that the approver rates as low as this share of validation answers.
LOWEST = (0.1, 0.2, 0.3, 0.5)
REQUEST = "Question: {}\n\nAnswer: {}\n\nImprove this answer. If it is good already, repeat it. Write the answer alone."


# ---- rows ----


def training_rows(count: int, good_share: float, seed: int) -> CorrectionSet:
    """Corrections, pairs as corrections in equal number, and good answers that stay; the seed draws them."""
    asked = {question_of(row["prompt"]).lower() for name, _, _ in KINDS.values() for row in outputs(name)}
    draw = random.Random(seed)

    def fits(question: Any, *texts: str) -> bool:
        return question_of(question).lower() not in asked and len(str(question)) + sum(map(len, texts)) <= LONGEST

    edits = [
        Correction(row["query"], row["answer"], row["correction"])
        for name in CORRECTIONS
        for row in correction_rows(name, "train")
        if row["answer"] != row["correction"] and fits(row["query"], row["answer"], row["correction"])
    ]
    pairs = [row for row in own_pairs() if fits(row["prompt"], row["chosen"], row["rejected"])]
    turned = [Correction(row["prompt"], row["rejected"], row["chosen"]) for row in draw.sample(pairs, len(pairs))]
    good = [Correction(row["prompt"], row["chosen"], row["chosen"]) for row in draw.sample(pairs, len(pairs))]
    good += [Correction(row.question, row.correction, row.correction) for row in edits]
    stay = round(good_share * count)
    half = (count - stay) // 2
    chosen = [*draw.sample(edits, half), *turned[: count - stay - half], *draw.sample(good, stay)]
    return CorrectionSet(tuple(chosen), "corrections")


# ---- models ----


def run_of(variant: str, seed: int) -> str:
    """The name of a variant's run: the variant's own, with every seed but the first behind it."""
    return f"{variant}.seed-{seed}" if seed else variant


def train(variant: str, rows: int, seed: int) -> None:
    run = run_of(variant, seed)
    folder = FOLDER / run
    if folder.exists():
        return
    settings, good_share = VARIANTS[variant]
    options = CorrectorOptions(**{**COMMON, **settings})
    base = str(data_folder() / "base-model") if variant == SMALL else "smollm2"
    learned = training_rows(rows, good_share, seed)
    trained = train_corrector(base, learned, folder, options=options, seed=seed, log=print)
    seconds = {name: stage.seconds for name, stage in trained.stages.items()}
    write_json(FOLDER / f"{run}.json", {"rows": rows, "good": good_share, "settings": settings, **seconds})


@cache
def judge() -> RewardModel:
    return reward_model("judge")


@cache
def approver() -> RewardModel:
    return reward_model("approver")


def asked(rows: CorrectionSet) -> list[Corrected]:
    """What SmolLM2 writes if it is merely asked to improve the answers; unfinished ones change nothing."""
    prompts = [[{"role": "user", "content": REQUEST.format(question_of(row.question), row.answer)}] for row in rows]
    written = write_answers(
        Policy(load_model("smollm2", "bf16"), 1, 1.0, seed=0),
        load_tokenizer("smollm2"),
        prompts,
        Journal(FOLDER / "asked.sqlite"),
        "smollm2 bf16",
        max_new_tokens=LONGEST_IMPROVED,
        max_prompt_tokens=1024,
        progress=partial(print, "asked to improve:", flush=True),
    )
    return [
        Corrected(one.text.strip(), one.text.strip() != row.answer.strip())
        if one.ended
        else Corrected(row.answer, False, "unfinished")
        for row, one in zip(rows, written, strict=True)
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- evaluation ----


def verified(variant: str, rows: CorrectionSet) -> list[Verified]:
    """What the first pass says of every answer."""
    place = FOLDER / f"verified.{variant}.{rows.fingerprint[:12]}.json"
    if not place.exists():
        seen: list[Verified] = []

        def keep(found: Verified) -> bool:
            seen.append(found)
            return True

        corrector = Corrector.from_pretrained(FOLDER / variant, precision="bf16")
        facts = []
        for row in rows:
            seen.clear()
            corrector.correct(row.question, row.answer, CorrectionOptions(gate=keep))
            # A draft that is accepted with its end is asked of no gate.
            facts.append(asdict(seen[0]) if seen else asdict(Verified(0, 0, 0, 0.0, 0.0, 0.0)))
        write_json(place, facts)
    return [Verified(**one) for one in read(place)]


def corrections(variant: str, rows: CorrectionSet) -> list[Corrected]:
    """What the corrector returns without a gate, guards included."""
    corrector, options = Corrector.from_pretrained(FOLDER / variant, precision="bf16"), CorrectionOptions()
    journal = Journal.within(FOLDER / "cache", "corrections", *journal_facts(corrector, options, rows))
    done = partial(print, flush=True)
    return correct_batches(rows, corrector, options, 16, journal, done, lambda *state: done(*state))[0]


def log_ratios(variant: str, rows: CorrectionSet, corrected: list[Corrected]) -> list[float]:
    """By how many nats the corrector finds each correction likelier than its answer, both whole and with their ends."""
    place = FOLDER / f"ratios.{variant}.{rows.fingerprint[:12]}.json"
    if not place.exists():
        folder = FOLDER / variant
        encoder = load_corrector_files(folder, None).encoder(load_tokenizer(str(folder)))
        changed = [(row, one.text) for row, one in zip(rows, corrected, strict=True) if one.changed]
        pairs = [replace(row, correction=text, good=None) for row, text in changed]
        tokenized = tokenize_corrections(pairs, encoder, 2048, both)
        assert len(tokenized.rows) == len(pairs)
        policy = Policy(load_model(str(folder), "bf16"), 1, 1.0, seed=0)
        found = (
            (of_correction - of_answer).item()
            for of_correction, of_answer in sequence_logprobs(policy, tokenized.rows, 4096)
        )
        ratios = [next(found) if one.changed else 0.0 for one in corrected]
        write_json(place, ratios)
    return [float(ratio) for ratio in read(place)]


def kept(rows: CorrectionSet, corrected: list[Corrected], keep: list[bool], reason: str) -> list[Corrected]:
    """Returns the answers themselves where they are to be kept."""
    return [
        Corrected(row.answer, False, reason) if stays and one.changed else one
        for row, one, stays in zip(rows, corrected, keep, strict=True)
    ]


def ways(variant: str, run: str, rows: CorrectionSet) -> Iterator[tuple[str, list[Corrected]]]:
    """Every way to use what a variant's run has trained, and what it returns; the quickest first."""
    plain = corrections(run, rows)
    yield variant, plain
    yield from approvals(variant, run, rows, plain)
    facts = verified(run, rows)
    for certainty in CERTAINTIES:
        yield f"{variant}, certainty {certainty:g}", kept(rows, plain, [one.gap < certainty for one in facts], "gate")
    ratios = log_ratios(run, rows, plain)
    for limit in RATIOS:
        yield f"{variant}, ratio {limit:g}", kept(rows, plain, [one < limit for one in ratios], "gate")


def approvals(
    variant: str, run: str, rows: CorrectionSet, plain: list[Corrected]
) -> Iterator[tuple[str, list[Corrected]]]:
    """What is left of corrections where the approver has to find them better, or the answer bad."""
    before = approver_rewards("answers", rows, [row.answer for row in rows])
    after = approver_rewards(run, rows, [one.text for one in plain])
    for margin in APPROVALS:
        worse = [new - old <= margin for old, new in zip(before, after, strict=True)]
        yield f"{variant}, approved {margin:g}", kept(rows, plain, worse, "not_better")
    validation = answers("train", MOST)
    of_validation = approver_rewards("answers", validation, [row.answer for row in validation])
    for share in LOWEST:
        limit = np.quantile(of_validation, share)
        yield f"{variant}, lowest {share:g}", kept(rows, plain, [one > limit for one in before], "gate")


def approver_rewards(name: str, rows: CorrectionSet, texts: list[str]) -> list[float]:
    """What the approver gives answers, or a run's corrections."""
    place = FOLDER / f"approver.{name}.{rows.fingerprint[:12]}.json"
    if not place.exists():
        write_json(place, approver().score([row.question for row in rows], texts))
    return [float(reward) for reward in read(place)]


def scores(rows: CorrectionSet, corrected: list[Corrected]) -> dict[str, Any]:
    """What one run's corrections are worth, over all answers and by kind; `verdicts` in the answers' order."""
    questions, before = [row.question for row in rows], [row.answer for row in rows]
    after = [one.text for one in corrected]
    verdicts = compare_answers(judge(), questions, before, after, margin=MARGIN)
    report = evaluation_report(rows, corrected, verdicts)
    found = {"overall": asdict(report.overall), "kinds": {kind: asdict(one) for kind, one in report.kinds.items()}}
    changed = [i for i, one in enumerate(corrected) if one.changed]
    if changed:
        equal = win_rate(judge(), *([texts[i] for i in changed] for texts in (questions, after, before)))
        found["equal_length"] = asdict(equal)
    good = [one.changed for row, one in zip(rows, corrected, strict=True) if row.good]
    return {**found, "good_kept": 1 - sum(good) / len(good), "verdicts": verdicts}


def show(title: str, rows: CorrectionSet, found: dict[str, dict[str, list[Corrected]]]) -> dict[str, Any]:
    """Print the table of every way, over its runs; returns the figures of each run."""
    results = {way: {run: scores(rows, corrected) for run, corrected in runs.items()} for way, runs in found.items()}
    table = Table(title=title)
    columns = ("", "answers", "rows", "net win rate", "95 %", "at equal length", "edited", "kept", "unfinished")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for way, by_run in results.items():
        runs = list(by_run.values())
        verdicts = np.array([run["verdicts"] for run in runs], dtype=float)
        for kind in (*runs[0]["kinds"], "all"):
            parts = [run["overall"] if kind == "all" else run["kinds"][kind] for run in runs]
            chosen = [i for i, row in enumerate(rows) if kind in (row.kind, "all")]
            net = over_runs(verdicts[:, chosen])
            equal = [run["equal_length"]["length_controlled"].value for run in runs if "equal_length" in run]
            length = f"{fmean(equal):.2f}" if kind == "all" and equal else ""
            shares = [fmean(part[name] for part in parts) for name in ("edit_rate", "copy_rate")]
            unfinished = fmean(part["kept"].get("unfinished", 0.0) for part in parts)
            cells = (str(len(chosen)), f"{net.value:+.3f}", f"{net.low:+.3f} to {net.high:+.3f}", length)
            table.add_row(way, kind, *cells, *(f"{share:.0%}" for share in shares), f"{unfinished:.1%}")
        stays = fmean(run["good_kept"] for run in runs)
        table.add_row(way, "good ones untouched", "", "", "", "", "", f"{stays:.0%}", "")
        table.add_section()
    Console(width=140).print(table)
    for way, by_run in results.items():
        if len(by_run) > 1:
            each = (f"{run['overall']['win']['net']:+.3f} and {run['good_kept']:.0%}" for run in by_run.values())
            print(f"{way}, net win rate and good ones untouched by run: {', '.join(each)}")
    return results


def show_verified(count: int) -> None:
    """Print how many validation answers of each kind pass the first pass: as they are, and with gates."""
    rows = answers("train", count)
    table = Table(title="validation answers that pass, %")
    table.add_column("")
    for column in ("kind", "answers", "ungated", *(f"certainty {c:g}" for c in CERTAINTIES)):
        table.add_column(column, justify="right")
    for variant in [variant for variant in VARIANTS if (FOLDER / variant).exists()]:
        facts = verified(variant, rows)
        for kind in KINDS:
            gaps = [one.gap for row, one in zip(rows, facts, strict=True) if row.kind == kind]
            shares = [sum(gap == 0 for gap in gaps), *(sum(gap < c for gap in gaps) for c in CERTAINTIES)]
            table.add_row(variant, kind, str(len(gaps)), *(f"{100 * share / len(gaps):.0f}" for share in shares))
        table.add_section()
    Console(width=120).print(table)


def judge_quality(rows: CorrectionSet) -> dict[str, float]:
    """How often the judge gives a good answer more than a bad one of the same set, both drawn at random."""
    rewards = judge().score([row.question for row in rows], [row.answer for row in rows])
    by_kind: dict[str | None, list[float]] = {}
    for row, reward in zip(rows, rewards, strict=True):
        by_kind.setdefault(row.kind, []).append(reward)
    pairs = (("harmless", "harmful"), ("right", "hallucinated"), ("true", "false"))
    return {
        f"{good} over {bad}": sum(a > b for a in by_kind[good] for b in by_kind[bad])
        / (len(by_kind[good]) * len(by_kind[bad]))
        for good, bad in pairs
    }


def evaluate(split: str, count: int, wanted: str | None, variants: list[str], seeds: list[int]) -> None:
    chosen = wanted and wanted.split(",")[0]
    if chosen and not trained(chosen, seeds):
        sys.exit(f"--way {wanted!r}: no run of {chosen!r} is trained with these seeds in {FOLDER}")
    rows = answers(split, count)
    quality = judge_quality(rows)
    print("the judge rates, of two answers:", *(f"{pair} {share:.0%};" for pair, share in quality.items()))
    found: dict[str, dict[str, list[Corrected]]] = {"SmolLM2, asked": {"asked": asked(rows)}}
    for variant in dict.fromkeys([SMALL, chosen]) if chosen else variants:
        # On test rows one way alone, beside the corrector as it is and best of two.
        few = {variant, f"{variant}, approved 0", *([wanted] if variant == chosen else [])}
        for run in trained(variant, seeds):
            for way, corrected in ways(variant, run, rows):
                if chosen is None or way in few:
                    found.setdefault(way, {})[run] = corrected
                if chosen is not None and all(run in found.get(one, {}) for one in few):
                    break
    if wanted is not None and wanted not in found:
        sys.exit(f"no {wanted!r} among {', '.join(found)}: name a way of a variant that is trained")
    name = "test" if split == "test" else "validation"
    write_result(FOLDER / f"{name}.json", {"count": count, "judge": quality, "results": show(name, rows, found)})


def trained(variant: str, seeds: list[int]) -> list[str]:
    """The runs of a variant that there are."""
    return [run for seed in seeds if (FOLDER / (run := run_of(variant, seed))).exists()]


def blind_pairs(way: str, count: int) -> None:
    """Write changed test answers and their corrections, to be read blind."""
    rows = answers("test", count)
    variant = way.split(",")[0]
    corrected = next(found for name, found in ways(variant, variant, rows) if name == way)
    texts = [(question_of(row.question), new.text, row.answer) for row, new in zip(rows, corrected, strict=True)]
    write_blind_pairs(FOLDER / "pairs.md", texts, ("correction", "answer"), 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "verify", "validation", "test", "pairs"])
    parser.add_argument("variant", nargs="?", choices=VARIANTS, help="for validation: this one alone")
    parser.add_argument("--rows", type=int, default=2400, help="rows of training")
    parser.add_argument(
        "--count",
        type=int,
        default=MOST,
        choices=range(1, MOST + 1),
        metavar=f"1..{MOST}",
        help="answers of each kind, at most",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training; for test: runs to evaluate")
    parser.add_argument("--way", help="as in the validation table's first column")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_process()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.step == "train":
        if arguments.variant is None:
            parser.error(f"train which variant? one of {', '.join(VARIANTS)}")
        for seed in arguments.seeds:
            train(arguments.variant, arguments.rows, seed)
    elif arguments.step == "verify":
        show_verified(arguments.count)
    elif arguments.step == "pairs":
        blind_pairs(arguments.way, arguments.count)
    else:
        variants = list(VARIANTS) if arguments.variant is None else [arguments.variant]
        split = "train" if arguments.step == "validation" else "test"
        evaluate(split, arguments.count, arguments.way, variants, arguments.seeds)


if __name__ == "__main__":
    main()
