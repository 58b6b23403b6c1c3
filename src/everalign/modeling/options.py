"""Options of models: precision, checkpointing and sampling. Importing them loads nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field

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
