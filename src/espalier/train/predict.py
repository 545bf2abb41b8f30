"""What a finished run says of image files, from its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from espalier.data.layout import image_names
from espalier.errors import EspalierError
from espalier.sizes import whole_number
from espalier.train.image_input import ImageInput
from espalier.train.run import Run


def pixel_model(run: Run) -> nn.Module:
    """Return a run's final network as a function of pixels in [0, 1], in evaluation mode; its data are not needed.

    Raises:
        EspalierError: an unfinished or diverged run, or one whose data are no images.
    """
    return nn.Sequential(ImageInput.load(run.path).normalizer(), run.model()).eval()


@torch.no_grad()
def predict(run: Run, paths: Sequence[Path], top: int = 1) -> dict[Path, list[tuple[str, float]]]:
    """Return the most probable classes of image files, by softmax over a run's logits.

    Args:
        run: a finished run on images.
        paths: image files, and folders, which stand for all images below them.
        top: how many classes.

    Returns:
        By file, classes with their probabilities, the most probable first.

    Raises:
        EspalierError: an unfinished run or one whose data are no images, no image, files that cannot be decoded, a net
            of the user's own with another number of logits than the data have classes.
    """
    expected = ImageInput.load(run.path)
    whole_number("top", top)
    files = [
        file
        for path in paths
        for file in ([path / name for name in sorted(image_names(path))] if path.is_dir() else [path])
    ]
    if not files:
        raise EspalierError("there are no images: name files, or folders that hold some")
    net, found = pixel_model(run), {}
    for start in range(0, len(files), run.recipe.eval_batch_size):
        batch = files[start : start + run.recipe.eval_batch_size]
        probabilities_BK = net(expected.read(batch)).softmax(-1)
        if probabilities_BK.shape[-1] != (count := len(expected.class_names)):
            wrong = f"has {probabilities_BK.shape[-1]} logits for {count} names of classes"
            raise EspalierError(f"the net of run {run.path} {wrong}: train one with a logit a class")
        if not probabilities_BK.isfinite().all():
            raise EspalierError(f"the net of run {run.path} gives no finite numbers for {batch[0]}, …: train another")
        for file, probabilities_K in zip(batch, probabilities_BK, strict=True):
            best = probabilities_K.topk(min(top, len(probabilities_K)))
            names = [expected.class_names[index] for index in best.indices.tolist()]
            found[file] = list(zip(names, best.values.tolist(), strict=True))
    return found
