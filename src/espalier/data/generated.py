"""Generated images beside the real ones of a training set, from a file such as diffusion models' samples come in."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.lib.format import read_array

from espalier.data.arguments import unit_share
from espalier.data.labelled import LabelledImages
from espalier.data.source import epoch_order
from espalier.errors import EspalierError, path_of
from espalier.files import open_regular
from espalier.memory import free_memory
from espalier.randomness import derive_generator

GENERATED: dict[str, Any] = {"generated": None, "generated_share": None}
"""Arguments of a source that takes them: the file, and the share of every training batch that comes from it, or 0.7."""
_SHARE = 0.7


class GeneratedImages:
    """Labelled images that fill a fixed share of every training batch; the rest stays real.

    With a share s and batches of B, round(s·B) images of a batch are generated: the epoch's permutation of the file,
    from where the last batch left it, over and over. They stand at random places of the batch, so that its parts
    (micro-batches, ranks) are alike.

    Args:
        images: the images.
        share: s, strictly between 0 and 1: 0.7 to 0.8 in the robust recipes.

    Source: Rebuffi et al., arXiv 2103.01946, section 4; for certified nets Hu et al., arXiv 2310.02513.
    """

    def __init__(self, images: LabelledImages, share: float) -> None:
        self.images, self.share = images, share

    def to(self, device: torch.device | str) -> Self:
        """Move the images to ``device`` and return them."""
        self.images = self.images.to(device)
        return self

    def count(self, batch_size: int) -> int:
        """Return how many images of a batch are generated.

        Raises:
            EspalierError: none or all of them would be.
        """
        count = round(self.share * batch_size)
        if not 0 < count < batch_size:
            raise EspalierError(
                f"generated_share is {self.share} and batch_size {batch_size}: choose them so that a batch has images "
                "of both kinds"
            )
        return count

    def join(self, real: LabelledImages, seed: int, epoch: int, step: int, batch_size: int) -> LabelledImages:
        """Return the batch of ``real`` images and generated ones, mixed."""
        count, device = self.count(batch_size), real.labels_N.device
        places_M = torch.arange(step * count, (step + 1) * count) % len(self.images)
        order_N = epoch_order(len(self.images), seed, epoch, "generated")
        drawn = self.images.take(order_N[places_M].to(device))
        mix_B = torch.randperm(batch_size, generator=derive_generator(seed, "mix", epoch, step)).to(device)
        pixels = torch.cat([real.images_NCHW, drawn.images_NCHW])
        return LabelledImages(pixels, torch.cat([real.labels_N, drawn.labels_N])).take(mix_B)


def read_generated(arguments: Mapping[str, Any], train: LabelledImages, classes: int) -> GeneratedImages | None:
    """Return the images that the arguments ``generated`` and ``generated_share`` name, None without a file.

    The file is an ``.npz`` archive with uint8 pixels ``image`` (N, H, W, C) or (N, C, H, W) and class indices ``label``
    (N,), as the samples of EDM and DDPM for CIFAR-10 are published. It is read into memory, without running code.

    Args:
        arguments: of the source.
        train: the real training set, whose shape and classes they must have.
        classes: how many there are.

    Raises:
        EspalierError: a share without a file or out of range; a file that is missing, damaged, larger than the memory
            that is free, or holds other images than the training set's kind.
    """
    share = arguments["generated_share"]
    if arguments["generated"] is None:
        if share is not None:
            raise EspalierError(f"generated_share is {share!r} without a file: name it with generated")
        return None
    share = _SHARE if share is None else unit_share("generated_share", share)
    path = path_of("generated", str(arguments["generated"]))
    pixels, labels = _read_archive(path)
    _, channels, height, width = train.images_NCHW.shape
    if pixels.shape[1:] == (height, width, channels):
        pixels = np.moveaxis(pixels, 3, 1)
    if pixels.dtype != np.uint8 or pixels.shape != (labels.size, channels, height, width) or labels.ndim != 1:
        raise EspalierError(
            f"generated is {path} with images {pixels.dtype} {pixels.shape} and labels {labels.shape}: give uint8 "
            f"pixels (N, {height}, {width}, {channels}) and N labels"
        )
    if not labels.size:
        raise EspalierError(f"generated is {path}, which holds no images: give others")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise EspalierError(f"generated is {path}, whose labels are not all whole numbers from 0 to {classes - 1}")
    images = LabelledImages(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))
    return GeneratedImages(images, share)


def _read_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of pixels and of labels, these flat."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            needed = sum(entry.file_size for entry in archive.infolist())
            if needed > (free := free_memory()):
                sizes = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
                raise EspalierError(f"generated is {path}, {sizes}: give a part of it")
            # Not np.load, which returns the bytes of what does not begin as an array.
            pixels, labels = (read_array(archive.open(f"{name}.npy")) for name in ("image", "label"))
    except EspalierError:
        raise
    except OSError as error:
        raise EspalierError(f"generated is {path}, which cannot be read ({error.strerror}): give its place") from None
    except KeyError:
        raise EspalierError(f"generated is {path}, which does not hold arrays called image and label") from None
    except (ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error):
        raise EspalierError(f"generated is {path}, which is no whole .npz archive of arrays: get it again") from None
    return pixels, labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
