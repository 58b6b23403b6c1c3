"""Rows for the bench of drafts: real answers and corrections, and a small model that learns the corrections by heart.

What a model this small writes by itself goes round in circles, so that every guess is right sooner or later.
Corrections learnt by heart are real text, whatever answer stands in the prompt, and as much of a draft is kept as one
likes: down to noise, of which nothing is, nor of what is guessed later.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from common import OUT, correction_rows, data_folder
from everalign.modeling.loading import load_model, load_tokenizer

Tokens = list[list[int]]

KINDS = (
    "unchanged",
    "0.9 kept, one block",
    "0.9 kept, scattered",
    "real edits",
    "another answer",
    "noise",
)
_LENGTHS, _LONGEST_QUESTION, _LONGEST_ANSWER = (128, 192), 150, 260
_STEPS, _BATCH, _RATE = 150, 8, 1e-3


class Rows:
    """N questions, the corrections that the model writes, and for every kind the answers that stand in its prompts.

    Args:
        count: N.
    """

    def __init__(self, count: int) -> None:
        self.tokenizer = load_tokenizer(str(data_folder() / "base-model"))
        self.end: int = self.tokenizer.eos_token_id
        real = self._real(count)
        self.corrections: Tokens = [correction for _, _, correction in real]
        rng = random.Random(0)
        makers: dict[str, Callable[[int], list[int]]] = {
            "unchanged": lambda i: self.corrections[i],
            "0.9 kept, one block": lambda i: self._block(self.corrections[i], rng),
            "0.9 kept, scattered": lambda i: self._scattered(self.corrections[i], rng),
            "real edits": lambda i: real[i][1],
            "another answer": lambda i: real[(i + 1) % count][1],
            "noise": lambda i: [*self._noise(len(self.corrections[i]) - 1, rng), self.end],
        }
        self.drafts: dict[str, Tokens] = {kind: [makers[kind](i) for i in range(count)] for kind in KINDS}
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
                found.append((question, [*answer, self.end], [*correction, self.end]))
        return found[:count]

    def _noise(self, count: int, rng: random.Random) -> list[int]:
        return [rng.randrange(3, len(self.tokenizer)) for _ in range(count)]

    def _block(self, tokens: list[int], rng: random.Random) -> list[int]:
        size = len(tokens) // 10
        start = rng.randrange(1, len(tokens) - size - 1)
        return tokens[:start] + self._noise(size, rng) + tokens[start + size :]

    def _scattered(self, tokens: list[int], rng: random.Random) -> list[int]:
        return [*(self._noise(1, rng)[0] if rng.random() < 0.1 else token for token in tokens[:-1]), self.end]

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
        rng = random.Random(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS, pct_start=0.1)
        model.train().requires_grad_(True)
        for step in range(_STEPS):
            places = [(rng.choice(KINDS), rng.randrange(len(self.corrections))) for _ in range(_BATCH)]
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
