"""Products in float32 that keep fewer digits are found by trying, whatever quietly takes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.certify import certify, lipschitz_bound
from espalier.certify.digits import refuse_settings, try_products
from espalier.errors import EspalierError

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda c: nn.Linear(c, c + 1),
    "convolution": lambda c: nn.Conv2d(c, 2 * c, 3, padding=1),
    "grouped": lambda c: nn.Conv2d(c, 2 * c, 3, groups=c, stride=2),
    "dilated": lambda c: nn.Conv2d(c, c, 2, dilation=2),
    "transposed": lambda c: nn.ConvTranspose2d(c, c, 3, stride=2, output_padding=1),
    "transposed, grouped": lambda c: nn.ConvTranspose2d(2 * c, 4 * c, 3, groups=2),
}


def net_of(name: str, channels: int) -> tuple[nn.Module, Tensor]:
    layer = LAYERS[name](channels)
    inputs = channels if name != "transposed, grouped" else 2 * channels
    shape = (3, inputs) if name == "linear" else (3, inputs, 6, 5)
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten()), torch.rand(shape)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(LAYERS)), channels=st.integers(1, 18), seed=st.integers(0, 99))
def test_full_products_pass(name: str, channels: int, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, x = net_of(name, channels)
    certify(net, x, torch.zeros(3, dtype=torch.long), arithmetic="float32")


class Functional(nn.Module):
    """A linear map by a row, as a vector: its result has no axis of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(x, self.weight)[:, None]
        return torch.cat((first, -first), 1)


def test_a_weight_without_rows_passes() -> None:
    certify(Functional(), torch.rand(3, 5), torch.zeros(3, dtype=torch.long), arithmetic="float32")


def test_constants_alone_are_not_about_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("products were tried for a constant")

    monkeypatch.setattr("espalier.certify.bounded.try_products", fail)
    lipschitz_bound(nn.Sequential(nn.Linear(3, 2)), example=torch.rand(1, 3))


def rounded(digits: int) -> Callable[[Tensor], Tensor]:
    """Return a rounding to some binary digits: 8 are bfloat16, 11 TF32."""
    return lambda x: torch.ldexp(torch.round(torch.ldexp(torch.frexp(x)[0], torch.tensor(digits))),
                                 torch.frexp(x)[1] - digits) if x.dtype == torch.float32 else x  # fmt: skip


@pytest.mark.parametrize("digits", [8, 11, 16, 22])
@pytest.mark.parametrize("operation", [F.linear, F.conv2d, F.conv_transpose2d])
def test_fewer_digits_are_found(operation: Callable[..., Tensor], digits: int) -> None:
    less = rounded(digits)
    x = torch.rand(2, 8) if operation is F.linear else torch.rand(2, 8, 9, 9)
    weight = torch.rand(8, 8) if operation is F.linear else torch.rand(8, 8, 3, 3)
    rows = operation is not F.conv_transpose2d
    try_products(operation, x, weight, rows_are_outputs=rows)
    with pytest.raises(EspalierError, match="lose digits"):
        try_products(lambda a, b: operation(less(a), less(b)), x, weight, rows_are_outputs=rows)


def test_winograd_is_found() -> None:
    """F(2, 3) along one axis, as libraries do along two: outputs are sums of products of sums."""

    def winograd(x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return F.conv1d(x, weight)
        d = x.unfold(2, 4, 2)
        g0, g1, g2 = weight.unbind(2)
        taps = torch.stack((g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2), 2)
        data = torch.stack(
            (d[..., 0] - d[..., 2], d[..., 1] + d[..., 2], d[..., 2] - d[..., 1], d[..., 1] - d[..., 3]), 3
        )
        m = torch.einsum("oct,bcpt->bopt", taps, data)
        return torch.stack((m[..., :3].sum(3), m[..., 1] - m[..., 2] - m[..., 3]), 3).flatten(2)

    x, weight = torch.rand(4, 8, 10, dtype=torch.float64), torch.rand(8, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(winograd(x.float(), weight.float()).double(), F.conv1d(x, weight), rtol=1e-5, atol=1e-5)
    with pytest.raises(EspalierError, match="Winograd"):
        try_products(winograd, x.float(), weight.float())


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    place = torch
    for part in name.split("."):
        place = getattr(place, part)
    before = place.fp32_precision  # type: ignore[attr-defined]
    place.fp32_precision = value  # type: ignore[attr-defined]
    try:
        yield
    finally:
        place.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has other settings")
@pytest.mark.parametrize("name", ["backends.mkldnn.matmul", "backends.mkldnn.conv", "backends.mkldnn"])
def test_settings_of_libraries_are_refused_by_name(name: str) -> None:
    net, x = net_of("convolution", 2)
    labels = torch.zeros(3, dtype=torch.long)
    with setting(name, "bf16"):
        with pytest.raises(EspalierError, match=r"set to bf16: torch\.backends\S*\.fp32_precision = 'ieee'"):
            certify(net, x, labels, arithmetic="float32")
        certify(net, x, labels)  # float64 has no such setting
    certify(net, x, labels, arithmetic="float32")


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DNNL_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(EspalierError, match="DNNL_DEFAULT_FPMATH_MODE"):
        refuse_settings(torch.device("cpu"))
