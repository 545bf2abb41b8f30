"""Files of records: read with line numbers, merged without losing or averaging anything, safe under two writers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from pathlib import Path

from espalier.errors import EspalierError
from espalier.files import lock_at, lock_of, read_regular, target_of, write_bytes
from espalier.study.record import Record, contradiction, record_from_line

_WAIT_SECONDS = 60.0

# Note [Merging]
# Records with the same key are the same trial. If they agree, one stays: the one with the most extra figures, then the
# oldest, then the first in the order of its text: an order that does not depend on which file was read first. It says
# what data the trial had if any of them does, or a third record of other data would find nothing to contradict. If they
# do not agree (two processors may round a chaotic training apart, or the code has changed), neither is right by itself,
# so nothing is written and the user decides.


def read_records(path: Path | str) -> list[Record]:
    """Read a file of records.

    Raises:
        EspalierError: it is no file or cannot be read, or holds lines that are no records; the message names the first
            of them.
    """
    path = Path(path)
    try:
        text = read_regular(path).decode("utf-8-sig")  # some editors put a mark of three bytes in front
    except (OSError, UnicodeDecodeError) as error:
        # The system's words hold the name a second time.
        reason = error.strerror if isinstance(error, OSError) else error
        raise EspalierError(f"records {path} cannot be read ({reason}): name a file of records") from error
    records, wrong = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(record_from_line(line))
            except ValueError as error:
                wrong.append(f"line {number} is no record: {error}")
    if wrong:
        more = f", and {len(wrong) - 1} more such lines" if len(wrong) > 1 else ""
        raise EspalierError(f"{path}: {wrong[0]}{more}; delete it and run its trial again")
    return records


def combine(records: Iterable[Record], key: Callable[[Record], Hashable] = lambda record: record.key) -> list[Record]:
    """Return one record a trial, in a fixed order: idempotent and independent of the order (Note [Merging]).

    Args:
        records: of any number of trials.
        key: what makes records those of one trial.

    Raises:
        EspalierError: records of one trial contradict each other; all of them are listed.
    """
    groups: dict[Hashable, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    conflicts = [
        f"{' and '.join(sorted({record.study for record in group}))}: {group[0].arm} lr={group[0].lr:g} "
        f"seed={group[0].seed}: {found}"
        for group in groups.values()
        if (found := contradiction(group)) is not None
    ]
    if conflicts:
        raise EspalierError(
            f"{len(conflicts)} trials have records that contradict each other: {'; '.join(sorted(conflicts))}: delete "
            "the line, or the run folder, of each that is not to stand (they may come from different versions or "
            "processors)"
        )
    kept = [
        replace(
            min(group, key=lambda record: (-len(record.extra), record.date, record.line())),
            data=max(record.data for record in group),
        )
        for group in groups.values()
    ]
    return sorted(kept, key=lambda record: (record.study, record.arm, record.lr, record.seed, record.digest))


def by_trial(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """Return records by arm and digest, whatever study they name.

    Raises:
        EspalierError: records of one trial contradict each other.
    """
    kept = combine(records, lambda record: (record.arm, record.digest))
    return {(record.arm, record.digest): record for record in kept}


def add_records(records: Iterable[Record], to: Path | str) -> list[Record]:
    """Add records to a file and return all that it holds then; it is replaced as a whole, under a lock beside it.

    Raises:
        EspalierError: ``to`` is a folder, a pipe or a device, the file holds lines that are no records, records
            contradict each other (then nothing is written), or another process holds the lock for a minute.
    """
    from filelock import Timeout

    to = Path(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    target_of(to)  # which refuses pipes and devices before there is a lock beside them
    try:
        with lock_at(lock_of(to), _WAIT_SECONDS):  # left there: whoever waits for it must find the same file
            before = read_regular(to) if to.exists() else None
            combined = combine([*(read_records(to) if before is not None else ()), *records])
            content = "".join(record.line() for record in combined).encode()
            if content != before:
                write_bytes(to, content)
    except Timeout:
        raise EspalierError(f"records {to} are locked by another process: try again when it has ended") from None
    return combined
