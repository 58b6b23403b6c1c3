"""TRL's GRPO beside VAR: the same start, adapter, questions and reward, whatever the model."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from everalign.data.messages import Prompt
from everalign.modeling.policy import Policy
from var_contenders import ALPHA, RANK, Clock, Spent


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
    model: Any,
    policy: Policy,
    tokenizer: Any,
    asked: Sequence[Prompt],
    worth: Callable[[list[Prompt], list[str]], list[float]],
    seed: int,
    look: Callable[[Policy, Spent], None],
    *,
    learning_rate: float,
    steps: int,
    every: int,
    batch: int,
    count: int,
    longest: int,
    leave_out_unfinished: bool = False,
) -> None:
    """Train with GRPO; `look` is called every so many steps, outside the time that counts.

    Args:
        model: the base model, as TRL takes it.
        policy: of the same base model; holds TRL's adapter whenever `look` is called.
        tokenizer: the model's.
        asked: the questions, as chats.
        worth: gives the rewards of answers to questions.
        seed: seeds TRL.
        look: measures the policy.
        learning_rate: peak, falling linearly to 0, as TRL's default does.
        steps: optimiser steps.
        every: steps between two looks.
        batch: answers of a step.
        count: answers to each question.
        longest: tokens of an answer.
        leave_out_unfinished: whether answers that did not end are left out of the loss.
    """
    from trl import GRPOConfig, GRPOTrainer

    spent = Spent()

    def rewards(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        # Tokens of questions are counted by TRL itself: answers are what is generated.
        spent.tokens += sum(map(len, completion_ids))
        return worth(prompts, [completion[0]["content"] for completion in completions])

    def hand_over(trained: Any, so_far: Spent) -> None:
        copy_adapter(trained, policy)
        look(policy, so_far)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                learning_rate=learning_rate,
                max_steps=steps,
                per_device_train_batch_size=batch,
                num_generations=count,
                max_completion_length=longest,
                mask_truncated_completions=leave_out_unfinished,
                gradient_checkpointing=False,
                logging_steps=steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=Dataset.from_list([{"prompt": list(chat)} for chat in asked]),
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
