"""Write every generated page and picture of docs/results from the records; ``make results`` runs it.

    python experiments/results.py [--collect runs/queue] [--check]

``--collect`` first adds the records of a queue to the committed ones; ``--check`` writes nothing and fails if a page is
not what it would write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from espalier.errors import EspalierError
from espalier.study import add_records, read_records
from experiments.evidence import Results
from experiments.gpu_page import gpu_page
from experiments.long_run_page import long_run_page
from experiments.measured import measured_page, read
from experiments.pages import PAGES, index_text, page_text
from experiments.scheduler import COMMITTED, known_records
from experiments.speed import speed_page
from experiments.trained_filters import filter_picture


def collect(out: Path, committed: Path = COMMITTED) -> int:
    """Add the records of a queue's folder to the committed ones, a file for each study; return how many there are.

    Raises:
        EspalierError: a line that is no record, or records that contradict each other.
    """
    files = sorted((out / "records").glob("*.jsonl"))
    if not files:
        raise EspalierError(f"collect {out}: there is no file of records in {out / 'records'}")
    return sum(len(add_records(read_records(file), committed / file.name)) for file in files)


def generated(committed: Path = COMMITTED) -> Mapping[Path, str]:
    """Return every generated file by its path below docs/results."""
    results = Results(known_records([committed]))
    files = {
        Path("index.md"): index_text(results),
        Path("gpu.md"): gpu_page(),
        Path("long-run.md"): long_run_page(),
        Path("measured.md"): measured_page(),
        Path("speed.md"): speed_page(),
    }
    if found := read("trained-filters"):
        files[Path("pictures") / "trained-filters.svg"] = filter_picture(found["maps"])
    for page in PAGES:
        text, pictures = page_text(page, results)
        files[Path(page.file)] = text
        files |= {Path("pictures") / name: picture for name, picture in pictures.items()}
    return files


def differences(files: Mapping[Path, str], folder: Path) -> Sequence[str]:
    """Return the names of files that are missing, differ, or are pictures that nobody writes any more."""
    wrong = [
        str(path)
        for path, text in files.items()
        if not (folder / path).is_file() or (folder / path).read_text(encoding="utf-8") != text
    ]
    left = (path.relative_to(folder) for path in (folder / "pictures").glob("*.svg"))
    return sorted([*wrong, *(str(path) for path in left if path not in files)])


def write(files: Mapping[Path, str], folder: Path) -> None:
    """Write the files, and delete pictures that nobody writes any more."""
    for path in (folder / "pictures").glob("*.svg"):
        if path.relative_to(folder) not in files:
            path.unlink()
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    """Read the command line and write, or check."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/results from the records.")
    parser.add_argument("--collect", type=Path, metavar="OUT", help="add the records of this queue's folder first")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not what it would be")
    arguments = parser.parse_args()
    folder = COMMITTED.parent
    try:
        if arguments.collect is not None:
            print(f"{collect(arguments.collect)} records in {len(list(COMMITTED.glob('*.jsonl')))} files")
        files = generated()
    except EspalierError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        wrong = differences(files, folder)
        print(f"run make results for {', '.join(wrong)}" if wrong else f"{len(files)} files are what they should be")
        return 1 if wrong else 0
    write(files, folder)
    print(f"wrote {len(files)} files to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
