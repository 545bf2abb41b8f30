"""Arguments that no certificate can be about are refused in one line; every whole number is a label."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.testing._internal.distributed.fake_pg import FakeStore

from espalier.certify import UncertifiableError, certify, challenge, lipschitz_bound, register_lipschitz
from espalier.certify.layers import RULES
from espalier.errors import EspalierError
from tests.certify.test_counts import Runs

NET = nn.Sequential(nn.Linear(4, 3)).eval()
X = torch.linspace(0, 1, 8).view(2, 4)
Y = torch.tensor([0, 1])


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


@pytest.mark.parametrize(("arguments", "says"), [
    ({"labels": [0, 1]}, "labels are of type list"), ({"labels": Y.numpy()}, "labels are of type ndarray"),
    ({"labels": Y.bool()}, "torch.bool"), ({"labels": Y[:, None]}, r"\(2, 1\)"), ({"labels": -Y}, "from 0"),
    ({"images": X.numpy()}, "images are of type ndarray"), ({"images": X[:0], "labels": Y[:0]}, r"\(0, 4\)"),
    ({"images": X.sum()}, r"\(\)"), ({"images": X.to_sparse()}, "sparse"), ({"images": X.to("meta")}, "meta"),
    ({"images": 255 * X}, "range over"), ({"images": X.long()}, "int64"),
    ({"images": X[:, :0]}, r"\(2, 0\)"), ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 1.5}, "batch_size is 1.5"), ({"batch_size": True}, "batch_size is True"),
    ({"arithmetic": None}, "arithmetic 'None'"),
    ({"net": lambda x: x}, "net is of type function"), ({"net": nn.Linear(4, 3, device="meta")}, "meta"),
    ({"net": nn.LazyLinear(3)}, "before its first call"),
    ({"net": pruned()}, "prune.remove"),
])  # fmt: skip
def test_what_no_certificate_can_be_about_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(EspalierError, match=says) as caught:
        certify(**{"net": NET, "images": X, "labels": Y, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("net", "example"), [(NET, X.numpy()), (NET, X[:0]), (NET, X.sum()), (len, X)])
def test_a_bound_needs_a_network_and_images(net: Any, example: Any) -> None:
    with pytest.raises(EspalierError, match="give a"):
        lipschitz_bound(net, example)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_whole_kind_are_the_same(dtype: torch.dtype) -> None:
    labels = NET(X).argmax(1)
    assert certify(NET, X, labels.to(dtype)).radii == certify(NET, X, labels).radii


@pytest.mark.parametrize(("one", "other"), [
    (nn.Hardtanh(0.0, float("inf")), nn.ReLU()),
    (Runs(lambda x: x - torch.tensor([0, 1, 2, 3], dtype=torch.uint8)), Runs(lambda x: x - torch.arange(4.0))),
    (Runs(lambda x: x.clamp(-float("inf"), 0.5)), Runs(lambda x: x.clamp(max=0.5))),
])  # fmt: skip
def test_the_same_map_has_the_same_certificate(one: nn.Module, other: nn.Module) -> None:
    found = []
    for first in (one, other):
        net = nn.Sequential(first, NET)
        found.append(certify(net, X, net(X).argmax(1)).radii)
    assert min(found[1]) > 0
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_shards_are_refused() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # starts no threads
    try:
        net = nn.Sequential(nn.Linear(4, 3)).eval()
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(EspalierError, match="net is in shards"):
            lipschitz_bound(net, X)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("arguments", "says"), [
    ({"batch_size": 0}, "batch_size is 0"), ({"batch_size": -1}, "batch_size is -1"),
    ({"eps": [math.nan]}, "eps nan"), ({"eps": [-1.0]}, "radius goes from -1 to -1"),
    ({"images": X[:, :0]}, r"\(2, 0\)"),
])  # fmt: skip
def test_what_no_attack_can_be_about_is_refused(arguments: dict[str, Any], says: str) -> None:
    labels = NET(X).argmax(1)
    given = {"images": X, "labels": labels, "certificate": certify(NET, X, labels), "steps": 1, **arguments}
    with pytest.raises(EspalierError, match=says):
        challenge(NET, **given)


def test_a_table_names_every_radius_or_refuses_it() -> None:
    certificate = certify(NET, X, NET(X).argmax(1))
    assert "inf " in certificate.table([math.inf])
    with pytest.raises(EspalierError, match="eps nan"):
        certificate.table([math.nan])


@patch.dict(RULES)
@pytest.mark.parametrize("rounding", [(-1.0, 0.0), (0.0, -1.0), (math.nan, 0.0), (0.0, math.inf)])
def test_a_stated_rounding_is_a_bound(rounding: tuple[float, float]) -> None:
    register_lipschitz(nn.Softplus, rounding=lambda module, unit: rounding)(lambda module: 1.0)
    with pytest.raises(UncertifiableError, match="its rounding is"):
        certify(nn.Sequential(nn.Softplus(), NET), X, Y)


@pytest.mark.parametrize("classes", [(NET,), ("Softplus",), (nn.Softplus, torch.exp), (Tensor,)])
def test_what_is_registered_is_a_class_of_modules(classes: tuple[Any, ...]) -> None:
    with pytest.raises(EspalierError, match="give classes of modules"):
        register_lipschitz(*classes)
