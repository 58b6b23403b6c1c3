"""Correct answers: verify an answer in one forward pass, and rewrite only what the model would not have written.

corrector = Corrector.from_pretrained("runs/corrector")
corrected = corrector.correct("Is the sea salty?", "No.")
corrected.text, corrected.changed, corrected.forward_passes
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from everalign.correction.checks import Approver, Guards
from everalign.correction.edits import common_prefix_length
from everalign.correction.engines import (
    TOKENS_PER_BATCH,
    Begun,
    EndpointEngine,
    Engine,
    EngineOutput,
    Gate,
    Pair,
)
from everalign.correction.options import CorrectorOptions
from everalign.correction.sentences import GrowingCorrection
from everalign.correction.templates import Question, Template, get_template
from everalign.data.messages import checked_prompt
from everalign.data.readers import load_corrections
from everalign.data.records import CorrectionSet
from everalign.data.rows import check_text
from everalign.errors import EveralignError, InputError
from everalign.llm_client import ChatClient
from everalign.notebook import default_progress

if TYPE_CHECKING:
    from everalign.options import Precision


@dataclass(frozen=True)
class Corrected:
    """The result for one answer.

    Args:
        text: the correction; the original answer, byte by byte, where it is not `changed`.
        changed: whether it differs from the answer.
        reason: why the original is returned although the model did not confirm it: `gate`, `too_long`, the name of
            the guard that rejected the correction, or `not_better` where the approver did; None otherwise.
        forward_passes: of the model; None where the engine does not report it, as for the counts below.
        accepted_draft_tokens: tokens guessed from the answer that were right.
        rejected_draft_tokens: tokens guessed from it that were wrong.
        output_tokens: tokens the corrector wrote, including the end token.
    """

    text: str
    changed: bool
    reason: str | None = None
    forward_passes: int | None = None
    accepted_draft_tokens: int | None = None
    rejected_draft_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class CorrectionOptions:
    """How answers are corrected.

    Args:
        gate: lets an answer pass without a correction: a threshold for the mean log-likelihood, in nats per token,
            that the corrector gives the answer as its own output (such as -0.05); or a function of what the first
            forward pass found. None lets no answer pass.
        guards: which corrections are rejected; the default guards when None.
        max_new_tokens: longest correction; twice the answer and 256 more when None.

    Raises:
        InputError: an option is out of its range.
    """

    gate: float | Gate | None = None
    guards: Guards | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.gate, int | float) and not (math.isfinite(self.gate) and self.gate <= 0):
            raise InputError(f"gate: must be a mean log-likelihood, at most 0, found {self.gate}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: must be at least 1, found {self.max_new_tokens}")

    @property
    def gate_function(self) -> Gate | None:
        """The gate as a function."""
        if self.gate is None or callable(self.gate):
            return self.gate
        threshold = float(self.gate)
        return lambda verified: verified.log_likelihood >= threshold


class Corrector:
    """Corrects answers.

    Args:
        engine: writes the corrections.
        options: the defaults of every call.
        approver: has the last word on every correction that changes its answer; None for no such check.
    """

    def __init__(
        self, engine: Engine, options: CorrectionOptions | None = None, approver: Approver | None = None
    ) -> None:
        if isinstance(engine, str | os.PathLike):
            call = "from_endpoint(url, model, template=...)" if "://" in str(engine) else f"from_pretrained({engine!r})"
            raise InputError(f"a corrector is loaded by Corrector.{call}; Corrector() itself takes an engine")
        if not callable(getattr(engine, "write", None)):
            raise InputError(
                f"Corrector takes an engine, found {type(engine).__name__}: load a folder with "
                "Corrector.from_pretrained(folder), use a server with Corrector.from_endpoint(url, model, "
                "template=...), or train one with Corrector.train(model, rows, folder)"
            )
        self._engine, self._options, self._approver = engine, options or CorrectionOptions(), approver

    def __repr__(self) -> str:
        approver = "" if self._approver is None else f", approver={type(self._approver).__name__}"
        return f"Corrector({type(self._engine).__name__}, template={self.template.id!r}{approver})"

    @classmethod
    def train(
        cls, model: str, rows: Any, output: str | os.PathLike[str], *, test: Any = None, **arguments: Any
    ) -> "Corrector":
        """Train a corrector, write its folder, and load it.

            corrector = Corrector.train("tiny", "edits.csv", "runs/corrector", test="edits.test.csv", epochs=2)
            corrector.correct("Is the sea salty?", "No.").text

        Args:
            model: a folder in Hugging Face format, a Hub name, a GGUF file, `tiny` or `smollm2`; a corrector is trained
                further.
            rows: what `load_corrections` returns, or takes: a path, a list of dictionaries, a DataFrame, ...
            output: the corrector's folder; must be empty or not exist yet.
            test: held-out rows, for the report in `corrector.json`.
            arguments: those of `train_corrector`, which also returns the report, or single options of
                `CorrectorOptions`, such as `epochs=2` and `lora_rank=16`.

        Raises:
            InputError: rows, options or model cannot be used.
        """
        from everalign.correction.training import train_corrector  # loads torch

        arguments = CorrectorOptions.gather(arguments)
        arguments.setdefault("progress", default_progress())
        learned = rows if isinstance(rows, CorrectionSet) else load_corrections(rows)
        held_out = test if test is None or isinstance(test, CorrectionSet) else load_corrections(test)
        trained = train_corrector(model, learned, output, test=held_out, **arguments)
        return cls.from_pretrained(trained.path)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        template: str | None = None,
        device: str | None = None,
        precision: "Precision" = "fp32",
        tokens_per_batch: int = TOKENS_PER_BATCH,
        options: CorrectionOptions | None = None,
        approver: Approver | None = None,
    ) -> "Corrector":
        """Load a corrector's folder.

        Args:
            folder: what `everalign correct train` wrote; or any language model's, if `template` is named.
            template: id of the template, for models without a `corrector.json`.
            device: such as `cuda:0`; the GPU if there is one when None.
            precision: of the weights.
            tokens_per_batch: tokens computed at once by `correct_batch`.
            options: the defaults of every call.
            approver: has the last word on every correction that changes its answer.

        Raises:
            InputError: the folder cannot be loaded or does not name its template, or the device cannot be used.
        """
        from everalign.correction.local_engine import LocalEngine  # loads torch

        engine = LocalEngine.from_pretrained(
            folder, template=template, device=device, precision=precision, tokens_per_batch=tokens_per_batch
        )
        return cls(engine, options, approver)

    @classmethod
    def from_endpoint(
        cls,
        url: str,
        model: str,
        *,
        template: str,
        objectives: Sequence[str] = (),
        options: CorrectionOptions | None = None,
        approver: Approver | None = None,
        api_key: str | None = None,
    ) -> "Corrector":
        """Use a corrector behind an OpenAI-compatible server's `/v1/completions`.

        Args:
            url: of the server.
            model: its name there.
            template: id of the template it was trained with.
            objectives: the ones it was trained with.
            options: the defaults of every call; a gate is refused.
            approver: has the last word on every correction that changes its answer.
            api_key: the server's, empty for none; OPENAI_API_KEY when None.
        """
        client = ChatClient(url, model, api_key)
        return cls(EndpointEngine(client, get_template(template), objectives), options, approver)

    @property
    def template(self) -> Template:
        """The template of the corrector's prompt."""
        return self._engine.template

    @property
    def fingerprint(self) -> str:
        """Digest of everything that corrections depend on, except the options."""
        if self._approver is None:
            return self._engine.fingerprint
        return hashlib.sha256(f"{self._engine.fingerprint} {self._approver.fingerprint}".encode()).hexdigest()

    def correct(self, question: Question, answer: str, options: CorrectionOptions | None = None) -> Corrected:
        """Correct one answer; arguments and errors as in `correct_batch`."""
        return self.correct_batch([(question, answer)], options)[0]

    def correct_batch(
        self,
        pairs: Sequence[Pair],
        options: CorrectionOptions | None = None,
        begun: Sequence[Begun] | None = None,
    ) -> list[Corrected]:
        """Correct answers; results are in the order given.

        Args:
            pairs: questions (text, or chat messages) and answers.
            options: the corrector's own when None.
            begun: beginnings of the corrections, which stay as they are: the results' texts begin with them. What a
                gate or a guard keeps of an answer is then only what its beginning does not stand for.

        Raises:
            InputError: a question or an answer is not text (names its number), the engine has no gate, or a correction
                is begun and there is an approver.
            EveralignError: the model or the server failed.
        """
        options = options or self._options
        checked = [_checked(pair, f"pair {number}: ") for number, pair in enumerate(pairs, start=1)]
        if begun is None:
            outputs = self._engine.write(checked, options.gate_function, options.max_new_tokens)
        else:
            self.check_continues()
            outputs = self._engine.write(checked, options.gate_function, options.max_new_tokens, begun)
        return self._results(checked, outputs, options, begun)

    def check_continues(self) -> None:
        """Raise InputError if a correction that is begun cannot be continued: an approver judges whole answers."""
        if self._approver is not None:
            raise InputError(
                "an approver judges whole answers, and cannot take back the beginning of one; correct whole answers, "
                "or leave the approver out"
            )

    def stream_by_sentence(
        self, question: Question, pieces: Iterable[str], options: CorrectionOptions | None = None
    ) -> Iterator[str | Corrected]:
        """Correct an answer while it comes in pieces; yield corrected sentences, and finally the whole result.

        Each time a sentence of the answer ends, the answer so far is corrected, and what is yielded for it stays: it is
        the beginning of all further corrections (see `GrowingCorrection`). So the result's text continues what was
        yielded, and may differ from `correct`'s, which knows the whole answer from the start. Errors as in
        `correct_batch`; what was yielded before stays valid.
        """
        growing, found = GrowingCorrection(), list[Corrected]()
        for piece in pieces:
            growing.add(piece)
            answer = growing.next_answer()
            if answer is None:
                continue
            found += self.correct_batch([(question, answer)], options, [growing.begun])
            if found[-1].reason in (None, "gate") and (text := growing.accept(answer, found[-1].text)):
                yield text
        found += self.correct_batch([(question, growing.answer)], options, [growing.begun])
        sums: dict[str, Any] = {}
        for name in ("forward_passes", "accepted_draft_tokens", "rejected_draft_tokens", "output_tokens"):
            known = [count for one in found if (count := getattr(one, name)) is not None]
            sums[name] = sum(known) if known else None
        yield replace(found[-1], **sums)

    def stream(self, question: Question, answer: str, options: CorrectionOptions | None = None) -> Iterator[str]:
        """Yield the text of `correct` in pieces that never split a character; see `stream_events`."""
        given = 0
        for event in self.stream_events(question, answer, options):
            piece = event if isinstance(event, str) else event.text[given:]
            given += len(piece)
            if piece:
                yield piece

    def stream_events(
        self, question: Question, answer: str, options: CorrectionOptions | None = None
    ) -> Iterator[str | Corrected]:
        """Yield pieces of the text while it is decoded, and finally the result of `correct`, whose text they begin.

        While the correction repeats the answer, each accepted stretch is yielded at once. After the first difference
        a guard or the approver may still reject it and return the answer, so nothing more is yielded until the result,
        unless there are neither guards nor approver. What no piece has yielded is `result.text[len(yielded):]`: a
        caller that got no piece knows the result before the first character of the text.
        """
        options = options or self._options
        pair = _checked((question, answer), "")
        may_be_rejected = (options.guards or Guards()).any or self._approver is not None
        given = ""
        for event in self._engine.stream_events(pair, options.gate_function, options.max_new_tokens):
            if isinstance(event, EngineOutput):
                (result,) = self._results([pair], [event], options)
                if not result.text.startswith(given):
                    raise EveralignError("the tokenizer changes text that was yielded already; use `correct` instead")
                yield result
            elif event.startswith(given):
                more = event[len(given) :]
                if may_be_rejected:
                    more = more[: common_prefix_length(more, answer[len(given) :])]
                if more:
                    yield more
                    given += more

    def _results(
        self,
        pairs: Sequence[Pair],
        outputs: Sequence[EngineOutput],
        options: CorrectionOptions,
        begun: Sequence[Begun] | None = None,
    ) -> list[Corrected]:
        """Apply the guards, then the approver; a rejected correction becomes its answer, behind what was begun."""
        guards, results = options.guards or Guards(), []
        for (question, answer), output, one in zip(pairs, outputs, begun or [Begun()] * len(pairs), strict=True):
            reason = output.reason
            if reason is None and (output.text != answer or not output.finished):
                reason = guards.first_violation(answer, output.text, output.finished, self.template, question)
            text = output.text if reason is None else one.with_rest(answer)
            counts = (output.forward_passes, output.accepted_draft_tokens, output.rejected_draft_tokens)
            results.append(Corrected(text, text != answer, reason, *counts, output.output_tokens))
        changed = [i for i, result in enumerate(results) if result.changed]
        if self._approver is not None and changed:
            questions, answers = [pairs[i][0] for i in changed], [pairs[i][1] for i in changed]
            verdicts = self._approver.approve(questions, answers, [results[i].text for i in changed])
            for i, answer, approved in zip(changed, answers, verdicts, strict=True):
                if not approved:
                    results[i] = replace(results[i], text=answer, changed=False, reason="not_better")
        return results


def _checked(pair: Pair, where: str) -> Pair:
    question, answer = pair
    try:
        prompt = checked_prompt(question, "question", "answer")
        check_text(answer, "answer")
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return prompt, answer
