"""Every reader of a file that a user names, given a pipe that nobody writes to and a device that never ends."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from espalier.certify import Certificate
from espalier.certify.attack_report import AttackReport
from espalier.checkpoints import load_checkpoint_file
from espalier.checkpoints.loading import open_checkpoint, open_host_model
from espalier.cli.main import main
from espalier.data import build_source
from espalier.data.generated import read_generated
from espalier.data.labelled import LabelledImages
from espalier.data.published import read_cifar10, read_fashion_mnist
from espalier.doctor import diagnose
from espalier.errors import EspalierError
from espalier.init import FilterStatistics
from espalier.models import VisionTransformer
from espalier.models.hub import open_hub_model
from espalier.recipes import Recipe
from espalier.recipes.files import open_recipe
from espalier.recipes.validation import load_recipe, resolve_recipe
from espalier.study import add_records, load_study, read_records
from espalier.train.image_input import ImageInput

INPUT = ImageInput(("a", "b"), 3, 4, 4)
REAL = LabelledImages(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
VIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 2, "embed_dim": 12, "depth": 1,
                       "num_heads": 3}  # fmt: skip


def beside_weights(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a reader that finds whole weights beside the file that is replaced."""

    def with_weights(path: Path) -> object:
        save_file(VisionTransformer(**VIT).state_dict(), path.parent / "w.safetensors")
        return read(path.parent / "w.safetensors")

    return with_weights


def image_folder(path: Path) -> object:
    """Open an image folder one of whose images is replaced."""
    (path.parent.parent / "b").mkdir()
    return build_source(Recipe("r", dataset="folder", data_path=str(path.parent.parent), data_args={"size": 4}))


def pretrained(path: Path) -> object:
    (path.parent / "whole").mkdir()
    model = VisionTransformer(**VIT)
    model.save_pretrained(path.parent / "whole")
    for name in {"config.json", "model.safetensors"} - {path.name}:
        shutil.copy(path.parent / "whole" / name, path.parent / name)
    return open_hub_model(str(path.parent))


def command(*words: str) -> Callable[[Path], object]:
    """Return a reader that runs a command; ``PATH`` among its words stands for the file."""

    def run(path: Path) -> object:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main([word.replace("PATH", str(path)) for word in words]) == 2
        raise EspalierError(said.getvalue().rstrip("\n"))

    return run


# The name under which the file is looked for, and who looks.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "attack report": ("a.json", AttackReport.load),
    "audit": ("w.safetensors", command("audit", "PATH")),
    "certificate": ("c.json", Certificate.load),
    "checkpoint": ("w.safetensors", open_checkpoint),
    "checkpoint of torch": ("w.pt", open_checkpoint),
    "cifar": ("data_batch_1", lambda path: read_cifar10(path.parent)),
    "config.json of transformers": ("config.json", lambda path: open_host_model(f"transformers:{path.parent}")),
    "config.json of the hub": ("config.json", pretrained),
    "convert": ("w.pt", command("convert", "PATH")),
    "convmixer": ("w.pt", load_checkpoint_file),
    "doctor": ("w.safetensors", diagnose),
    "doctor of torch": ("w.pt", diagnose),
    "doctor, against": ("w.safetensors", lambda path: diagnose(VisionTransformer(**VIT), against=path)),
    "doctor, command": ("w.safetensors", command("doctor", "PATH")),
    "doctor, index": ("w.safetensors.index.json", diagnose),
    "fashion mnist": ("train-images-idx3-ubyte.gz", lambda path: read_fashion_mnist(path.parent)),
    "fit": ("f.json", command("structure", "espalier:vit", "--like", "PATH")),
    "generated": ("g.npz", lambda path: read_generated(
        {"generated": str(path), "generated_share": 0.5}, REAL, 2)),
    "images in a folder": ("a/0.png", image_folder),
    "input of a run": ("images.json", lambda path: ImageInput.load(path.parent)),
    "model.json beside weights": ("model.json", beside_weights(open_checkpoint)),
    "predict": ("0.png", lambda path: INPUT.read([path])),
    "recipe, JSON": ("r.json", lambda path: open_recipe(str(path))),
    "recipe, YAML": ("r.yaml", lambda path: open_recipe(str(path))),
    "recipe, command": ("r.yaml", command("train", "PATH", "--out", "PATH.run")),
    "recipe of a run": ("recipe.json", load_recipe),
    "records": ("r.jsonl", read_records),
    "records, written to": ("r.jsonl", lambda path: add_records([], path)),
    "records, command": ("r.jsonl", command("records", "merge", "PATH", "--to", "PATH.all")),
    "shards": ("0.tar", lambda path: build_source(Recipe("r", dataset="shards", data_path=str(path)))),
    "statistics": ("s.safetensors", FilterStatistics.load),
    "study": ("study.json", lambda path: load_study(path.parent)),
    "text": ("t.txt", lambda path: build_source(Recipe("r", dataset="text", data_path=str(path)))),
    "user's code": ("code.py", lambda path: resolve_recipe(Recipe("r", model=f"{path}:net"))),
    "weights of the hub": ("model.safetensors", pretrained),
    "weights of transformers": ("model.safetensors", lambda path: open_host_model(f"transformers:{path.parent}")),
}  # fmt: skip


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let what reads a device without end fail soon."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory by /proc")
@pytest.mark.usefixtures("little_memory")
@pytest.mark.timeout(60, method="thread")  # a library that waits in C hears no signal
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_never_ends_is_refused_in_one_line(name: str, kind: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    path = tmp_path / "place" / file
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(EspalierError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert any(str(place) in str(caught.value) for place in (path.parent, path.resolve()))
