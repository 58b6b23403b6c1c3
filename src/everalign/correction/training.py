"""Train a corrector in two stages.

    trained = train_corrector("Qwen/Qwen2.5-0.5B-Instruct", load_corrections("edits.jsonl"), "runs/corrector",
                              test=load_corrections("edits.test.jsonl"))
    trained.report.perplexity

The method of the Aligner (Ji et al., NeurIPS 2024, arXiv 2402.02416): first an identity warm-up, which learns to copy
the answers of a part of the rows, then all rows with their corrections, from that checkpoint. Both minimise
-log p(correction | question, answer) over the correction's tokens alone. AdamW with a cosine schedule; the same
arguments give the same weights on the same machine.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everalign.correction.corrector_files import CorrectorFacts, chosen_template, write_corrector_facts
from everalign.correction.options import CorrectorOptions
from everalign.correction.templates import get_template
from everalign.correction.tokenization import CorrectionEncoder, Texts, compared, copied, taught, tokenize_corrections
from everalign.data.collate import Batch, batches_by_length, collate, row_tokens
from everalign.data.readers import check_disjoint
from everalign.data.records import CorrectionSet
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.modeling.base_adapter import base_and_adapter, tokenizer_folder
from everalign.modeling.loading import (
    check_all_weights,
    check_trainable,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
    resolve_precision,
    sequence_limit,
)
from everalign.modeling.model_files import merged_into, write_checked
from everalign.modeling.options import Precision
from everalign.modeling.policy import FullModel, Policy
from everalign.modeling.reward_model import check_free
from everalign.modeling.runtime import place_name, prepare_process, training_device
from everalign.modeling.stopping import write_ends
from everalign.storage import exclusive, lock_of, new_folder
from everalign.training.base_objective import LikelihoodObjective
from everalign.training.stage import StageResult, train_stage


@dataclass(frozen=True)
class CorrectorReport:
    """What a corrector makes of N held-out rows, every token counting the same.

    Args:
        rows: N, the rows whose correction and answer both fit.
        perplexity: exp of the mean negative log-likelihood per token of the corrections, ends included.
        copy_log_likelihood: mean log-likelihood per token of the original answers as output, in nats; 0 would be
            certain to copy.
        starts_by_copying: share of rows where greedy decoding would begin with the answer's first token.
        copies: share of rows where greedy decoding would return the whole answer unchanged.
        identities: rows whose answer is its own correction.
        keeps: share of these where it would be returned unchanged; None where there are none.
    """

    rows: int
    perplexity: float
    copy_log_likelihood: float
    starts_by_copying: float
    copies: float
    identities: int
    keeps: float | None


@dataclass(frozen=True)
class _Sums:
    """Of S sequences: log-likelihood in nats, tokens, and whether greedy decoding gives the first token and all."""

    log_probs: Tensor
    lengths: Tensor
    first: Tensor
    all: Tensor


def corrector_report(model: Policy | FullModel, rows: Sequence[TokenizedRow], tokens_per_batch: int) -> CorrectorReport:
    """Judge a corrector.

    Args:
        model: in evaluation mode.
        rows: N of them, each with two responses: the correction and the answer.
        tokens_per_batch: tokens computed at once, padding included.
    """
    shared, order, parts = model.head.shared, [], []
    for numbers in batches_by_length([row_tokens(row, shared) for row in rows], tokens_per_batch):
        batch = model.on_device(collate([rows[number] for number in numbers], shared))
        parts.append(_sums(batch, *model.response_choices(batch)))
        order += numbers
    correction, answer = (_of_response(parts, place) for place in (0, 1))
    same = torch.tensor([rows[number].responses[0] == rows[number].responses[1] for number in order])
    return CorrectorReport(
        rows=len(rows),
        perplexity=math.exp(-(correction.log_probs.sum() / correction.lengths.sum()).item()),
        copy_log_likelihood=(answer.log_probs.sum() / answer.lengths.sum()).item(),
        starts_by_copying=answer.first.mean().item(),
        copies=answer.all.mean().item(),
        identities=int(same.sum()),
        keeps=answer.all[same].mean().item() if same.any() else None,
    )


def _sums(batch: Batch, log_probs: Tensor, tokens: Tensor) -> _Sums:
    """Return the sums (2B,) fp64 on the CPU of a batch of B rows."""
    lengths, sequences = batch["lengths"], batch["sequences"]
    total = torch.zeros(len(lengths), device=log_probs.device, dtype=torch.float64)
    right = (tokens == batch["targets"]).double()
    # A sequence's tokens stand in their order, though not together.
    firsts = sequences.argsort(stable=True)[lengths.cumsum(0) - lengths]
    found = (
        total.index_add(0, sequences, log_probs.double()),
        lengths.double(),
        right[firsts],
        (total.index_add(0, sequences, right) == lengths).double(),
    )
    return _Sums(*(values.cpu() for values in found))


def _of_response(parts: Sequence[_Sums], place: int) -> _Sums:
    """Return the sums of every row's response at a place."""
    names = ("log_probs", "lengths", "first", "all")
    return _Sums(*(torch.cat([getattr(part, name)[place::2] for part in parts]) for name in names))


Progress = Callable[[str, int, int], None]

LONGEST_BY_DEFAULT = 2048


@dataclass(frozen=True)
class TrainedCorrector:
    """A finished training.

    Args:
        path: the corrector's folder, a plain language model with its tokenizer and `corrector.json`.
        facts: what its `corrector.json` says.
        report: what it makes of the held-out rows; None without any.
        stages: steps, seconds and curve of `identity` (where there was a warm-up) and `correction`.
    """

    path: Path
    facts: CorrectorFacts
    report: CorrectorReport | None
    stages: dict[str, StageResult]


def train_corrector(
    model: str,
    rows: CorrectionSet,
    output: str | os.PathLike[str],
    *,
    test: CorrectionSet | None = None,
    options: CorrectorOptions | None = None,
    seed: int = 0,
    allow_overlap: bool = False,
    log: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> TrainedCorrector:
    """Train a corrector and write its folder, whole or not at all.

    Killed in the middle, the same call goes on from its newest checkpoint; until it is done, what it needs for that is
    kept in `OUTPUT.training` beside the folder.

    Args:
        model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`;
            a corrector goes on with its own template.
        rows: the corrections; their weights count in the loss.
        output: the corrector's folder; must be empty or not exist yet.
        test: held-out rows, for the report.
        options: how; the defaults when None.
        seed: seeds the warm-up's rows, the order of the rows and an adapter.
        allow_overlap: let rows be in `rows` and `test`.
        log: called with one line for each thing that happens.
        progress: called with (stage, done, all).

    Raises:
        InputError: the model, the rows, the options or the output folder cannot be used; another process is at it;
            or the model is a corrector of another template.
        EveralignError: the loss became NaN or infinite; the message says at which step.
    """
    folder = Path(output)
    with exclusive(lock_of(folder), "training a corrector there"):
        _check_input(rows, test, folder, allow_overlap)
        options = _with_template(options or CorrectorOptions(), model)
        prepare_process()
        device = training_device(log)
        options = options.replace(precision=resolve_precision(options.precision, device))
        tokenizer = load_tokenizer(model)
        encoder = CorrectionEncoder(tokenizer, get_template(str(options.template)), options.objectives or ())
        learner, base = _load(model, options, device, seed)
        options = options.replace(
            max_length=sequence_limit(options.max_length, LONGEST_BY_DEFAULT, _inner(learner), tokenizer, model),
        )
        corrections = _encode("training", rows, encoder, options, taught, log)
        held_out = _encode("held-out", test, encoder, options, compared, log) if test else ()
        named = f", objectives {', '.join(encoder.objectives)}" if encoder.objectives else ""
        log(f"  template {encoder.template.id}{named}")
        log(f"  trains {_what(options)} in {options.precision} on {place_name(device)}")
        identities = _warm_up_rows(rows, len(corrections), encoder, options, seed)
        stages = {"identity": identities, "correction": corrections}

        work = folder.with_name(folder.name + ".training")
        place = work / _work_key(base, encoder, stages, options, seed)
        results = _train(learner, stages, options, place, seed, log, progress)
        learner.eval()
        report = corrector_report(learner, held_out, options.tokens_per_batch) if held_out else None
        facts = CorrectorFacts(
            template=encoder.template.id,
            objectives=encoder.objectives,
            encoding=encoder.fingerprint,
            max_length=int(options.max_length or 0),
            base_model=model,
            base_fingerprint=base,
            data=rows.fingerprint,
            rows=len(corrections),
            held_out=None if report is None else asdict(report),
            settings={**options.model_dump(), "objectives": list(encoder.objectives), "seed": seed},
        )
        _write(folder, learner, model, tokenizer, facts)
        shutil.rmtree(work)
        return TrainedCorrector(folder, facts, report, results)


def _check_input(rows: CorrectionSet, test: CorrectionSet | None, folder: Path, allow_overlap: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a corrector is trained in one process, found WORLD_SIZE above 1")
    check_free(folder)
    for part in (rows, *([] if test is None else [test])):
        if not part:
            raise InputError(f"{part.source}: no rows in it")
    check_disjoint(rows, test or (), allow=allow_overlap)


def _with_template(options: CorrectorOptions, model: str) -> CorrectorOptions:
    """Fill in template and objectives: those of the corrector that is trained on, or the defaults."""
    template, objectives = chosen_template(model, options.template, options.objectives)
    return options.replace(template=template.id, objectives=objectives)


def _what(options: CorrectorOptions) -> str:
    if options.lora_rank:
        return f"an adapter of rank {options.lora_rank}"
    return "all weights" if options.precision == "fp32" else "all weights, which stay fp32,"


def _load(model: str, options: CorrectorOptions, device: torch.device, seed: int) -> tuple[Policy | FullModel, str]:
    """Return what learns, and the fingerprint of the weights it starts from."""
    precision: Precision = "bf16" if options.precision == "bf16" else "fp32"
    loaded = load_model(model, precision if options.lora_rank else "fp32", device=device)
    fingerprint = model_fingerprint(loaded)
    if not options.lora_rank:
        check_all_weights(loaded, model)
        return FullModel(loaded, precision), fingerprint
    check_trainable(loaded, model, merged=True)
    return Policy(loaded, options.lora_rank, options.alpha, seed=seed), fingerprint


def _inner(learner: Policy | FullModel) -> Any:
    return learner.peft if isinstance(learner, Policy) else learner.model


def _encode(
    name: str,
    rows: CorrectionSet,
    encoder: CorrectionEncoder,
    options: CorrectorOptions,
    texts: Texts,
    log: Callable[[str], None],
) -> tuple[TokenizedRow, ...]:
    limit = int(options.max_length or 0)
    try:
        encoded = tokenize_corrections(rows, encoder, limit, texts)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from None
    if not encoded.groups:
        raise InputError(f"{rows.source}: no correction fits max_length, {limit} tokens with its prompt; raise it")
    left_out = f"; {encoded.dropped} left out, too long for {limit} tokens" if encoded.dropped else ""
    shortened = f"; {encoded.shortened} prompts shortened" if encoded.shortened else ""
    log(f"  {len(encoded.groups)} {name} rows{left_out}{shortened}")
    try:
        warnings = encoded.warnings(limit)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from None
    for warning in warnings:
        log(f"  warning: {rows.source}: {warning}")
    return encoded.groups


def _warm_up_rows(
    rows: CorrectionSet, corrections: int, encoder: CorrectionEncoder, options: CorrectorOptions, seed: int
) -> tuple[TokenizedRow, ...]:
    """Draw the rows whose answers are learned as they are: a share of the number of corrections."""
    if options.identity == 0:
        return ()
    limit = int(options.max_length or 0)
    wanted = max(1, round(options.identity * corrections))
    order = random.Random(seed).sample(rows.items, len(rows))
    drawn = tokenize_corrections(order, encoder, limit, copied, most=wanted).groups
    if not drawn:
        raise InputError(
            f"{rows.source}: no answer fits max_length, {limit} tokens with its prompt, so the warm-up has no rows; "
            "raise max_length, or set identity to 0"
        )
    return drawn


def _work_key(
    base: str,
    encoder: CorrectionEncoder,
    stages: dict[str, tuple[TokenizedRow, ...]],
    options: CorrectorOptions,
    seed: int,
) -> str:
    """Name a training, so that nothing that another one left is taken for its own."""
    # What changes no result may be another one when a killed training goes on.
    settings = {name: value for name, value in options.model_dump().items() if name != "checkpointing"}
    facts = [base, encoder.fingerprint, settings, seed]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for group in (group for groups in stages.values() for group in groups):
        digest.update(repr((group.id, group.prompt, group.responses, group.weight)).encode())
    return digest.hexdigest()[:16]


def _train(
    learner: Policy | FullModel,
    stages: dict[str, tuple[TokenizedRow, ...]],
    options: CorrectorOptions,
    place: Path,
    seed: int,
    log: Callable[[str], None],
    progress: Progress,
) -> dict[str, StageResult]:
    results = {}
    for index, (name, groups) in enumerate(stages.items()):
        if groups:
            results[name] = train_stage(
                learner,
                LikelihoodObjective(name),
                groups,
                options.stage(warming_up=name == "identity"),
                place / f"{index}-{name}",
                seed=seed + index,
                progress=partial(progress, name),
                log=log,
            )
    return results


def _write(folder: Path, learner: Policy | FullModel, model: str, tokenizer: Any, facts: CorrectorFacts) -> None:
    """Write a Hugging Face model in the base model's dtype: the whole one, or the base with the adapter merged in."""
    if isinstance(learner, FullModel):
        plain = learner.model.cpu()
    else:
        with tempfile.TemporaryDirectory() as trained:
            learner.save_adapter(Path(trained))
            plain = merged_into(load_model(model, "fp32"), Path(trained))
    generation = plain.generation_config
    with new_folder(folder) as temporary:
        write_checked(plain, temporary)
        adapter = base_and_adapter(model, resolve_model(model))[1]
        if adapter is not None and tokenizer_folder(adapter) is not None:
            # The adapter's own, which may have more tokens than the base model's.
            tokenizer.save_pretrained(temporary)
        write_ends(temporary, generation, tokenizer, chats=False)
        write_corrector_facts(temporary, facts)
