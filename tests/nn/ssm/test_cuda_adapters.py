"""The adapters to mamba_ssm's kernels, against stand-ins with their published signatures and layouts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.selective_scan_reference import selective_scan_loop
from reference.ssd_reference import ssd_loop


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, **rest: Any) -> Any:
    """u, delta (B, D, L); A (D, N); B, C (B, N, L)."""
    assert set(rest) <= {"z", "delta_bias", "delta_softplus", "return_last_state"}
    y, state = selective_scan_loop(u.mT, delta.mT, A, B.mT, C.mT, D)
    return (y.mT, state) if rest.get("return_last_state") else y.mT


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, **rest: Any
) -> Any:
    """States are (B, H, P, N)."""
    assert set(rest) <= {"z", "dt_bias", "initial_states", "seq_idx", "dt_softplus", "dt_limit", "return_final_states"}
    initial = rest.get("initial_states")
    y, state = ssd_loop(x, dt, A, B, C, D, None if initial is None else initial.mT)
    return (y, state.mT) if rest.get("return_final_states") else y


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fakes = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    }
    for name, members in fakes.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "espalier.nn.kernels.cuda", raising=False)
    yield importlib.import_module("espalier.nn.kernels.cuda")
    sys.modules.pop("espalier.nn.kernels.cuda", None)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_selective_scan_takes_their_layout(cuda: Any) -> None:
    inputs = (normal(2, 7, 3), normal(2, 7, 3).abs(), -normal(3, 4).abs(), normal(2, 7, 4), normal(2, 7, 4), normal(3))
    for mine, other in zip(cuda.selective_scan_mamba_ssm(*inputs), selective_scan_loop(*inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("resumed", [False, True])
def test_ssd_takes_their_layout(cuda: Any, resumed: bool) -> None:
    state = normal(2, 4, 5, 3) if resumed else None
    inputs = (
        normal(2, 7, 4, 3), normal(2, 7, 4).abs(), -normal(4).abs(), normal(2, 7, 2, 5), normal(2, 7, 2, 5), normal(4),
    )  # fmt: skip
    for mine, other in zip(cuda.ssd_mamba_ssm(*inputs, state, chunk_size=64), ssd_loop(*inputs, state), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
