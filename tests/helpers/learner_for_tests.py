"""A random small Llama, three small tasks and a learner over them: what a real run has, in about a second."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from everalign import AdapterOptions, Learner, TrainingOptions
from everalign.data import PreferenceSet
from tokenizers_for_tests import byte_tokenizer

# Tensors this small only lose by threads, and tests run beside each other.
torch.set_num_threads(1)

FAST = {"learning_rate": 2e-2, "batch_size": 4, "tokens_per_batch": 240, "max_length": 64, "warmup": 0.0}
ANSWERS = {"warm": ("yes, gladly!", "no."), "brief": ("ok", "well, let me see"), "calm": ("all is well", "panic now")}


def save_model(folder: Path, seed: int = 0, layers: int = 1) -> Path:
    """A Llama with random weights and a tokenizer of one token a byte; one layer learns in half the time of two."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_answering_model(folder: Path, layers: int = 2) -> Path:
    """One that ends its answers soon: a random one hardly ever does."""
    save_model(folder, layers=layers)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    network.config.tie_word_embeddings = False
    head = torch.nn.Linear(32, len(tokenizer), bias=False)
    torch.manual_seed(1)
    torch.nn.init.normal_(head.weight, std=0.02)
    with torch.no_grad():
        # A direction that all hidden states share, by way of the final norm's constant part.
        states = network.model(torch.randint(97, 122, (8, 16))).last_hidden_state.reshape(-1, 32)
        head.weight[tokenizer.eos_token_id] = 2.2 * torch.linalg.lstsq(states, torch.ones(len(states))).solution
    network.lm_head = head
    network.save_pretrained(folder)
    return folder


def task_rows(name: str, count: int = 10, start: int = 0) -> PreferenceSet:
    """Rows of a task, from number `start` on: test rows start where training rows end."""
    chosen, rejected = ANSWERS[name]
    rows = [{"prompt": f"q{i}?", "chosen": f"{chosen} {i}", "rejected": rejected} for i in range(start, start + count)]
    return PreferenceSet.of(rows, source=f"{name}.jsonl")


def swapped(name: str, count: int = 20) -> PreferenceSet:
    """The task's rows with the preferences exchanged: what they teach undoes the task."""
    rows = [{**row.to_json(), "chosen": row.rejected, "rejected": row.chosen} for row in task_rows(name, count)]
    return PreferenceSet.of(rows, source="poison.jsonl")


def held_out(name: str, count: int = 5) -> PreferenceSet:
    return task_rows(name, count, start=100)


def tasks(*names: str):
    """(name, rows, test) of the tasks, as `learn_all` takes them."""
    return [(name, task_rows(name), held_out(name)) for name in names or ANSWERS]


def make_learner(model: Path, output: Path, method=None, objective="dpo", *, lines=None, options=None, **arguments):
    """A learner with the tests' options; what it announces goes to the list `lines`."""
    arguments.setdefault("training", TrainingOptions(**{**FAST, **(options or {})}))
    small = AdapterOptions(rank=4, alpha=8.0, targets="q_proj,v_proj")
    arguments.setdefault("adapter", None if getattr(method, "prompts", None) is not None else small)
    say = (lambda _: None) if lines is None else lines.append
    return Learner(str(model), method, objective, output, log=say, **arguments)


def adapter_weights(output: Path, index: int = -1):
    """The tensors of a version's adapter, or of its prompts: by default of the newest."""
    (file,) = (sorted((output / "versions").iterdir())[index] / "adapter").glob("*.safetensors")
    return load_file(file)


def same_weights(first, second) -> bool:
    """Whether two adapters hold the same tensors bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
