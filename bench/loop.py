"""The loop on the embedded assistant as corrector: what becomes of good feedback, of bad, and of too little.

python bench/loop.py --seeds 0 1 2

A corrector that has seen few corrections is in service. Four keys edit answers: a few of them first, then many as the
rule asks, then as many against it. After each, the gate decides, and the version in service corrects held-out answers
that nobody edited; a scorer that knows the rule says how many keep it.
"""

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import OUT, write_result
from everalign import AdapterOptions, Learner, TrainingOptions
from everalign.correction.corrector import Corrector
from everalign.correction.training import train_corrector
from everalign.data import Correction, CorrectionSet
from everalign.demo.run import OPTIONS, demo_answers, keeps_rule
from everalign.demo.world import answer, questions
from everalign.errors import EveralignError
from everalign.evaluation.scorers import CallableScorer
from everalign.learning.options import CorrectionTaskOptions
from everalign.methods import LifeAlign
from everalign.modeling.loading import TINY
from everalign.serving.corrector_reload import CorrectorReloader
from everalign.serving.feedback.loop import GATE, learn_from_feedback
from everalign.serving.feedback.task import NextTaskOptions
from everalign.serving.store import Exchange, Feedback, FeedbackStore

KEYS = tuple(f"{i:012d}" for i in range(4))
FIRST_ROWS = 40
"""Corrections that the corrector in service has learned."""

LITTLE, MANY, JUDGED = 40, 280, 120
"""Edited answers of the first call, of the two others, and answers that the scorer rates."""

TASK = NextTaskOptions(minimum=25, held_out=0.25)
TRAINING = TrainingOptions(learning_rate=4e-3, epochs=2.0, batch_size=4, max_length=256, checkpoint_steps=0)
WORLD = {question.text: question for question in questions("kitchen")}


def edit(store: FeedbackStore, texts: Sequence[str], before: str, after: str, version: str) -> None:
    """Keep answers in one style as clients got them, and edits of them into another."""
    now = datetime.now(timezone.utc)
    for i, text in enumerate(texts):
        # One seed: what the edited answer says goes by what the answer says.
        given, edited = (answer(WORLD[text], style, random.Random(text)) for style in (before, after))
        key, id = KEYS[i % len(KEYS)], f"chatcmpl-{time.monotonic_ns()}-{i}"
        about = {"upstream": "main", "model": "assistant", "messages": ({"role": "user", "content": text},)}
        what = {"original": given, "returned": given, "outcome": "unchanged", "reason": None, "mode": "correct"}
        kept = {"corrector": version, "template": "everalign-1", "usage": {}}
        store.add_exchange(Exchange(id=id, created=now, key_id=key, **about, **what, **kept))  # type: ignore[arg-type]
        opinion = {"rating": None, "preferred": None, "edited_text": edited, "tags": (), "comment": None}
        said = now + timedelta(microseconds=i)
        store.add_feedback(Feedback(exchange=id, key_id=key, user=None, created=said, **opinion))  # type: ignore[arg-type]


def rate(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """The scorer: 1 for an answer that keeps the rule, word for word."""
    asked = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [float(keeps_rule(WORLD[text], said)) for text, said in zip(asked, completions, strict=True)]


def mean_score(corrector: Corrector, seed: int) -> float:
    """What the scorer says of held-out answers once they are corrected; half of them kept the rule before."""
    rows = demo_answers("test", JUDGED, seed)
    found = corrector.correct_batch([(row.question.text, row.answer) for row in rows])
    scores = rate([row.question.text for row in rows], [one.text for one in found])
    return sum(scores) / len(scores)


def call(store: FeedbackStore, learner: Learner) -> dict[str, Any]:
    """Learn what waits, and say what became of it."""
    started = time.perf_counter()
    try:
        refusal: EveralignError | None = learn_from_feedback(store, learner, TASK, print).refusal
    except EveralignError as error:
        refusal = error
    outcome = {None: "promoted", 3: "refused", 4: "not enough evidence"}[refusal and refusal.exit_code]
    said = "" if refusal is None else str(refusal)
    return {"outcome": outcome, "said": said, "seconds": time.perf_counter() - started}


def run_seed(seed: int, folder: Path, scored: bool) -> list[dict[str, Any]]:
    """The three calls of one seed, each with the score of what is in service after it.

    Args:
        seed: seeds rows and training.
        folder: of corrector, run and store; emptied first.
        scored: whether the gate asks the scorer, too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    taught = [Correction(row.question.text, *row[1:]) for row in demo_answers("train", FIRST_ROWS, seed)]
    first, run = folder / "corrector", folder / "run"
    few = OPTIONS.replace(epochs=2.0)
    train_corrector(TINY, CorrectionSet(tuple(taught), "few"), first, options=few, seed=seed, log=print)
    judged = {row.question.text for row in demo_answers("test", JUDGED, seed)} | {row.question for row in taught}
    texts = [text for text in WORLD if text not in judged]
    random.Random(seed).shuffle(texts)
    batches = texts[:LITTLE], texts[LITTLE : LITTLE + MANY], texts[LITTLE + MANY : LITTLE + 2 * MANY]
    styles = ("plain", "courteous"), ("plain", "courteous"), ("courteous", "plain")
    results = [{"call": "before", "outcome": "", "score": mean_score(Corrector.from_pretrained(first), seed)}]

    with FeedbackStore.open(f"sqlite:///{folder}/feedback.db") as store:
        for name, edited, style in zip(("too little", "good", "bad"), batches, styles, strict=True):
            learner = Learner(
                str(first),
                LifeAlign(space="product"),
                "correction",
                run,
                training=TRAINING,
                adapter=AdapterOptions(rank=16, alpha=32.0),
                gate=GATE,
                gate_scorer=CallableScorer(rate, "keeps the rule") if scored else None,
                correction=CorrectionTaskOptions(identity=OPTIONS.identity),
                seed=seed,
                resume=run.exists(),
                log=print,
            )
            edit(store, edited, *style, version=learner.run.head)
            found = {"call": name, **call(store, learner), "version": learner.run.head}
            before = results[-1]["score"]
            found["score"] = before if learner.run.head == "000" else mean_score(in_service(run), seed)
            results.append(found)
    return results


def in_service(run: Path) -> Corrector:
    """The corrector that a gateway of this run has in service."""
    return CorrectorReloader(run, Corrector.from_pretrained).load()[0]


def main() -> None:
    """Run all seeds, print what became of each call, and fail where the loop did not do what it is for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-scorer", dest="scorer", action="store_false", help="the gate asks no scorer")
    arguments = parser.parse_args()
    table = Table(title="feedback on the embedded assistant as corrector")
    for column in ("seed", "feedback", "the gate says", "in service", "answers that keep the rule", "seconds"):
        table.add_column(column, justify="left" if column in ("feedback", "the gate says", "in service") else "right")
    found: dict[str, Any] = {}
    for seed in arguments.seeds:
        found[str(seed)] = results = run_seed(seed, OUT / "loop" / f"seed-{seed}", arguments.scorer)
        for one in results:
            cells = (one["call"], one["outcome"], one.get("version", ""), f"{one['score']:.1%}")
            table.add_row(str(seed), *cells, f"{one.get('seconds', 0):.0f}")
    Console(width=120).print(table)
    write_result(OUT / "loop.json", {"seeds": found, "gate": GATE, "scorer": arguments.scorer})
    for seed, (before, little, good, bad) in found.items():
        outcomes = [one["outcome"] for one in (little, good, bad)]
        assert outcomes == ["not enough evidence", "promoted", "refused"], (seed, outcomes)
        assert good["score"] > before["score"], (seed, before["score"], good["score"])
        assert bad["score"] == good["score"], (seed, good["score"], bad["score"])


if __name__ == "__main__":
    main()
