"""How fast are the orthogonal layers on a GPU beside the original's formula, AOC, SOC and a free convolution?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from espalier.nn import CayleyConv2d
from experiments.on_gpu.timing import measure

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cayley import SHAPES, OriginalCayleyConv, Shape, skew_orthogonal


def ways(shape: Shape, device: str) -> dict[str, Callable[[], nn.Module]]:
    """Return the name and the maker of every layer; the original comes first."""
    inputs, outputs, size, _, stride = shape

    def adaptive() -> nn.Module:
        from orthogonium.layers import AdaptiveOrthoConv2d

        return AdaptiveOrthoConv2d(inputs, outputs, 3, stride=stride, padding=1 if stride > 1 else "same")

    def skew() -> nn.Module:
        if device == "cpu":
            return skew_orthogonal(shape)
        from orthogonium.legacy.skew_ortho_conv import SOC

        return SOC(inputs, outputs, 3, stride=stride)

    makers: dict[str, Callable[[], nn.Module]] = {
        "original": lambda: OriginalCayleyConv(inputs, outputs, 3, size, stride)
    }
    if stride == 1:
        makers["espalier"] = lambda: CayleyConv2d(inputs, outputs, 3)
        makers["espalier, compiled"] = lambda: torch.compile(CayleyConv2d(inputs, outputs, 3))
    else:
        makers["espalier, one tap"] = lambda: CayleyConv2d(inputs, outputs, 1, stride)
        makers["espalier, nine taps"] = lambda: CayleyConv2d(inputs, outputs, 3, stride)
    makers["AOC"] = adaptive
    makers["SOC"] = skew
    makers["Conv2d, zeros"] = lambda: nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    makers["Conv2d, circular"] = lambda: nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="circular")
    return makers


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Let float32 products and convolutions use TF32, or keep them exact, within a ``with`` block."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def train_step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run forward and backward with the gradients of the input and of every parameter."""
    layer(x).backward(grad)
    x.grad = None
    layer.zero_grad()


def evaluate(layer: nn.Module, x: Tensor, _: Tensor) -> None:
    """Run forward alone."""
    with torch.no_grad():
        layer(x)


def orthogonal_tables(job: Any) -> None:
    """Time every layer on the shapes A, B, C and S, training and evaluation, in exact float32 and with TF32."""
    shapes = {"tiny": Shape(8, 8, 8, 4)} if job.smallest else SHAPES
    for tf32 in (False,) if job.smallest else (False, True):
        for name, shape in shapes.items():
            for training in (True, False):
                with float32_products(tf32):
                    time_shape(job, name, shape, training, "tf32" if tf32 else "float32")
                if job.clock.over():
                    return


def time_shape(job: Any, name: str, shape: Shape, training: bool, precision: str) -> None:
    """Add the rows of one shape."""
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.inputs, shape.size, shape.size, device=job.device, requires_grad=training)
    side = shape.size // shape.stride
    grad = torch.randn(shape.batch, shape.outputs, side, side, device=job.device)
    step, base = (train_step if training else evaluate), None
    for way, make in ways(shape, job.device).items():
        row = {"shape": name, "phase": "train" if training else "eval", "precision": precision, "way": way}
        # One shape shows what compiling gives; it takes as long as all else.
        if "compiled" in way and (name != "A" or not training or precision == "tf32"):
            continue
        try:
            layer = make().to(job.device).train(training)
            with contextlib.nullcontext() if training else parametrize.cached():
                timing = measure(lambda layer=layer: step(layer, x, grad), job.device, seconds=0.3)
        except Exception as error:
            job.results.add("orthogonal", **row, failed=f"{type(error).__name__}: {error}"[:160])
            continue
        base = base or timing.median_ms
        job.results.add_timing("orthogonal", timing, base, **row)
