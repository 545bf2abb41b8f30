"""No kernel starts on less memory than it reads: what the table of counts says, against what real calls hand over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.models import ConvMixer
from espalier.nn import CayleyConv2d, GatedRMSNorm, causal_conv_silu, selective_scan, ssd, use_backend
from espalier.nn.kernels import arguments, cpu, depthwise, gated_norm, library, split_complex
from espalier.nn.kernels import ssd as ssd_kernels
from espalier.nn.kernels.library import KernelError, call
from espalier.nn.orthogonal import shuffle

pytestmark = pytest.mark.skipif(
    not any(path.exists() for path in library.candidates()), reason="the package was built without a compiler"
)
# Their sizes alone do not say how many frequencies are kept.
UNCOUNTED = {("dft_analyse", "re"), ("dft_analyse", "im"), ("dft_synthesise", "re"), ("dft_synthesise", "im")}


def rand(*size: int) -> Tensor:
    return torch.randn(size).requires_grad_()


def scan() -> Tensor:
    maps = rand(2, 70, 3), rand(2, 70, 3)
    wide = rand(2, 70, 40)  # a gate whose rows lie apart
    y, final = selective_scan(
        rand(2, 70, 20), rand(2, 70, 20), -rand(20, 3).exp(), *maps, rand(20), delta_bias_E=rand(20),
        delta_softplus=True, gate_BLE=wide[..., 20:], initial_state=rand(2, 20, 3), return_state=True,
    )  # fmt: skip
    return y.sum() + final.sum()


def dual() -> Tensor:
    maps = rand(2, 70, 2, 3), rand(2, 70, 2, 3)
    y, final = ssd(
        rand(2, 70, 4, 5), rand(2, 70, 4).exp(), -rand(4).exp(), *maps, rand(4), initial_state=rand(2, 4, 3, 5),
        return_state=True, chunk_size=32,
    )  # fmt: skip
    return y.sum() + final.sum()


def mixer(dtype: torch.dtype) -> Tensor:
    return ConvMixer(6, 1, 3, 2, 3, num_classes=2).to(dtype)(torch.randn(3, 3, 8, 10, dtype=dtype)).sum()


def still() -> Tensor:
    with torch.no_grad():
        return ConvMixer(6, 1, 3, 2, 3, num_classes=2).eval()(torch.randn(3, 3, 8, 10)).sum().requires_grad_()


def cayley(layer: nn.Module, *size: int) -> Tensor:
    return layer(rand(*size)).sum()


CALLS: dict[str, Callable[[], Tensor]] = {
    "scan": scan,
    "ssd": dual,
    "convolution": lambda: causal_conv_silu(rand(2, 9, 12)[..., :7], rand(7, 4), rand(7)).sum(),
    "norm": lambda: GatedRMSNorm(6, 2)(rand(2, 5, 6), rand(2, 5, 9)[..., 3:]).sum(),
    "ConvMixer": lambda: mixer(torch.float32),
    "ConvMixer in bfloat16": lambda: mixer(torch.bfloat16),
    "ConvMixer in evaluation": still,
    "orthogonal, odd": lambda: cayley(CayleyConv2d(4, 4, 3), 2, 4, 6, 10),
    "orthogonal, strided": lambda: cayley(CayleyConv2d(4, 8, 3, stride=2), 2, 4, 12, 8),
    "orthogonal, wide": lambda: cayley(CayleyConv2d(9, 4, 3), 2, 9, 5, 7),
}


def recorded(make: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, torch.dtype, Any]]:
    """Return what kernels are called with in a training step."""
    calls: list[tuple[Any, torch.dtype, Any]] = []

    def record(kind: Any, dtype: torch.dtype, **values: Any) -> None:
        calls.append((kind, dtype, values))
        call(kind, dtype, **values)

    for module in (cpu, depthwise, gated_norm, split_complex, ssd_kernels, shuffle):
        monkeypatch.setattr(module, "call", record)
    torch.manual_seed(0)
    with use_backend("compiled"):
        make().backward()
    assert calls
    return calls


def dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", CALLS)
def test_counts_are_those_of_the_tensors_that_operators_hand_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, dtype, values in recorded(CALLS[name], monkeypatch):
        counts = arguments.counts(kind, 64 // dtype.itemsize, *(values[size] for size in kind.sizes))
        pointers = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        for key, tensor in pointers.items():
            if (kind.kernel, key) in UNCOUNTED:
                continue
            rows_apart = f"{key[0]}_row" in values or key in ("x", "z", "gate", "b", "c")
            if dense(tensor) and not rows_apart:
                spare = 2 if (kind.kernel[:4], key) == ("ssd_", "kept") else 0  # so that there is always something
                assert counts[key] == tensor.numel() - spare, (kind.kernel, key)
            else:
                extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                assert 0 < counts[key] <= extent, (kind.kernel, key)


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_one_number_short_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, dtype, values in recorded(CALLS[name], monkeypatch):
        counts = arguments.counts(kind, 64 // dtype.itemsize, *(values[size] for size in kind.sizes))
        for key, tensor in values.items():
            if isinstance(tensor, Tensor) and (kind.kernel, key) not in UNCOUNTED:
                with pytest.raises(KernelError, match=f"{kind.kernel}: {key} leads to {counts[key] - 1} numbers"):
                    call(kind, dtype, **{**values, key: tensor.new_empty(counts[key] - 1)})


def test_an_expanded_tensor_another_dtype_and_another_device_are_refused() -> None:
    x, weight, y = torch.ones(1, 5, 8), torch.ones(8, 4), torch.empty(1, 5, 8)
    sizes = {"batch": 1, "length": 5, "channels": 8, "taps": 4, "stride": 8}

    def run(**other: Tensor) -> None:
        call(
            arguments.CONV_FORWARD, torch.float32, **{"x": x, "weight": weight, "bias": None, "y": y, **other, **sizes}
        )

    run()
    for name, tensor, words in (
        ("x", torch.ones(1).expand(1, 5, 8), "x leads to 1 numbers, the sizes ask for 40"),
        ("weight", weight.double(), "weight is torch.float64 on cpu, it takes torch.float32"),
        ("y", y.to("meta"), "y is torch.float32 on meta"),
    ):
        with pytest.raises(KernelError, match=words):
            run(**{name: tensor})


def test_operators_of_a_graph_refuse_what_was_not_kept() -> None:
    x, a, maps = torch.ones(1, 40, 4), -torch.ones(4, 2), torch.ones(1, 40, 2)
    given = (x, x, None, a, maps, maps, None, None)
    with pytest.raises(KernelError, match="starts leads to 0 numbers"):
        torch.ops.espalier.selective_scan_backward(*given, torch.empty(0), x, None, True)


def test_every_kernel_is_among_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {kind for make in CALLS.values() for kind, _, _ in recorded(make, monkeypatch)}
    assert seen == set(arguments.KINDS)
