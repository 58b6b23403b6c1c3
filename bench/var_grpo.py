"""TRL's GRPO on the task of the VAR bench: the same assistant, adapter, questions and reward."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from everalign.demo.world import Question
from everalign.modeling.loading import load_model
from everalign.modeling.policy import Policy
from var_contenders import ALPHA, RANK, Clock, Spent, start
from var_task import LONGEST_ANSWER, prompt, reward


class _Look(TrainerCallback):
    """Stops the clock every so many steps and hands the policy over."""

    def __init__(self, every: int, spent: Spent, look: Callable[[Any, Spent], None]) -> None:
        self._every, self._spent, self._look, self._clock = every, spent, look, Clock(spent)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._clock.__exit__()
            self._look(kwargs["model"], self._spent)
            self._clock.__enter__()


def learn_grpo(
    tokenizer: Any,
    asked: Sequence[Question],
    seed: int,
    look: Callable[[Policy, Spent], None],
    *,
    learning_rate: float,
    steps: int,
    every: int,
    batch: int,
    count: int,
) -> None:
    """Train with GRPO; `look` is called every so many steps, outside the time that counts.

    Args:
        tokenizer: the assistant's.
        asked: the questions.
        seed: seeds TRL.
        look: measures a policy that holds TRL's adapter.
        learning_rate: peak, falling linearly to 0, as TRL's default does.
        steps: optimiser steps.
        every: steps between two looks.
        batch: answers of a step.
        count: answers to each question.
    """
    from trl import GRPOConfig, GRPOTrainer

    by_text, spent, ours = {question.text: question for question in asked}, Spent(), start()

    def worth(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        # Tokens of both are counted by TRL itself: answers are what is generated.
        spent.tokens += sum(len(tokenizer(c[0]["content"])["input_ids"]) + 1 for c in completions)
        return [reward(by_text[p[-1]["content"]], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]

    def hand_over(model: Any, so_far: Spent) -> None:
        copy_adapter(model, ours)
        look(ours, so_far)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=load_model("tiny", "fp32"),
            reward_funcs=worth,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                learning_rate=learning_rate,
                max_steps=steps,
                per_device_train_batch_size=batch,
                num_generations=count,
                max_completion_length=LONGEST_ANSWER,
                gradient_checkpointing=False,
                logging_steps=steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=Dataset.from_list([{"prompt": list(prompt(question))} for question in asked]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[_Look(every, spent, hand_over)],
        )
        trainer.train()


def copy_adapter(model: Any, policy: Policy) -> None:
    """Write the adapter that TRL trains into a policy of ours."""
    own = dict(policy.peft.named_parameters())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "lora_" in name:
                own[name.replace(".default.", ".stm.")].copy_(value)
