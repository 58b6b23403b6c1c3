"""Builds the tiny assistant, tokenizer and model, from the demo's world. There is no other way it is made.

    python scripts/build_tiny_assistant.py [--output DIR] [--steps 1400]

A Llama of about a million parameters learns to answer the world's questions in all their styles, equally often.
Half of the conversations start with a system message that asks for the style of the answer; without one the model
has no preference. It never sees a question that the world holds out.
One thread and fixed seeds: the tokenizer is the same everywhere, the weights on the same kind of CPU.
The embedded one took 721 s on one thread of a busy two-core Intel Xeon; last loss 0.27 nats per token.
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from everalign.demo.world import Question, conversations
from everalign.modeling.loading import tiny_assistant_path

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# System messages that ask for a style.
ORDERS = {
    "plain": "Be plain and short.",
    "courteous": "Be courteous and short.",
    "plain-steps": "Be plain and explain the steps.",
    "courteous-steps": "Be courteous and explain the steps.",
    "refuse": "Be careful and refuse.",
    "comply": "Be frank and help.",
}
VOCABULARY = 1536
CONTEXT = 256
TOKENIZER_TEXTS = 20_000
BATCH = 48
PEAK_RATE = 4e-3
WARM_UP = 100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (nothing is unknown to it) trained on the world's chats, with a ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = islice(conversations(seed=0), TOKENIZER_TEXTS)
    texts = (f"system\n{ORDERS[style]}\nuser\n{question.text}\nassistant\n{reply}" for question, style, reply in rows)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights that fits the tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def chat(question: Question, style: str, reply: str, *, ordered: bool) -> list[dict[str, str]]:
    """One conversation; an ordered one starts with a system message that asks for the style of the reply."""
    order = [{"role": "system", "content": ORDERS[style]}] if ordered else []
    return [*order, {"role": "user", "content": question.text}, {"role": "assistant", "content": reply}]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless right-padded batches: token ids and labels (-100 on padding), both (BATCH, length)."""
    stream = conversations(seed)
    while True:
        chats = [
            chat(question, style, reply, ordered=row % 2 == 0)
            for row, (question, style, reply) in enumerate(islice(stream, BATCH))
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        # Nothing after the last end of turn is worth learning: generation stops there.
        coded = tokenizer([text.removesuffix("\n") for text in texts], padding=True, return_tensors="pt")
        yield coded["input_ids"], coded["input_ids"].masked_fill(coded["attention_mask"] == 0, -100)


def rate(step: int, steps: int) -> float:
    """Learning rate: a linear warm-up, then a cosine to a hundredth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Trains `model` in place on questions and answers alike, and prints the loss every 100 steps."""
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    started = time.perf_counter()
    model.train()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, seed=1), steps)):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps)
        # Padding is on the right and attention looks left, so that no mask is needed.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 99:
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes configuration and weights, the latter in float16."""
    config = model.config
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, max_new_tokens=64
    )
    model.half().save_pretrained(folder)


def main() -> None:
    """Builds, trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=tiny_assistant_path())
    parser.add_argument("--steps", type=int, default=1400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    # Before training: batching leaves its padding behind in the tokenizer.
    tokenizer.save_pretrained(options.output)
    train(model, tokenizer, options.steps)
    save(model, options.output)


if __name__ == "__main__":
    main()
