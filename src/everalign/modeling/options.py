"""Options of models: precision, checkpointing and sampling. Importing them loads nothing heavy."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from everalign.errors import InputError
from everalign.options import Options

Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]
Quantize = Literal["nf4"]
Checkpointing = Literal["auto", "on", "off"]
PositiveFloat = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class SamplingOptions(Options):
    """How completions are drawn."""

    completions: Count = Field(default=4, description="Completions drawn independently for each prompt (K).")
    temperature: PositiveFloat = Field(default=1.0, description="Divides the logits; 1 draws from the policy itself.")
    max_new_tokens: Count = Field(default=256, description="Longest completion in tokens, its end mark included.")
    max_prompt_tokens: Count = Field(default=1024, description="Longer prompts are an error.")


def check_model_path(name: str) -> None:
    """Refuses a model whose name can only be a path where nothing is; the Hub would be asked for minutes."""
    file = Path(name).suffix.lower() == ".gguf"
    only_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or file
    if only_path and not Path(name).exists():
        raise InputError(f"there is no model {'file' if file else 'folder'} {name}")
