"""Outputs of work on whole datasets: JSON Lines or Parquet, local or at a URL, whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everalign.errors import EveralignError, InputError
from everalign.storage import is_url, json_line, new_file, open_url, url_filesystem

SUFFIXES = (".jsonl", ".parquet")
Columns = Mapping[str, str]
"""The output's columns: `text`, `texts`, `number`, `numbers` or `boolean`."""

Write = Callable[[Sequence[Mapping[str, Any]]], None]
_BLOCK = 1 << 20


@dataclass(frozen=True)
class OutputFile:
    """A file to be written.

    Args:
        name: a path, or a URL that fsspec opens; ends in .jsonl or .parquet.
    """

    name: str

    def __post_init__(self) -> None:
        if not self.name.endswith(SUFFIXES):
            raise InputError(f"{self.name}: the output's name must end in {' or '.join(SUFFIXES)}", where=self.name)

    @property
    def is_parquet(self) -> bool:
        """Whether it is a Parquet file."""
        return self.name.endswith(".parquet")

    @property
    def local(self) -> Path:
        """The file, or for one at a URL a name in the working directory: locks and journals stand beside it."""
        if not is_url(self.name):
            return Path(self.name)
        return Path(f"{hashlib.sha256(self.name.encode()).hexdigest()[:8]}-{self.name.rpartition('/')[2]}")

    def exists(self) -> bool:
        """Whether there is something of that name."""
        if not is_url(self.name):
            return Path(self.name).exists()
        filesystem, path = url_filesystem(self.name)
        return bool(filesystem.exists(path))

    def check_new(self, overwrite: bool) -> None:
        """Raises an InputError if the file exists and may not be replaced."""
        is_folder = not is_url(self.name) and Path(self.name).is_dir()
        if is_folder or (not overwrite and self.exists()):
            raise InputError(
                f"{self.name} exists: choose another output, or ask for --overwrite to replace a file", where=self.name
            )

    @contextmanager
    def writer(self, columns: Columns) -> Iterator[Write]:
        """Context manager that gives a function which appends rows; the file is there once the block has ended well."""
        with self.replaced() as path:
            if self.is_parquet:
                rows = ParquetRows(path, columns)
                with rows.file:
                    yield rows.write
                return
            with path.open("w", encoding="utf-8") as file:
                yield lambda rows: file.writelines(map(json_line, rows))

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Context manager that gives a local file, which takes this one's place once the block has ended well.

        A store of objects shows the new object when all of it is there; other remote file systems may show a part.
        """
        if not is_url(self.name):
            with new_file(Path(self.name)) as path:
                yield path
            return
        filesystem, name = url_filesystem(self.name)
        path = self.local.with_name(f"{self.local.name}.upload.partial")
        try:
            yield path
            try:
                filesystem.put_file(str(path), name)
            except OSError as error:
                raise EveralignError(f"{self.name}: cannot be written: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the file."""
        if is_url(self.name):
            filesystem, path = url_filesystem(self.name)
            filesystem.rm_file(path)
        else:
            Path(self.name).unlink()


class ParquetRows:
    """Writes rows as row groups of its `file`, which its user closes.

    Args:
        path: the file.
        columns: what it holds. What is no text in a column of texts, such as a prompt of messages, becomes JSON text,
            which our readers understand.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "number": pa.float64(),
            "numbers": pa.list_(pa.float64()),
            "boolean": pa.bool_(),
        }
        self._columns = columns
        self._schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
        self.file = pq.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows as one row group."""
        import pyarrow as pa

        # A cell that is missing here becomes null.
        cells = [
            {name: self._cell(name, row[name]) for name in self._columns if row.get(name) is not None} for row in rows
        ]
        self.file.write_table(pa.Table.from_pylist(cells, self._schema))

    def _cell(self, name: str, value: Any) -> Any:
        kind = self._columns[name]
        if kind == "text" and not isinstance(value, str):
            return json_line(value).rstrip("\n")
        if kind == "texts" and not all(isinstance(item, str) for item in value):
            raise InputError(
                f"{name}: a Parquet output holds answers of plain text; name an output that ends in .jsonl", field=name
            )
        return value


def join_files(
    parts: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], overwrite: bool = False
) -> None:
    """Writes the rows of several files one after the other as one file, whole or not at all.

    Args:
        parts: files of one kind, such as those of `--shard 1/3`, `2/3` and `3/3`, in this order; paths or URLs.
        output: the file, of the same kind.
        overwrite: replace `output` if it exists.

    Raises:
        InputError: a part is missing, or of another kind.
    """
    whole, files = OutputFile(str(output)), [OutputFile(str(part)) for part in parts]
    whole.check_new(overwrite)
    for file in files:
        if file.is_parquet != whole.is_parquet:
            raise InputError(f"{file.name}: cannot be joined to {whole.name}, which is of another kind")
        if not file.exists():
            raise InputError(f"{file.name}: no such file; finish this part first", where=file.name)
    with whole.replaced() as path:
        if whole.is_parquet:
            _join_parquet(files, path)
            return
        with path.open("wb") as joined:
            for file in files:
                with open_url(file.name) if is_url(file.name) else Path(file.name).open("rb") as part:
                    shutil.copyfileobj(part, joined, _BLOCK)


def _join_parquet(files: Sequence[OutputFile], path: Path) -> None:
    import pyarrow.parquet as pq

    writer = None
    for file in files:
        with (
            open_url(file.name) if is_url(file.name) else Path(file.name).open("rb") as stream,
            pq.ParquetFile(stream) as part,
        ):
            writer = writer or pq.ParquetWriter(path, part.schema_arrow)
            for group in range(part.num_row_groups):
                writer.write_table(part.read_row_group(group))
    if writer is not None:
        writer.close()
