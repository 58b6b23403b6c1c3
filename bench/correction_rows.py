"""Rows for the bench of drafts: of a small model that learns real corrections by heart, or of a trained corrector.

What a model of 6.5M parameters writes by itself goes round in circles, so that every guess is right sooner or later.
Corrections learnt by heart are real text, whatever answer stands in the prompt, and as much of a draft is kept as one
likes: down to noise, of which nothing is, nor of what is guessed later. A trained corrector writes its own corrections
of other models' answers, with the real answer in the prompt whatever draft is verified.
"""

import difflib
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from common import OUT, correction_rows, data_folder
from everalign.correction.corrector_files import load_corrector_files
from everalign.data import Correction
from everalign.modeling.decoding import RaggedModel
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.speculative import DraftDecoder
from everalign.options import Precision

Tokens = list[list[int]]

KINDS = (
    "unchanged",
    "0.9 kept, one block",
    "0.9 kept, scattered",
    "real edits",
    "real rewrites",
    "another answer",
    "noise",
)
_LENGTHS, _LONGEST_QUESTION, _LONGEST_ANSWER = (128, 192), 150, 260
_STEPS, _BATCH, _RATE = 150, 8, 1e-3
_SHORTEST = 32  # tokens of a corrector's correction
_AT_ONCE = 16  # answers that it corrects together


def kept_share(draft: list[int], output: list[int]) -> float:
    """How much of what is written stands in the draft, in runs of at least four tokens."""
    blocks = difflib.SequenceMatcher(None, draft, output, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size > 3) / len(output)


def noisy_drafts(outputs: Tokens, tokenizer: Any) -> dict[str, Tokens]:
    """Drafts made from what is written: as it is, with a tenth of noise in one block or scattered, and noise alone."""
    rng = random.Random(0)

    def noise(count: int) -> list[int]:
        return [rng.randrange(3, len(tokenizer)) for _ in range(count)]

    def block(tokens: list[int]) -> list[int]:
        size = len(tokens) // 10
        start = rng.randrange(1, len(tokens) - size - 1)
        return tokens[:start] + noise(size) + tokens[start + size :]

    return {
        "unchanged": list(outputs),
        "0.9 kept, one block": [block(tokens) for tokens in outputs],
        "0.9 kept, scattered": [
            [*(noise(1)[0] if rng.random() < 0.1 else token for token in tokens[:-1]), tokens[-1]] for tokens in outputs
        ],
        "noise": [[*noise(len(tokens) - 1), tokens[-1]] for tokens in outputs],
    }


class CorrectorRows:
    """What a trained corrector writes for answers of other models, with drafts as `Rows` has them.

    Corrections that keep at least a third of their answer are real edits, others real rewrites.

    Args:
        folder: of the corrector.
        precision: of its weights.
        answers: what it corrects.
        count: N, the rows of a kind at most.
        limit: most tokens of a correction.
    """

    def __init__(
        self, folder: Path, precision: Precision, answers: Iterable[Correction], count: int, limit: int
    ) -> None:
        encoder = load_corrector_files(folder, None).encoder(load_tokenizer(str(folder)))
        self._model = load_model(str(folder), precision).eval().requires_grad_(False)
        self.ends: list[int] = sorted(encoder.ends)
        ragged = RaggedModel(self._model)
        found: list[tuple[list[int], list[int], list[int]]] = []  # prompt, draft, what is written
        encoded = [(encoder.prompt(row.question, row.answer), encoder.response(row.answer)) for row in answers]
        for start in range(0, len(encoded), _AT_ONCE):
            prompts, drafts = map(list, zip(*encoded[start : start + _AT_ONCE], strict=True))
            written = DraftDecoder(ragged, prompts, drafts, self.ends, [limit] * len(prompts)).run()
            found += [
                (prompt, draft, row.tokens)
                for prompt, draft, row in zip(prompts, drafts, written, strict=True)
                if row.ended and len(row.tokens) >= _SHORTEST
            ]
        if len(found) < count:
            raise SystemExit(f"{folder}: only {len(found)} corrections end and have {_SHORTEST} tokens or more")
        prompts, drafts, outputs = map(list, zip(*found, strict=True))
        shares = [kept_share(draft, output) for _, draft, output in found]
        edits = [i for i, share in enumerate(shares) if share >= 1 / 3 and drafts[i] != outputs[i]]
        rewrites = [i for i, share in enumerate(shares) if share < 1 / 3]
        some = list(range(len(outputs)))[:: max(1, len(outputs) // count)][:count]
        self.drafts: dict[str, Tokens] = {
            **noisy_drafts([outputs[i] for i in some], encoder.tokenizer),
            "real edits": [drafts[i] for i in edits[:count]],
            "real rewrites": [drafts[i] for i in rewrites[:count]],
            "another answer": [drafts[(i + 1) % len(drafts)] for i in some],
        }
        chosen = {"real edits": edits[:count], "real rewrites": rewrites[:count]}
        self.prompts: dict[str, Tokens] = {kind: [prompts[i] for i in chosen.get(kind, some)] for kind in self.drafts}

    def model(self) -> Any:
        """Return the corrector's model."""
        return self._model


class Rows:
    """N questions, the corrections that the model writes, and for every kind the answers that stand in its prompts.

    Args:
        count: N.
    """

    def __init__(self, count: int) -> None:
        self.tokenizer = load_tokenizer(str(data_folder() / "base-model"))
        self.ends: list[int] = [self.tokenizer.eos_token_id]
        real = self._real(count)
        self.corrections: Tokens = [correction for _, _, correction in real]
        self.drafts: dict[str, Tokens] = {
            **noisy_drafts(self.corrections, self.tokenizer),
            "real edits": [answer for _, answer, _ in real],
            "another answer": [real[(i + 1) % count][1] for i in range(count)],
        }
        between, after = (self._tokens(mark) for mark in ("\n[[answer]]\n", "\n[[correction]]\n"))
        self.prompts: dict[str, Tokens] = {
            kind: [
                question + between + draft[:-1] + after for (question, _, _), draft in zip(real, drafts, strict=True)
            ]
            for kind, drafts in self.drafts.items()
        }

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def _real(self, count: int) -> list[tuple[list[int], list[int], list[int]]]:
        """Questions, answers and corrections of middling length, the latter two with the end token."""
        found = []
        for row in correction_rows("qa_feedback_correction", "train"):
            question, answer, correction = (self._tokens(row[name]) for name in ("query", "answer", "correction"))
            fits = len(question) < _LONGEST_QUESTION and len(answer) < _LONGEST_ANSWER
            if fits and _LENGTHS[0] <= len(correction) < _LENGTHS[1]:
                found.append((question, [*answer, *self.ends], [*correction, *self.ends]))
        return found[:count]

    def model(self) -> Any:
        """Return the base model after it has learnt the rows by heart; kept for the next time."""
        content = json.dumps([self.prompts, self.corrections, _STEPS, _BATCH, _RATE])
        path = Path(OUT / f"by-heart-{hashlib.sha256(content.encode()).hexdigest()[:12]}.pt")
        model = load_model(str(data_folder() / "base-model"))
        if path.exists():
            model.load_state_dict(torch.load(path))
        else:
            self._learn(model)
            path.parent.mkdir(exist_ok=True)
            torch.save(model.state_dict(), path)
        return model.eval().requires_grad_(False)

    def _learn(self, model: Any) -> None:
        rng, kinds = random.Random(0), list(self.drafts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS, pct_start=0.1)
        model.train().requires_grad_(True)
        for step in range(_STEPS):
            places = [(rng.choice(kinds), rng.randrange(len(self.corrections))) for _ in range(_BATCH)]
            texts = [self.prompts[kind][i] + self.corrections[i] for kind, i in places]
            width = max(map(len, texts))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
            hidden = model.base_model(input_ids=ids[:, :-1]).last_hidden_state
            chosen = [
                (row, column)
                for row, (kind, i) in enumerate(places)
                for column in range(len(self.prompts[kind][i]) - 1, len(texts[row]) - 1)
            ]
            rows, columns = torch.tensor(chosen).unbind(1)
            loss = cross_entropy(model.get_output_embeddings()(hidden[rows, columns]), ids[rows, columns + 1])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                print(f"learning by heart: step {step} of {_STEPS}, loss {loss.item():.4f}", flush=True)
