"""Readers of files that come from elsewhere, as functions of bytes: each may refuse with one line, and nothing else.

    python experiments/readers.py [READER …] --seconds 60         (each; damaged samples, without instrumentation)
    pip install atheris && python experiments/readers.py [READER …] --seconds 60        (libFuzzer with coverage)

``tests/fuzz/test_readers.py`` does so for seconds with hypothesis.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from espalier.certify import Certificate
from espalier.certify.attack_report import AttackReport
from espalier.checkpoints.loading import open_checkpoint
from espalier.cli.commands import _read_fit
from espalier.data.folder import read_folder
from espalier.data.generated import read_generated
from espalier.data.labelled import LabelledImages
from espalier.data.layout import list_folder
from espalier.data.published import parse_idx, read_cifar10
from espalier.data.shards import list_shards
from espalier.data.text import TextSource, read_text
from espalier.doctor import diagnose
from espalier.errors import EspalierError
from espalier.files import read_tensors
from espalier.init import FilterStatistics, audit, fit
from espalier.models import VisionTransformer
from espalier.recipes import Recipe
from espalier.recipes.files import open_recipe
from espalier.recipes.validation import load_recipe, recipe_to_dict
from espalier.study import load_study, plan_study
from espalier.study.record import Record
from espalier.study.records import read_records
from espalier.study.trial import save_study
from espalier.train.image_input import ImageInput
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


def _folders(content: bytes, folder: Path) -> object:
    """Lay a folder out as the lines of the content say: each is the path of a file."""
    root = folder / "images"
    for line in content.split(b"\n")[:40]:
        parts = [part[:60].replace(b"\0", b"") for part in line.split(b"/")[:5]]
        path = root.joinpath(*(os.fsdecode(part) for part in parts if part.strip(b".")))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:  # a file where this line has a folder
            continue
    return list_folder(root)


def _published(content: bytes, folder: Path) -> object:
    """CIFAR's pickles hold no bytes that may run: what is not the published file is not unpickled."""
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(content)
    return read_cifar10(folder)


def _checkpoint(path: Path) -> object:
    net = open_checkpoint(path, 2)
    return str(audit(net)), str(fit(net)), str(diagnose(path))


def _beside(name: str, read: Callable[[Path], object]) -> Target:
    """Return a target that writes its content beside a checkpoint of one block, and reads the checkpoint."""

    def target(content: bytes, folder: Path) -> object:
        (folder / "w.safetensors").write_bytes(_WEIGHTS)
        (folder / name).write_bytes(content)
        return read(folder / ("w.safetensors" if name != "w.safetensors.index.json" else name))

    return target


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (5, 6), (10, 200, 30)).save(buffer, "png")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(10):
            for ending, content in (("png", _png()), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, image=np.zeros((2, 4, 4, 3), np.uint8), label=np.array([0, 1]))
    return buffer.getvalue()


def _generated(path: Path) -> object:
    real = LabelledImages(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    return read_generated({"generated": str(path), "generated_share": 0.5}, real, 2)


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.zeros(2, 3)}}, buffer)
    return buffer.getvalue()


_VIT = {"embed_dim": 12, "depth": 1, "num_heads": 3, "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 2}
_STATED = json.dumps({"name": "vit", "args": _VIT})


def _vit() -> bytes:
    with torch.random.fork_rng():
        model = VisionTransformer(**_VIT)
    model.init_weights(torch.Generator().manual_seed(0))
    return save(model.state_dict(), {"espalier": _STATED})


def _saved(name: str, write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _manifest(path: Path) -> None:
    (path.parent / "file").write_bytes(b"content")
    write_manifest(path.parent, {"file": [file_digest(path.parent / "file")]}, {"data": None})


def _study(path: Path) -> None:
    save_study(plan_study(Recipe("r"), ["default", "structured"], [1e-3], [0], path.parent))


def _unsealed(content: bytes) -> bytes:
    """Return a file as the oldest versions wrote it: without its digest, which would refuse whatever is changed."""
    values = json.loads(content)
    del values["digest"]
    return json.dumps(values).encode()


_RECORD = Record("study", "arm", 1e-3, 0, "ab12", "test/accuracy", 0.5, False, 1, 2, 3.0, 0.1, ((0, 0, 0.0, 0.1),))
_CERTIFICATE = Certificate(
    (0.5, 0.0), (1, 0), (1, 1), 1.0, True, 1e-6, ("none",), "float64", (("0: Linear", 1.0, 0.0),)
)
_ATTACK = AttackReport((0.1,), (0.5,), (0.5,), 0.5, 1, (), (0.7, None), 0.9, ("PGD",))
_WEIGHTS = _vit()
_IDX = bytes([0, 0, 8, 2]) + struct.pack(">2I", 2, 3) + bytes(6)
_INPUT = {"class_names": ["a", "b"], "channels": 1, "height": 8, "width": 8, "mean": [0.3], "std": [0.4]}


def _index() -> bytes:
    return json.dumps({"weight_map": dict.fromkeys(load(_WEIGHTS), "w.safetensors")}).encode()


TARGETS: dict[str, tuple[Target, bytes]] = {
    # The inner bytes, packed here: a fuzzer would spend its time on the checksum.
    "idx": (lambda content, folder: parse_idx(gzip.compress(content, 1), folder / "images.gz"), _IDX),
    "gzip": (lambda content, folder: parse_idx(content, folder / "images.gz"), gzip.compress(_IDX)),
    "cifar": (_published, b"\x80\x04}\x94."),
    "safetensors": (_written("w.safetensors", read_tensors), save({"weight": torch.zeros(2, 3)}, {"format": "pt"})),
    "torch": (_written("w.pt", read_tensors), _torch_file()),
    "checkpoint": (_written("w.safetensors", _checkpoint), _WEIGHTS),
    "config": (_beside("config.json", _checkpoint), b'{"num_attention_heads": 2, "tie_word_embeddings": true}'),
    "model": (_beside("model.json", _checkpoint), _STATED.encode()),
    "index": (_beside("w.safetensors.index.json", diagnose), _index()),
    "statistics": (_written("s.safetensors", FilterStatistics.load), save({"layer": torch.eye(9)}, {"layers": "[]"})),
    "images": (_images, _png()),
    "folders": (_folders, b"train/a/1.png\ntrain/b/2.png\nval/a/3.png\nval/b/4.png\nval/b/.5.png"),
    "shards": (_written("0.tar", list_shards), _tar()),
    "generated": (_written("g.npz", _generated), _archive()),
    "text": (
        _written("t.txt", lambda path: TextSource(read_text(path), 4)),
        "ein Märchen aus alten Zeiten ".encode() * 4,
    ),
    "records": (_written("r.jsonl", read_records), _RECORD.line().encode()),
    "recipe": (_written("recipe.json", load_recipe), json.dumps(recipe_to_dict(Recipe("r"))).encode()),
    "yaml": (_written("r.yaml", lambda path: open_recipe(str(path))), b"base: digits_vit\nbetas: [0.9, 0.9]\nlr: 1e-3"),
    "rows": (
        lambda content, folder: parse_rows(content, folder / "metrics.jsonl"),
        b'{"epoch": 0, "step": 0, "seconds": 0.0}\n{"epoch": 1, "step": 2, "seconds": 0.5, "loss": 1.5}\n',
    ),
    "manifest": (_written("manifest.json", lambda path: damaged(path.parent)), _saved("manifest.json", _manifest)),
    "study": (
        _written("study.json", lambda path: [str(trial) for trial in load_study(path.parent).trials()]),
        _unsealed(_saved("study.json", _study)),
    ),
    "certificate": (
        _written("c.json", lambda path: (str(c := Certificate.load(path)), c.slack_table())),
        _unsealed(_saved("c.json", _CERTIFICATE.save)),
    ),
    "attack": (_written("a.json", AttackReport.load), _unsealed(_saved("a.json", _ATTACK.save))),
    "fit": (
        _written("fit.json", lambda path: (found := _read_fit(path), str(found), found.specs())),
        json.dumps(fit(nn.ModuleDict({"mixer": nn.Conv2d(8, 8, 5, groups=8)})).to_dict()).encode(),
    ),
    "input": (
        _written("images.json", lambda path: ImageInput.load(path.parent).normalizer()),
        json.dumps(_INPUT).encode(),
    ),
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


_WORDS = (
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"99999999999",
    b"\xff\xff\xff\xff",
    b"\0" * 8,
)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return the content with a few bits flipped, pieces moved, cut out or doubled, and words that readers dislike."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at, other = (draw.randrange(len(found) + 1) for _ in range(2))
        match draw.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                found[at : at + draw.randrange(20)] = draw.choice(_WORDS)
            case 2:
                del found[at : at + draw.randrange(40)]
            case 3:
                found[at:at] = found[other : other + draw.randrange(40)]
            case 4:
                found[at : at + 4] = draw.randbytes(draw.randrange(8))
            case 5:  # a value of JSON
                places = [match.span() for match in re.finditer(rb'[\w.+-]+|"[^"]*"', found)] or [(at, at)]
                start, end = draw.choice(places)
                found[start:end] = draw.choice(_WORDS)
    return bytes(found)


def samples(name: str, draw: random.Random, ends: float) -> Iterator[bytes]:
    """Yield a reader's sample, damaged ever anew, until ``time.monotonic()`` is at ``ends``."""
    while time.monotonic() < ends:
        yield mutated(TARGETS[name][1], draw)


def hunt(name: str, contents: Iterable[bytes], folder: Path) -> tuple[int, list[str]]:
    """Give a reader all contents; return how many there were, and what the reader raised, each kind once."""
    tried, broken = 0, {}
    for content in contents:
        tried += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            survives(name, content, folder)
        except Exception as error:
            kind = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            broken.setdefault(kind[:60], f"{name}: {kind} on {content[:300]!r}")
    return tried, list(broken.values())


_PROGRAM = """
import sys
import atheris
sys.path.insert(0, sys.argv[1])
with atheris.instrument_imports(include=["espalier", "json", "tarfile"], enable_loader_override=False):
    from experiments.readers import fuzz
fuzz(sys.argv[2], sys.argv[3:])
"""


def hunt_with_coverage(name: str, seconds: float) -> tuple[int, list[str]]:
    """Let libFuzzer look for inputs in a process of its own, led by the coverage of our code."""
    root = Path(__file__).resolve().parent.parent
    limits = ["-rss_limit_mb=4000", "-timeout=60", f"-max_total_time={int(seconds)}", "-max_len=20000"]
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "sample").write_bytes(TARGETS[name][1])
        command = [sys.executable, "-c", _PROGRAM, str(root), name, *limits, corpus]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=corpus, errors="replace")
    counts = re.findall(r"^(?:#|Done )(\d+)", ended.stderr, re.MULTILINE)
    return max(map(int, counts), default=0), [] if ended.returncode == 0 else [f"{name}: {ended.stderr[-3000:]}"]


def fuzz(name: str, arguments: list[str]) -> None:
    """Hand a reader to libFuzzer; it does not return."""
    import atheris

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())

    def one_input(content: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        survives(name, content, folder)

    atheris.Setup([name, *arguments], one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := set(given.readers) - TARGETS.keys():
        parser.error(f"there is no reader {' '.join(unknown)}")
    torch.set_num_threads(1)
    lost = []
    for name in given.readers or TARGETS:
        if importlib.util.find_spec("atheris") is not None:
            tried, broken = hunt_with_coverage(name, given.seconds)
        else:
            with tempfile.TemporaryDirectory() as folder:
                contents = samples(name, random.Random(given.seed), time.monotonic() + given.seconds)
                tried, broken = hunt(name, contents, Path(folder) / "reader")
        print(f"{name}: {tried} inputs, {len(broken)} broke it", flush=True)
        lost += broken
    print("\n".join(f"LOST {line}" for line in lost))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
