"""What no check could read is never called healthy."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import espalier


class Packed(nn.Module):
    """A layer that keeps its weight where no parameter or buffer is, as quantised layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.held = (torch.full((4, 4), torch.nan), None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}held"] = self.held


def unread(model: nn.Module) -> list[tuple[str, str]]:
    return [(found.severity, found.layer) for found in espalier.diagnose(model).findings if found.check == "unread"]


def test_weights_that_are_packed_away_are_named() -> None:
    assert unread(nn.Sequential(Packed(), nn.ReLU())) == [("error", "0")]
    assert unread(nn.Sequential(Packed(), nn.Linear(4, 4))) == [("warning", "0")]
    assert not espalier.diagnose(Packed()).ok


def test_quantised_layers_are_named() -> None:
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), {nn.Linear}, dtype=torch.qint8
        )
        assert unread(quantised) == [("warning", "0")]


def test_numbers_of_other_kinds_are_named() -> None:
    model = nn.Linear(4, 4)
    model.waves = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    model.rows = nn.Parameter(torch.arange(4), requires_grad=False)
    assert unread(model) == [("note", "waves"), ("note", "rows")]


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 4),
        nn.MultiheadAttention(8, 2),
        nn.BatchNorm2d(4),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    ],
)
def test_what_is_read_is_not_named(layer: nn.Module) -> None:
    assert not unread(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
def test_a_model_whose_weights_are_constants_of_its_code_is_not_healthy() -> None:
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()))
    for example in (None, torch.randn(2, 3)):
        found = espalier.diagnose(frozen, example)
        assert [(f.severity, f.layer, f.check) for f in found.findings] == [("error", "(model)", "unread")]
