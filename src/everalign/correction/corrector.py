"""A corrector at work: it verifies an answer in one forward pass, and rewrites what it would not have written itself.

corrector = Corrector.from_pretrained("runs/corrector")
corrected = corrector.correct("Is the sea salty?", "No.")
corrected.text, corrected.changed, corrected.forward_passes
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from everalign.correction.engines import TOKENS_PER_BATCH, EndpointEngine, Engine, Gate, Pair, Written
from everalign.correction.output_checks import Approver, Guards
from everalign.correction.templates import Question, Template, get_template
from everalign.data.messages import checked_prompt
from everalign.data.rows import check_text
from everalign.errors import EveralignError, InputError
from everalign.llm_client import ChatClient

if TYPE_CHECKING:
    from everalign.modeling.loading import Precision
    from everalign.modeling.speculative import Verified


@dataclass(frozen=True)
class Corrected:
    """An answer after the corrector has seen it.

    Args:
        text: the correction; the original answer, byte by byte, where it is not `changed`.
        changed: whether it is another text than the answer.
        reason: why the original is returned although nobody found it right: `gate`, `too_long`, the name of the
            guard that refused the correction, or `not_better` where the approver did; None otherwise.
        forward_passes: of the model; None where the engine does not tell, as for the following.
        accepted_draft_tokens: tokens guessed from the answer that were right.
        rejected_draft_tokens: tokens guessed from it that were not.
        output_tokens: tokens of what the corrector wrote, end token included.
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
        gate: lets answers pass without a correction: from this mean log-likelihood on, in nats per token, that the
            corrector gives the answer as its own output (such as -0.05); or a function of what the first forward
            pass found, which returns whether the answer passes. None lets none pass.
        guards: which corrections are refused; the ones that are on by default when None.
        max_new_tokens: longest correction; twice the answer and 256 more when None.
        strength: how much is corrected: below 0 the corrector is steered towards copying, above 0 towards correcting,
            if `everalign correct steer` has found out how; 0 for the corrector as it is.
    """

    gate: float | Gate | None = None
    guards: Guards | None = None
    max_new_tokens: int | None = None
    strength: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.gate, int | float) and not (math.isfinite(self.gate) and self.gate <= 0):
            raise InputError(f"gate: must be a mean log-likelihood, at most 0, found {self.gate}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: must be at least 1, found {self.max_new_tokens}")
        if not math.isfinite(self.strength):
            raise InputError(f"strength: must be a finite number, found {self.strength}")

    @property
    def passes(self) -> Gate | None:
        """The gate as a function."""
        gate = self.gate
        if gate is None or callable(gate):
            return gate
        least = float(gate)

        def likely(verified: "Verified") -> bool:
            return verified.log_likelihood >= least

        return likely


class Corrector:
    """Corrects answers.

    Args:
        engine: what writes corrections.
        options: how, unless a call says otherwise.
        approver: asked whether each correction may take the answer's place; nobody is when None.
    """

    def __init__(
        self, engine: Engine, options: CorrectionOptions | None = None, approver: Approver | None = None
    ) -> None:
        self._engine, self._options, self._approver = engine, options or CorrectionOptions(), approver

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
            options: how, unless a call says otherwise.
            approver: asked whether each correction may take the answer's place.

        Raises:
            InputError: nothing loadable is there, it does not say which template it reads, or the device is none.
        """
        # Here: a process that asks a server for its corrections needs none of this.
        import torch

        from everalign.correction.corrector_files import load_corrector_files
        from everalign.correction.engines import LocalEngine
        from everalign.modeling.loading import load_model, load_tokenizer

        files = load_corrector_files(folder, template)
        encoder = files.encoder(load_tokenizer(str(folder)))
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=place)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {place!r}: cannot be used: {str(error).splitlines()[0]}") from error
        model = load_model(str(folder), precision, device=torch.device(place))
        return cls(LocalEngine(model, encoder, tokens_per_batch, str(folder)), options, approver)

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
            template: id of the template it was trained behind.
            objectives: those it was trained with.
            options: how, unless a call says otherwise; a gate is refused.
            approver: asked whether each correction may take the answer's place.
            api_key: what the server asks for, empty for nothing; OPENAI_API_KEY when None.
        """
        client = ChatClient(url, model, api_key)
        return cls(EndpointEngine(client, get_template(template), objectives), options, approver)

    @property
    def template(self) -> Template:
        """What the corrector reads."""
        return self._engine.template

    @property
    def fingerprint(self) -> str:
        """Names what corrections depend on, the options aside."""
        if self._approver is None:
            return self._engine.fingerprint
        return hashlib.sha256(f"{self._engine.fingerprint} {self._approver.fingerprint}".encode()).hexdigest()

    def correct(
        self,
        question: Question,
        answer: str,
        options: CorrectionOptions | None = None,
        *,
        strength: float | None = None,
    ) -> Corrected:
        """Return one answer corrected; arguments and errors as in `correct_batch`."""
        return self.correct_batch([(question, answer)], options, strength=strength)[0]

    def correct_batch(
        self, pairs: Sequence[Pair], options: CorrectionOptions | None = None, *, strength: float | None = None
    ) -> list[Corrected]:
        """Return answers corrected, in the order given.

        Args:
            pairs: questions (text, or chat messages) and answers.
            options: how; the corrector's own when None.
            strength: in place of the options' one, if given.

        Raises:
            InputError: a question or an answer is no text (names its number), the engine has no gate, or it cannot be
                steered so far or at all.
            EveralignError: the model or the server failed.
        """
        options = self._chosen(options, strength)
        checked = [_checked(pair, f"pair {number}: ") for number, pair in enumerate(pairs, start=1)]
        found = self._engine.write(checked, options.passes, options.max_new_tokens, options.strength)
        judged = [self._judged(answer, written, options) for (_, answer), written in zip(checked, found, strict=True)]
        return self._approved(checked, judged)

    def stream(
        self,
        question: Question,
        answer: str,
        options: CorrectionOptions | None = None,
        *,
        strength: float | None = None,
    ) -> Iterator[str]:
        """Yield the text of `correct` in pieces that never split a character; see `stream_events`."""
        given = 0
        for event in self.stream_events(question, answer, options, strength=strength):
            piece = event if isinstance(event, str) else event.text[given:]
            given += len(piece)
            if piece:
                yield piece

    def stream_events(
        self,
        question: Question,
        answer: str,
        options: CorrectionOptions | None = None,
        *,
        strength: float | None = None,
    ) -> Iterator[str | Corrected]:
        """Yield pieces of the text while it is decoded, and finally the result of `correct`, whose text they begin.

        While the correction repeats the answer, each accepted stretch is yielded at once. After the first difference
        a guard or the approver may still reject it and return the answer, so nothing more is yielded until the result,
        unless there are neither guards nor approver. What no piece has yielded is `result.text[len(yielded):]`: a
        caller that got no piece knows the result before the first character of the text.
        """
        options = self._chosen(options, strength)
        pair = _checked((question, answer), "")
        guarded = (options.guards or Guards()).any or self._approver is not None
        given = ""
        for event in self._engine.stream_events(pair, options.passes, options.max_new_tokens, options.strength):
            if isinstance(event, Written):
                (result,) = self._approved([pair], [self._judged(answer, event, options)])
                if not result.text.startswith(given):
                    raise EveralignError("the tokenizer changes text that was yielded already; use `correct` instead")
                yield result
            elif event.startswith(given):
                # The rest may yet be rejected, and then the answer is what is returned.
                text = event[: _same_until(event, answer, len(given))] if guarded else event
                if len(text) > len(given):
                    yield text[len(given) :]
                    given = text

    def _chosen(self, options: CorrectionOptions | None, strength: float | None) -> CorrectionOptions:
        options = options or self._options
        return options if strength is None else replace(options, strength=strength)

    def _judged(self, answer: str, written: Written, options: CorrectionOptions) -> Corrected:
        reason, text = written.reason, written.text
        if reason is None and (text != answer or not written.finished):
            reason = (options.guards or Guards()).objection(answer, text, written.finished, self.template)
        if reason is not None:
            text = answer
        return Corrected(
            text, text != answer, reason, written.passes, written.accepted, written.rejected, written.tokens
        )

    def _approved(self, pairs: Sequence[Pair], found: list[Corrected]) -> list[Corrected]:
        """Return corrections, and the answers instead of those that the approver refuses."""
        changed = [i for i, one in enumerate(found) if one.changed]
        if self._approver is None or not changed:
            return found
        columns = [pairs[i][0] for i in changed], [pairs[i][1] for i in changed], [found[i].text for i in changed]
        verdicts = dict(zip(changed, self._approver.approve(*columns), strict=True))
        return [
            one if verdicts.get(i, True) else replace(one, text=pairs[i][1], changed=False, reason="not_better")
            for i, one in enumerate(found)
        ]


def _checked(pair: Pair, where: str) -> Pair:
    question, answer = pair
    try:
        asked = checked_prompt(question, "question", "answer")
        check_text(answer, "answer")
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return asked, answer


def _same_until(first: str, second: str, start: int) -> int:
    """Where two texts begin to differ, which are the same up to a place."""
    pairs = zip(first[start:], second[start:], strict=False)
    least = min(len(first), len(second))
    return next((start + i for i, (one, other) in enumerate(pairs) if one != other), least)
