"""Layers whose tensors have shapes and no numbers: on the meta device, or of torch's FakeTensorMode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import espalier
from espalier import init
from espalier.certify import certify
from espalier.errors import EspalierError
from espalier.nn import Mamba1, Mamba2

HOSTS = {
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, batch_first=True),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 5, groups=8), nn.LayerNorm(32)),
    "mamba": lambda: nn.Sequential(Mamba1(16), nn.LayerNorm(32)),
    "mamba 2": lambda: nn.Sequential(Mamba2(16, head_dim=8), nn.LayerNorm(32)),
}
PLACES = {"meta": lambda: torch.device("meta"), "fake": FakeTensorMode}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("host", HOSTS)
def test_nothing_is_written_and_nothing_is_claimed(host: str, place: str) -> None:
    where = PLACES[place]()
    with where:
        model = HOSTS[host]()
    written, found = espalier.structure_(model), espalier.audit(model)
    with pytest.raises(EspalierError, match=f"is .*{place}.*: load its weights, then fit"):
        init.fit(model)
    if place == "fake":
        with where, pytest.raises(EspalierError, match="FakeTensorMode"):
            espalier.structure_(model)
    assert {row.status for row in (*written.layers, *found.layers)} == {"skipped"}
    assert all(place in row.note for row in (*written.layers, *found.layers))


@pytest.mark.parametrize("place", PLACES)
def test_measures_refuse_them(place: str) -> None:
    with PLACES[place]():
        square, taps, net = torch.ones(8, 8), torch.ones(8, 1, 5), nn.Linear(4, 4)
    with pytest.raises(EspalierError, match=place):
        init.measure_attention(square, square, square, square, num_heads=2)
    with pytest.raises(EspalierError, match=place):
        init.measure_ssm(square, square, square, square[0])
    with pytest.raises(EspalierError, match="no covariance"):
        init.covariance_fit(taps)
    with pytest.raises(EspalierError, match=place):
        certify(net, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
