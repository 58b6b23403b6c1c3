"""Options of work on whole datasets."""

import re
from typing import Literal

from pydantic import Field, model_validator

from everalign.errors import InputError
from everalign.options import Options

WINDOW = 4096
_SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")


class BulkOptions(Options, title="Whole datasets"):
    """How a dataset is worked through."""

    window: int = Field(
        default=WINDOW,
        ge=1,
        title="ROWS",
        description="Rows in memory at a time, batched by length.\nMore of them pad less. They change no result.",
    )
    shard: str | None = Field(
        default=None,
        title="I/N",
        description="Do the I-th of N contiguous parts of the rows, such as 3/8.\nEach part has an output of its own, "
        "named after it; see `join_files`.",
    )
    engine: Literal["local", "ray"] = Field(
        default="local", description="What computes: this process, or the workers of a Ray cluster."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Ray workers, each with a model; by default one for each GPU, or two."
    )
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="GPUs of a Ray worker; by default one where the cluster has any."
    )
    partitions: int | None = Field(
        default=None,
        ge=1,
        description="Parts of the rows for Ray workers to take by turns; by default one for every 8 MiB, at least 16.\n"
        "A finished part is kept when the rest is interrupted.",
    )

    @model_validator(mode="after")
    def _check(self) -> "BulkOptions":
        if self.shard is not None:
            number, count = self.shard_numbers
            if number > count:
                raise InputError(f"shard: {number} of {count} parts: the first number is at most the second")
        if self.engine == "ray" and self.shard is not None:
            raise InputError("shard: Ray shares the rows between its workers itself: leave it out, or --engine ray")
        for name in ("workers", "gpus_per_worker", "partitions"):
            if self.engine != "ray" and getattr(self, name) is not None:
                raise InputError(f"{name.replace('_', '-')}: is for --engine ray; leave it out", field=name)
        return self

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """The part's number from 1, and how many parts there are; (1, 1) without parts."""
        if self.shard is None:
            return 1, 1
        found = _SHARD.fullmatch(self.shard)
        if not found:
            raise InputError(f"shard: must be I/N, such as 3/8, found {self.shard!r}", field="shard")
        return int(found[1]), int(found[2])
