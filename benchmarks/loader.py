"""Does the loader keep up with the model? Images a second of both, and whether memory stays flat, on generated JPEGs.

    python benchmarks/loader.py --folder DIR [--images 100000] [--distinct 2000] [--workers 1 2] [--steps 100]
                                [--size 224] [--device cpu] [--models convmixer_768_32 vit_small]

Writes ``DIR/train/CLASS/NUMBER.jpg`` (and ``val``) once: JPEGs of ImageNet's sides and bytes (about 500×375 and 110 kB
on average) of coloured 1/f noise. Only ``--distinct`` of them are encoded, the others are hard links: each is listed,
opened, read and decoded as a file of its own, but the disk's cache holds them all, so this measures decoding, not the
disk. A model's number is that of a training step on a batch that is in memory already: a loader that is faster never
shows. Memory is the proportional set size of this process and of its workers, at eleven moments of the loader's run.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from espalier.data import build_source
from espalier.models import VisionTransformer, build_model
from espalier.recipes import get_recipe
from timings import Row, add_option, record, summary

# Sides (width, height) with their shares, roughly as in ImageNet.
SIDES = (((500, 375), 0.6), ((375, 500), 0.16), ((500, 333), 0.16), ((640, 480), 0.05), ((1024, 768), 0.03))


def write_jpegs(folder: Path, images: int, distinct: int, classes: int = 1000, val: int = 2000) -> None:
    """Write ``images`` training and ``val`` validation JPEGs, ``distinct`` of them encoded and the rest hard links."""
    if (folder / "complete").exists():
        return
    pool = folder / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    draws = random.Random(0)
    for number in range(distinct):
        width, height = draws.choices(*zip(*SIDES, strict=True))[0]
        encoded = pool / f"{number}.jpg"
        if not encoded.exists():
            noise_image(width, height, number).save(encoded, quality=88)
    for split, count in (("train", images), ("val", val)):
        for number in range(count):
            place = folder / split / f"n{number % classes:08d}" / f"n{number % classes:08d}_{number}.JPEG"
            if number < classes:
                place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                os.link(pool / f"{(number * 7919) % distinct}.jpg", place)
    (folder / "complete").touch()


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """Return coloured noise whose spectrum falls as 1/f, as that of photographs does, with some grain."""
    stream = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    white = np.fft.rfft2(stream.standard_normal((3, height, width)))
    smooth = np.fft.irfft2(white * fall, s=(height, width))
    smooth = smooth / smooth.std((1, 2), keepdims=True)
    mixed = np.einsum("cd,dhw->hwc", np.array([[1, 0.3, 0], [1, 0, 0.3], [1, -0.3, -0.3]]), smooth)
    pixels = 118 + 55 * mixed + 9 * stream.standard_normal((height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def measure_loader(source: Any, batch: int, steps: int, device: torch.device) -> tuple[Row, str]:
    """Return the time of an image over ``steps`` batches after the first two, and what was held in memory meanwhile."""
    source.to(device)
    for step in range(2):
        source.train_batch(0, 0, step, batch)
    held, handles = [], len(os.listdir("/proc/self/fd"))
    started = time.perf_counter()
    for step in range(2, 2 + steps):
        source.train_batch(0, *divmod(step, source.steps_per_epoch(batch)), batch)
        if (step - 2) % max(1, steps // 10) == 0 or step == steps + 1:
            held.append(memory_mb())
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / (steps * batch)
    series = "; ".join(
        f"{name} {', '.join(f'{sizes[key]:.0f}' for sizes in held)} MB"
        for name, key in (("this process", 0), ("workers", 1))
    )
    more = len(os.listdir("/proc/self/fd")) - handles
    text = f"{1 / seconds:.0f} images/s over {steps * batch} images; memory of {series}; {more} more file handles"
    return summary([seconds], max(map(sum, held))), text


def memory_mb() -> tuple[float, float]:
    """Return the proportional set sizes of this process and of those it started: shared pages count once."""

    def of(pid: int | str) -> float:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024

    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return of(os.getpid()), sum(map(of, children))


def measure_model(build: Callable[[], nn.Module], batch: int, size: int, device: torch.device) -> Row:
    """Return the time of an image in a training step: forward, backward, AdamW; bfloat16 and channels last on a GPU."""
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = (
        torch.rand(batch, 3, size, size, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )
    if device.type == "cuda":
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    times = []
    for _ in range(8 if device.type == "cuda" else 3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    return summary([taken / batch for taken in times[1:]])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convmixer_768_32": lambda: build_model("convmixer_768_32", num_classes=1000),
    "vit_small": lambda: VisionTransformer(224, 16, num_classes=1000, embed_dim=384, depth=12, num_heads=6),
}


def main() -> None:
    """Write the images, then measure loaders and models one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--distinct", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="*", default=[os.cpu_count() or 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--model-batch", type=int, default=8)
    add_option(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    write_jpegs(arguments.folder, arguments.images, arguments.distinct)
    rows: dict[str, Row] = {}
    recipe = replace(get_recipe("convmixer_imagenet"), data_path=str(arguments.folder), randaugment=None)
    for workers in arguments.workers:
        reads = {"size": arguments.size, "storage": "stream", "workers": workers}
        started = time.perf_counter()
        source = build_source(replace(recipe, data_args=reads))
        print(f"loader, {workers} workers: listed in {time.perf_counter() - started:.1f} s; ", end="", flush=True)
        rows[f"loader, {workers} workers"], text = measure_loader(source, arguments.batch, arguments.steps, device)
        print(text, flush=True)
    for name in arguments.models:
        rows[name] = measure_model(MODELS[name], arguments.model_batch, arguments.size, device)
        print(f"{name}: {1e3 / rows[name]['ms']:.1f} images/s", flush=True)
    case = f"an image of {arguments.size} pixels, {arguments.images:,} JPEGs, batch {arguments.batch}"
    record(arguments.record, "loader", case, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
