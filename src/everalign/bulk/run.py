"""Work on whole datasets in bounded memory, in this process or on Ray.

    make_work = partial(ScoringWork, RewardModel.from_folder("runs/reward"))
    run_bulk(RowStream("answers.jsonl", unscored_reader(False)), make_work, "scored.jsonl", ScoringWork.words)

All rows are checked before the first is computed. Results are journalled batch by batch beside the output, in a file
named after everything they depend on; after a kill the same call goes on from there. The output has the order of the
input, each row once, and appears when it is complete.
"""

from collections.abc import Callable

from everalign.bulk.files import OutputFile
from everalign.bulk.job import Finished, Log, Progress, Words, Work, run_stream
from everalign.bulk.on_ray import run_on_ray
from everalign.bulk.options import BulkOptions
from everalign.data.streams import CheckedStream, RowStream
from everalign.errors import EveralignError
from everalign.storage import exclusive, lock_of


def run_bulk(
    stream: RowStream,
    make_work: Callable[[], Work],
    output: str,
    words: Words,
    *,
    options: BulkOptions | None = None,
    overwrite: bool = False,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
    found: Callable[[CheckedStream], None] = lambda _: None,
) -> Finished:
    """Checks all rows, computes what an earlier run has not, and writes the output.

    Args:
        stream: the rows.
        make_work: called once the rows are found to be good; loads models. With Ray each worker calls it.
        output: path or URL of the output; its parts get names of their own.
        words: what the work is called.
        options: how; the defaults when None.
        overwrite: replace the output if it exists.
        log: called with one line for each event.
        progress: called with (words.doing, rows done, rows in all, `rows` and how many are computed in a second).
        found: called with what the check of the input found.

    Raises:
        InputError: a row is bad, there are none, the output cannot be used, or another process writes it.
        EveralignError: the work failed; what was computed before is kept.
    """
    options, target = options or BulkOptions(), OutputFile(output)
    number, count = options.shard_numbers
    if count > 1:
        target = target.numbered(number, count)
        stream = stream.parts(count)[number - 1]
    with exclusive(lock_of(target.local)):
        target.check_new(overwrite)
        if options.engine == "ray":
            return run_on_ray(stream, make_work, target, words, options, log, progress, found)
        checked = stream.check(lambda rows: log(f"  {rows:,} rows checked") if rows % 1_000_000 == 0 else None)
        found(checked)
        stream.require_rows(checked)
        log(f"{checked.rows} rows to {words.do}")
        work = make_work()
        try:
            return run_stream(stream, checked, work, target, words, options.window, log, progress)
        except EveralignError as error:
            if count == 1:
                raise
            raise type(error)(f"shard {number}/{count}: {error}") from error
