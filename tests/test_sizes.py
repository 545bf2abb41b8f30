"""Every layer and model takes whole numbers for sizes, whoever's they are, and refuses all else in one line."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import espalier.models
import espalier.nn
from espalier.errors import EspalierError
from espalier.sizes import per_axis, whole_number

# What has no default, and what keeps the models small.
GIVEN: dict[str, Any] = {
    "in_channels": 4, "out_channels": 8, "kernel_size": 3, "in_features": 4, "out_features": 3, "channels": 4,
    "factor": 2, "group_size": 2, "dim": 16, "head_dim": 8, "groups": 2, "depth": 1, "patch_size": 4, "embed_dim": 12,
    "width": 4, "hidden": 8, "num_classes": 3, "vocab_size": 9, "num_heads": 1, "num_features": 4, "features": (),
    "head": "normalized", "mean": 0.5, "fn": nn.Identity(), "dt_rank": 2, "state_size": 3, "num_kv_heads": 1,
    "widths": (4,), "depths": (1,), "img_size": 8,
}  # fmt: skip
CLASSES = [
    thing
    for package in (espalier.nn, espalier.models)
    for thing in (getattr(package, name) for name in package.__all__)
    if isinstance(thing, type) and issubclass(thing, nn.Module) and not thing.__name__.startswith("Transformers")
]


def sizes_of(kind: type[nn.Module]) -> list[str]:
    """Return the parameters whose annotation has whole numbers in it."""
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if re.search(r"\bint\b", str(p.annotation))]


def build(kind: type[nn.Module], **changed: Any) -> nn.Module:
    known = inspect.signature(kind).parameters
    return kind(**{**{name: value for name, value in GIVEN.items() if name in known}, **changed})


def valid(kind: type[nn.Module], name: str) -> Any:
    return GIVEN.get(name, inspect.signature(kind).parameters[name].default)


CASES = [(kind, name) for kind in CLASSES for name in sizes_of(kind)]
NUMBERS = [(kind, name) for kind, name in CASES if isinstance(valid(kind, name), int | tuple)]


def test_sizes_are_found() -> None:
    found = {f"{kind.__name__}.{name}" for kind, name in CASES}
    assert {"CayleyConv2d.stride", "Mamba1.dt_rank", "BatchCentering.channels", "VisionTransformer.depth"} <= found
    assert {"DepthwiseConv2d.padding", "KWLarge.img_size", "OrthogonalConvNet.widths"} <= found


@pytest.mark.parametrize("wrong", [2.5, 3.0, True, -1, (), np.float64(3)], ids=repr)
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_no_whole_number_is_refused_by_name(kind: type[nn.Module], name: str, wrong: object) -> None:
    among = isinstance(valid(kind, name), tuple)
    with pytest.raises(
        EspalierError, match=rf"^{name}(\[0\])? is {re.escape(repr(wrong))}: give a whole number from \d"
    ):
        build(kind, **{name: (wrong,) if among else wrong})
    annotation = str(inspect.signature(kind).parameters[name].annotation)
    if "Sequence" in annotation or "tuple" in annotation:
        with pytest.raises(EspalierError, match=rf"^{name}(\[\d\])? is .*: give a whole number from \d"):
            build(kind, **{name: (3, wrong) if not among else (wrong,)})


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_whole_numbers_of_numpy_are_whole_numbers(kind: type[nn.Module], name: str) -> None:
    size = valid(kind, name)
    theirs = tuple(map(np.int64, size)) if isinstance(size, tuple) else np.int64(size)
    plain, other = build(kind), build(kind, **{name: theirs})
    assert repr(other) == repr(plain)
    assert {n: p.shape for n, p in other.state_dict().items()} == {n: p.shape for n, p in plain.state_dict().items()}


def test_one_number_stands_for_every_axis() -> None:
    for value in (3, [3, 3], (np.int32(3), 3), torch.tensor(3), np.array([3, 3]), torch.Size((3, 3))):
        found = per_axis("stride", value, 2)
        assert found == (3, 3)
        assert {type(size) for size in found} == {int}
    for wrong in ((3,), (3, 3, 3), (3, 0), (3, 3.0), (True, 3), "33", None, 2.5, {}):
        with pytest.raises(
            EspalierError, match=r"^stride is .*: give a whole number from 1, or one for each of 2 axes$"
        ):
            per_axis("stride", wrong, 2)


def test_a_size_from_0_may_be_0() -> None:
    assert whole_number("classes", np.uint8(0), least=0) == 0
    with pytest.raises(EspalierError, match=r"^classes is -1: give a whole number from 0$"):
        whole_number("classes", -1, least=0)
