"""Train a corrector in two stages.

    trained = train_corrector("Qwen/Qwen2.5-0.5B-Instruct", load_corrections("edits.jsonl"), "runs/corrector",
                              test=load_corrections("edits.test.jsonl"))
    trained.report.perplexity

The method of the Aligner (Ji et al., NeurIPS 2024, arXiv 2402.02416): a warm-up on some of the rows, which learns to
copy their answers, then all rows with their corrections. Both minimise -log p(text | question, answer) over the text's
tokens alone, with AdamW and a cosine schedule. The same arguments give the same weights on the same machine.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from everalign.correction.corrector_files import CorrectorFacts, chosen_template, write_corrector_facts
from everalign.correction.options import CorrectorOptions
from everalign.correction.tokenization import (
    CorrectionEncoder,
    Targets,
    answer_only,
    both,
    correction_only,
    describe_template,
    tokenize_corrections,
)
from everalign.data.collate import batches_by_length, collate, row_tokens
from everalign.data.readers import check_learnable
from everalign.data.records import CorrectionSet
from everalign.data.tokenization import TokenizedRow
from everalign.distributed import on_main, share, start
from everalign.errors import InputError
from everalign.modeling.base_adapter import base_and_adapter, tokenizer_folder
from everalign.modeling.base_weights import check_all_weights, check_library, check_trainable
from everalign.modeling.loading import (
    load_base,
    load_model,
    load_tokenizer,
    resolve_model,
    resolve_precision,
    sequence_limit,
)
from everalign.modeling.machine import library_versions, machine_facts
from everalign.modeling.model_files import merged_into, write_checked
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import place_name, prepare_process, training_device
from everalign.modeling.sampling import write_ends
from everalign.modeling.trainable import FullModel, computing_on
from everalign.options import Precision
from everalign.storage import check_free, exclusive, lock_of, new_folder
from everalign.training.base_objective import LikelihoodObjective
from everalign.training.stage import StageFigures, StageResult, train_stage

LONGEST_BY_DEFAULT = 2048

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CorrectorReport:
    """How well a corrector does on N held-out rows; every token has the same weight.

    Args:
        rows: N, the rows whose correction and answer both fit.
        perplexity: exp of the mean negative log-likelihood per token of the corrections, ends included.
        copy_log_likelihood: mean log-likelihood per token of the unchanged answers as output, in nats; 0 would be
            certain to copy.
        starts_by_copying: share of rows where greedy decoding would begin with the answer's first token.
        copies: share of rows where greedy decoding would return the answer unchanged.
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
class TrainedCorrector:
    """A finished training.

    Args:
        path: the corrector's folder, a Hugging Face model with its tokenizer and `corrector.json`.
        facts: the content of `corrector.json`.
        report: on the held-out rows; None without any.
        stages: steps, seconds and curve of `identity` (the warm-up, if any) and `correction`.
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
    figures: StageFigures = lambda *_: None,
) -> TrainedCorrector:
    """Train a corrector and write its folder atomically.

    Processes that a launcher has started share the work; all of them call this with the same arguments.
    After a kill, the same call continues from its newest checkpoint. Until it is done, checkpoints are in
    `OUTPUT.training` beside the folder.

    Args:
        model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`; a corrector keeps its
            template.
        rows: the corrections; their weights count in the loss.
        output: the corrector's folder; must be empty or not exist yet.
        test: held-out rows, for the report.
        options: the defaults when None.
        seed: draws the warm-up's rows, the order of the rows and an adapter's weights.
        allow_overlap: allow rows to be in both `rows` and `test`.
        log: called with one line for each step.
        progress: called with (stage, steps done, steps in all).
        figures: called with (stage, steps done, figures), see `everalign.training.stage.Figures`.

    Raises:
        InputError: the model, the rows, the options or the output folder cannot be used, another process is training
            there, or the model is a corrector of another template.
        EveralignError: the loss became NaN or infinite; names the step.
    """
    folder = Path(output)
    start()
    with exclusive(lock_of(folder), "training a corrector there"):
        check_free(folder)
        check_learnable(rows, test, allow_overlap)
        options = options or CorrectorOptions()
        check_library(options.quantize)
        template, objectives = chosen_template(model, options.template, options.objectives)
        prepare_process(options.deterministic)
        device = training_device(log)
        precision = resolve_precision(options.precision, device)
        options = options.replace(template=template.id, objectives=objectives, precision=precision)
        tokenizer = load_tokenizer(model)
        encoder = CorrectionEncoder(tokenizer, template, objectives)
        learner, base = _load_learner(model, options, precision, device, seed)
        limit = sequence_limit(options.max_length, LONGEST_BY_DEFAULT, learner.language_model, tokenizer, model)
        options = options.replace(max_length=limit)

        corrections = _tokenize("training", rows, encoder, limit, correction_only, log)
        held_out = _tokenize("held-out", test, encoder, limit, both, log) if test else ()
        log(f"  {describe_template(encoder)}")
        what = f"an adapter of rank {options.lora_rank}" if options.lora_rank else "all weights"
        if not options.lora_rank and options.precision != "fp32":
            what += ", which stay fp32,"
        if options.quantize is not None:
            what += f" on a base model that is quantised to {options.quantize},"
        log(f"  trains {what} in {options.precision} on {place_name(device)}")
        warm_up = _warm_up_rows(rows, round(options.identity * len(corrections)), encoder, options, seed)
        stages = {"identity": warm_up, "correction": corrections}

        work = folder.with_name(folder.name + ".training")
        place = work / _training_key(base, encoder, stages, options, seed)
        results = {
            name: train_stage(
                learner,
                LikelihoodObjective(name),
                tokenized,
                options.stage(warming_up=name == "identity"),
                place / f"{index}-{name}",
                seed=seed + index,
                learns_for=base,
                progress=partial(progress, name),
                figures=partial(figures, name),
                log=log,
            )
            for index, (name, tokenized) in enumerate(stages.items())
            if tokenized
        }
        on_device: AbstractContextManager[None] = nullcontext()
        if options.quantize is not None and held_out:
            log("  merged into the plain weights; the merged model scores held-out rows")
            learner = FullModel(_merged(learner, model), precision)
            on_device = computing_on(learner.model, device, precision)
        learner.eval()
        with on_device:
            report = corrector_report(learner, held_out, options.tokens_per_batch) if held_out else None
        facts = CorrectorFacts(
            template=encoder.template.id,
            objectives=encoder.objectives,
            encoding=encoder.fingerprint,
            max_length=limit,
            base_model=model,
            base_fingerprint=base,
            data=rows.fingerprint,
            rows=len(corrections),
            held_out=None if report is None else asdict(report),
            settings={**options.model_dump(), "objectives": list(encoder.objectives), "seed": seed},
            machine=machine_facts(),
            libraries=library_versions(),
        )
        on_main(_write_folder)(folder, learner, model, tokenizer, facts)
        on_main(shutil.rmtree)(work)
        return TrainedCorrector(folder, facts, report, results)


def _load_learner(
    model: str, options: CorrectorOptions, precision: Precision, device: torch.device, seed: int
) -> tuple[Policy | FullModel, str]:
    """Return the model to train, and what identifies its weights (see `load_base`)."""
    stored: Precision = precision if options.lora_rank else "fp32"
    loaded, base = load_base(model, stored, device=device, quantize=options.quantize)
    if not options.lora_rank:
        check_all_weights(loaded, model)
        return FullModel(loaded, precision), base
    check_trainable(loaded, model, merged=True)
    return Policy(loaded, options.lora_rank, options.alpha, seed=seed), base


def _tokenize(
    name: str,
    rows: CorrectionSet,
    encoder: CorrectionEncoder,
    max_length: int,
    targets: Targets,
    log: Callable[[str], None],
) -> Sequence[TokenizedRow]:
    """Tokenise rows, and log what the length limit cost; errors name the rows' source."""
    try:
        tokenized = tokenize_corrections(rows, encoder, max_length, targets)
        if not tokenized.rows:
            raise InputError(f"no correction fits max_length, {max_length} tokens with its prompt; raise it")
        line = f"  {len(tokenized.rows)} {name} rows"
        if tokenized.dropped:
            line += f"; {tokenized.dropped} left out, too long for {max_length} tokens"
        if tokenized.rows.truncated_prompts:
            line += f"; {tokenized.rows.truncated_prompts} prompts shortened"
        log(line)
        for warning in tokenized.warnings():
            log(f"  warning: {rows.source}: {warning}")
    except InputError as error:
        raise error.at(rows.source) from None
    return tokenized.rows.items


def _warm_up_rows(
    rows: CorrectionSet, count: int, encoder: CorrectionEncoder, options: CorrectorOptions, seed: int
) -> Sequence[TokenizedRow]:
    """Draw rows, at least one, whose answers are learned unchanged; none without a warm-up."""
    if options.identity == 0:
        return ()
    limit = int(options.max_length or 0)
    order = random.Random(seed).sample(rows.items, len(rows))
    drawn = tokenize_corrections(order, encoder, limit, answer_only, most=max(1, count)).rows
    if not drawn:
        raise InputError(
            f"{rows.source}: no answer fits max_length, {limit} tokens with its prompt, so the warm-up has no rows; "
            "raise max_length, or set identity to 0"
        )
    return drawn.items


def _training_key(
    base: str,
    encoder: CorrectionEncoder,
    stages: dict[str, Sequence[TokenizedRow]],
    options: CorrectorOptions,
    seed: int,
) -> str:
    """Return a digest of everything that a training's result depends on, which names its folder of checkpoints."""
    # Left out is what changes no result, and what version 0.1.0 did not have.
    later = set() if options.deterministic else {"deterministic"}
    # What identifies the base says how it is quantised.
    settings = options.model_dump(exclude={"checkpointing", "quantize", *later})
    digest = hashlib.sha256(json.dumps([base, encoder.fingerprint, settings, seed], sort_keys=True).encode())
    for row in (row for rows in stages.values() for row in rows):
        # A weight for each response, as in version 0.1.0, whose checkpoints are found by this name.
        weights = (row.weight,) * len(row.responses)
        digest.update(repr((row.id, row.prompt, row.responses, weights)).encode())
    return digest.hexdigest()[:16]


def corrector_report(model: Policy | FullModel, rows: Sequence[TokenizedRow], tokens_per_batch: int) -> CorrectorReport:
    """Evaluate a corrector with teacher forcing.

    Args:
        model: in evaluation mode.
        rows: N of them, each with two responses: the correction and the answer.
        tokens_per_batch: tokens computed at once, padding included.
    """
    shared = model.head.shared

    def compute(own: Sequence[list[int]]) -> list[torch.Tensor]:
        parts = []
        for indices in own:
            batch = model.on_device(collate([rows[i] for i in indices], shared))
            log_probs, greedy = model.response_choices(batch)
            lengths, sequences = batch["lengths"], batch["sequences"]
            zeros = torch.zeros(len(lengths), device=log_probs.device, dtype=torch.float64)
            right = (greedy == batch["targets"]).double()
            # The tokens of a sequence are in order, though not contiguous: a stable sort puts its first one first.
            firsts = sequences.argsort(stable=True)[lengths.cumsum(0) - lengths]
            sums = (
                zeros.index_add(0, sequences, log_probs.double()),
                lengths.double(),
                right[firsts],
                (zeros.index_add(0, sequences, right) == lengths).double(),
            )
            parts.append(torch.stack(sums).cpu())
        return parts

    batches = batches_by_length([row_tokens(row, shared) for row in rows], tokens_per_batch)
    parts, order = share(compute, batches), [i for batch in batches for i in batch]
    # Each (N, 2): of every row, its correction and its answer.
    log_likelihood, length, first_right, all_right = torch.cat(parts, dim=1).view(4, len(rows), 2)
    per_token = log_likelihood.sum(0) / length.sum(0)
    copied = all_right[:, 1]
    identity = torch.tensor([rows[i].responses[0] == rows[i].responses[1] for i in order])
    return CorrectorReport(
        rows=len(rows),
        perplexity=math.exp(-per_token[0].item()),
        copy_log_likelihood=per_token[1].item(),
        starts_by_copying=first_right[:, 1].mean().item(),
        copies=copied.mean().item(),
        identities=int(identity.sum()),
        keeps=copied[identity].mean().item() if identity.any() else None,
    )


def _merged(learner: Policy | FullModel, model: str) -> Any:
    """Return the trained model in fp32 on the CPU, an adapter merged into the plain weights of its base model."""
    if isinstance(learner, FullModel):
        return learner.model.cpu()
    with tempfile.TemporaryDirectory() as trained:
        learner.save_adapter(Path(trained))
        return merged_into(load_model(model, "fp32"), Path(trained))


def _write_folder(folder: Path, learner: Policy | FullModel, model: str, tokenizer: Any, facts: CorrectorFacts) -> None:
    """Write a Hugging Face model in the base model's dtype, with an adapter merged in."""
    plain = _merged(learner, model)
    generation = plain.generation_config
    with new_folder(folder) as temporary:
        write_checked(plain, temporary)
        adapter = base_and_adapter(model, resolve_model(model))[1]
        if adapter is not None and tokenizer_folder(adapter) is not None:
            # The adapter's own tokenizer, which may have more tokens than the base model's.
            tokenizer.save_pretrained(temporary)
        write_ends(temporary, generation, tokenizer, chats=False)
        write_corrector_facts(temporary, facts)
