"""Readers of files that come from elsewhere, as functions of bytes: each may refuse with one line, and nothing else.

``pip install atheris && PYTHONPATH=src:tests python tests/fuzz/readers.py TARGET -max_total_time=600`` looks for inputs
that break one with libFuzzer's coverage; ``test_readers.py`` does so for seconds with hypothesis.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from espalier.data.folder import read_folder
from espalier.data.idx import parse_idx
from espalier.data.text import TextSource, read_text
from espalier.errors import EspalierError
from espalier.files import read_tensors
from espalier.init import FilterStatistics
from espalier.recipes import Recipe
from espalier.recipes.validation import load_recipe, recipe_to_dict
from espalier.study.record import Record
from espalier.study.records import read_records
from espalier.train.manifest import damaged, file_digest, write_manifest
from espalier.train.run import parse_rows

Target = Callable[[bytes, Path], object]


def _written(name: str, read: Callable[[Path], object]) -> Target:
    def target(content: bytes, folder: Path) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return target


def _images(content: bytes, folder: Path) -> object:
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    return read_folder(folder / "images", size=4, test_share=0.5)


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (5, 6), (10, 200, 30)).save(buffer, "png")
    return buffer.getvalue()


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.zeros(2, 3)}}, buffer)
    return buffer.getvalue()


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "file").write_bytes(b"content")
        write_manifest(Path(name), {"file": [file_digest(Path(name) / "file")]}, {"data": None})
        return (Path(name) / "manifest.json").read_bytes()


_RECORD = Record("study", "arm", 1e-3, 0, "ab12", "test/accuracy", 0.5, False, 1, 2, 3.0, 0.1, ((0, 0, 0.0, 0.1),))
_TEXT = "ein Märchen aus alten Zeiten ".encode() * 4
_ROWS = b'{"epoch": 0}\n{"epoch": 1, "loss": 1.5}\n'
_IDX = bytes([0, 0, 8, 2]) + struct.pack(">2I", 2, 3) + bytes(6)

TARGETS: dict[str, tuple[Target, bytes]] = {
    # The inner bytes, packed here: a fuzzer would spend its time on the checksum.
    "idx": (lambda content, folder: parse_idx(gzip.compress(content, 1), folder / "images.gz"), _IDX),
    "gzip": (lambda content, folder: parse_idx(content, folder / "images.gz"), gzip.compress(_IDX)),
    "safetensors": (_written("w.safetensors", read_tensors), save({"weight": torch.zeros(2, 3)}, {"format": "pt"})),
    "torch": (_written("w.pt", read_tensors), _torch_file()),
    "statistics": (_written("s.safetensors", FilterStatistics.load), save({"layer": torch.eye(9)}, {"layers": "[]"})),
    "images": (_images, _png()),
    "text": (
        _written("t.txt", lambda path: TextSource(read_text(path), 4)),
        "ein Märchen aus alten Zeiten ".encode() * 4,
    ),
    "records": (_written("r.jsonl", read_records), _RECORD.line().encode()),
    "recipe": (_written("recipe.json", load_recipe), json.dumps(recipe_to_dict(Recipe("r"))).encode()),
    "rows": (
        lambda content, folder: parse_rows(content, folder / "metrics.jsonl"),
        b'{"epoch": 0}\n{"epoch": 1, "loss": 1.5}\n',
    ),
    "manifest": (_written("manifest.json", lambda path: damaged(path.parent)), _manifest()),
}


def survives(name: str, content: bytes, folder: Path) -> None:
    """Give a reader some bytes: it returns, or refuses in one line that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of images that claim to be huge
            TARGETS[name][0](content, folder)
    except EspalierError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error


def main() -> None:
    import atheris

    target = sys.argv.pop(1)
    folder = Path(tempfile.mkdtemp())

    def one_input(content: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        survives(target, content, folder)

    atheris.instrument_all()
    corpus = Path(tempfile.mkdtemp())
    (corpus / "sample").write_bytes(TARGETS[target][1])
    atheris.Setup([*sys.argv, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
