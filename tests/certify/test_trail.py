"""A network that is another map at every call is refused, also where that shows nowhere near the images."""

from __future__ import annotations

import array
import copy
import functools
import io
import itertools
import os
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.certify.trail import Trail
from espalier.nn import CayleyConv2d, CayleyLinear


class Runs(nn.Module):
    """A forward pass given as a function of the module, x and some modules."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.register_buffer("seen", torch.zeros(3))
        self.state: Any = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x, *self.parts)


def far(x: Tensor) -> Tensor:
    """Return what is 0 for pixels."""
    return (x - 5).relu()


def counted(net: Runs, x: Tensor) -> Tensor:
    net.state += 1
    return x + net.state * far(x)


def listed(net: Runs, x: Tensor) -> Tensor:
    net.state = [*(net.state or []), 1.0]
    return x + len(net.state) * far(x)


CALLS: list[int] = []


def counted_elsewhere(net: Runs, x: Tensor) -> Tensor:
    CALLS.append(1)
    return x + len(CALLS) * far(x)


def kept(net: Runs, x: Tensor) -> Tensor:
    before, net.state = net.state, x
    return x + (far(before) if isinstance(before, Tensor) else 0.0)


def summed(net: Runs, x: Tensor) -> Tensor:
    net.seen += 1
    return x + far(x - net.seen)


def shifted(net: Runs, x: Tensor, layer: nn.Linear) -> Tensor:
    with torch.no_grad():
        layer.bias.sub_(1.0)
    return x + far(layer(x))


def turned(net: Runs, x: Tensor, layer: CayleyLinear) -> Tensor:
    with torch.no_grad():
        layer.weight.data.add_(torch.eye(3).roll(1, 0))
    return x + far(layer(x) / 10)


def alternating(net: Runs, x: Tensor) -> Tensor:
    net.state += 1
    return x + (far(x) if net.state % 2 else far(-x))


OTHER_EVERY_TIME: dict[str, Callable[..., Tensor]] = {
    "counts": counted,
    "keeps a list": listed,
    "counts elsewhere": counted_elsewhere,
    "keeps images": kept,
    "a buffer that sums": summed,
    "a weight that moves": shifted,
    "an operator that turns": turned,
    "does one thing or the other": alternating,
    "rand": lambda net, x: x + far(x - torch.rand(3)),
    "a generator of its own": lambda net, x: x + torch.rand(1, generator=torch.Generator().manual_seed(
        int.from_bytes(os.urandom(4)))) * far(x),
    "random": lambda net, x: x + random.random() * far(x),
    "numpy": lambda net, x: x + float(np.random.default_rng().random()) * far(x),
    "the clock": lambda net, x: x + (time.perf_counter_ns() % 10**9) * far(x),
    "dropout of a constant": lambda net, x: x + F.dropout(torch.ones(64, 1), 0.5, True).sum() * far(x),
    "noise in sight": lambda net, x: x + 0.1 * torch.randn(3),
}  # fmt: skip


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = CayleyLinear(3, 3) if OTHER_EVERY_TIME[kind] is turned else nn.Linear(3, 3)
    parts = (layer,) if OTHER_EVERY_TIME[kind] in (turned, shifted) else ()
    return nn.Sequential(Runs(OTHER_EVERY_TIME[kind], *parts), nn.Linear(3, 2)).eval()


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("kind", OTHER_EVERY_TIME)
def test_a_network_that_is_another_map_at_every_call_is_refused(kind: str, images: int) -> None:
    x = torch.rand(images, 3)
    with pytest.raises(UncertifiableError):
        certify(network(kind), x, torch.zeros(images, dtype=torch.long))
    with pytest.raises(UncertifiableError):
        lipschitz_bound(network(kind), x)


def test_a_network_that_changes_from_batch_to_batch_is_refused() -> None:
    def late(net: Runs, x: Tensor) -> Tensor:
        net.state += 1
        return x + (2.0 if net.state > 5 else 1.0) * far(x)

    net = nn.Sequential(Runs(late), nn.Linear(3, 2)).eval()
    with pytest.raises(UncertifiableError, match="run again"):
        certify(net, torch.rand(8, 3), torch.zeros(8, dtype=torch.long), batch_size=2)


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Named(nn.Module):
    calls = 0


class Doubled(list[int]):
    """A list of its own class."""


class Stepping:
    def __init__(self) -> None:
        self.calls = 0

    def step(self) -> int:
        self.calls += 1
        return self.calls


CALLED = 0


def _named(_: Any) -> int:
    global CALLED
    CALLED += 1
    return CALLED


def _class_attribute(_: Any) -> int:
    Named.calls += 1
    return Named.calls


def _closure() -> Callable[[Any], int]:
    calls = 0

    def count(_: Any) -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


def _slotted(kept: Slotted) -> int:
    kept.calls += 1
    return kept.calls


def _appended(kept: Any) -> int:
    kept.append(1)
    return len(kept)


def _added(kept: Any) -> int:
    kept["calls"] = kept.get("calls", 0) + 1
    return int(kept["calls"])


def _summed(kept: np.ndarray) -> int:
    kept[0] += 1
    return int(kept[0])


def _default(_: Any, kept: list[int] = [0]) -> int:  # noqa: B006
    kept[0] += 1
    return kept[0]


def _attribute(_: Any) -> int:
    _attribute.calls = getattr(_attribute, "calls", 0) + 1  # type: ignore[attr-defined]
    return int(_attribute.calls)  # type: ignore[attr-defined]


def _partial() -> Callable[[Any], int]:
    return functools.partial(lambda kept, _: kept.append(1) or len(kept), [])


COUNTS: dict[str, tuple[Callable[[], Any], Callable[[Any], int]]] = {
    "a number": (lambda: [0], lambda kept: kept.append(kept.pop() + 1) or kept[0]),
    "a global": (lambda: None, _named),
    "a class attribute": (lambda: None, _class_attribute),
    "a closure": (lambda: None, _closure()),
    "slots": (Slotted, _slotted),
    "a deque": (deque, _appended),
    "a list of its own class": (Doubled, _appended),
    "bytes": (bytearray, _appended),
    "an ordered dictionary": (OrderedDict, _added),
    "a counter": (Counter, _added),
    "an array": (lambda: np.zeros(1), _summed),
    "an array of objects": (lambda: np.zeros(1, dtype=object), _summed),
    "a default": (lambda: None, _default),
    "a function's attribute": (lambda: None, _attribute),
    "a partial function": (lambda: None, _partial()),
    "a packed array": (lambda: array.array("q", [0]), _summed),
    "an iterator": (lambda: itertools.count(1), next),
    "an iterator of a list": (lambda: iter([*range(1000)]), next),
    "a map": (lambda: map(int, range(1000)), next),
    "a method": (lambda: Stepping().step, lambda kept: kept()),
    "a method of a list": (lambda: [].append, lambda kept: kept(1) or len(kept.__self__)),
    "a stream": (io.BytesIO, lambda kept: kept.write(b"1") and kept.tell()),
    "random numbers": (lambda: random.Random(0), lambda kept: int(kept.random() > 2)),
    "numpy's random numbers": (lambda: np.random.default_rng(0), lambda kept: int(kept.random() > 2)),
    "torch's random numbers": (torch.Generator, lambda kept: int(torch.rand((), generator=kept).item() > 2)),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_a_count_is_noticed_however_late_it_shows(kind: str) -> None:
    start, count = COUNTS[kind]

    def late(net: Runs, x: Tensor) -> Tensor:
        return x + (2.0 if count(net.state) > 1_000_000 else 1.0) * far(x)

    first = Runs(late)
    first.state = start()
    first.owner = Named() if kind == "a class attribute" else None
    net = nn.Sequential(first, nn.Linear(3, 2)).eval()
    with pytest.raises(UncertifiableError, match=r"keep count|changed the network itself"):
        lipschitz_bound(net, torch.rand(8, 3))


def test_numpy_numbers_are_told_apart() -> None:
    def repeated(net: Runs, x: Tensor) -> Tensor:
        net.state = not net.state
        return x + far(x)[:, None].expand(-1, np.int64(1 + 99 * net.state), -1).sum(1)

    net = nn.Sequential(Runs(repeated), nn.Linear(3, 2)).eval()
    with pytest.raises(UncertifiableError):
        certify(net, torch.rand(8, 3), torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize(("layer", "name", "values"), [
    (CayleyConv2d(3, 3, 3, bias=False), "padding_mode", ("circular", "zeros")),
    (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False), "padding_mode", ("circular", "reflect")),
    (nn.BatchNorm2d(3), "eps", (1e-5, 1.0)), (nn.ELU(), "alpha", (1.0, 2.0)),
])  # fmt: skip
def test_a_layer_whose_settings_change_is_noticed(layer: nn.Module, name: str, values: tuple[Any, Any]) -> None:
    def set_anew(net: Runs, x: Tensor, layer: nn.Module) -> Tensor:
        setattr(layer, name, values[getattr(layer, name) == values[0]])
        return x + layer(far(x))

    net = nn.Sequential(Runs(set_anew, copy.deepcopy(layer)), nn.Flatten(), nn.Linear(48, 2)).eval()
    x = torch.rand(2, 3, 4, 4)
    for prove in (lambda: certify(net, x, torch.zeros(2, dtype=torch.long)), lambda: lipschitz_bound(net, x)):
        with pytest.raises(UncertifiableError, match="run again"):
            prove()


def test_values_that_are_kept_to_be_looked_at_are_no_change() -> None:
    def kept_aside(net: Runs, x: Tensor) -> Tensor:
        net.state = [x.abs(), x.shape]
        return 2 * x

    net = nn.Sequential(Runs(kept_aside), nn.Linear(3, 2)).eval()
    certificate = certify(net, torch.rand(5, 3), torch.zeros(5, dtype=torch.long), batch_size=2)
    assert certificate.lipschitz == pytest.approx(2)


def test_what_is_remembered_and_the_same_is_no_change() -> None:
    def remembered(net: Runs, x: Tensor) -> Tensor:
        if not isinstance(net.state, Tensor):
            net.state = torch.full(x.shape[1:], 0.5, dtype=x.dtype)
        return x * net.state

    net = nn.Sequential(Runs(remembered), nn.Linear(3, 2)).eval()
    certificate = certify(net, torch.rand(5, 3), torch.zeros(5, dtype=torch.long), batch_size=2)
    assert certificate.lipschitz == pytest.approx(0.5)


def test_functions_that_were_compiled_are_followed_as_they_are_written() -> None:
    tripled = torch.compile(lambda x: 3 * x, backend="eager")
    net = nn.Sequential(Runs(lambda net, x: tripled(x)), CayleyLinear(3, 3)).eval()
    assert lipschitz_bound(net, torch.rand(2, 3)) == pytest.approx(3)


def test_trails_tell_contents_apart_and_nothing_else() -> None:
    def digest(*items: Any) -> bytes:
        trail = Trail()
        trail.add(*items)
        return trail.digest()

    x = torch.arange(6.0)
    same = [(x, x.clone()), (x.view(2, 3), x.view(2, 3).mT.contiguous().mT), ([1, "a"], [1, "a"]), (x.neg(), -x)]
    for one, other in same:
        assert digest(one) == digest(other)
    apart: list[Any] = [
        x, x.double(), x.view(2, 3), -x, x.bfloat16(), x.to(torch.complex64), 1, 1.0, True, "1", None, [1], [[1]],
        {"a": 1}, {"b": 1}, {1}, slice(1, 2), slice(2, 1), torch.float32, torch.device("cpu"), torch.tensor(1.0),
        torch.zeros(0), torch.zeros(0, 2), object(), torch._neg_view(x + 1), torch.complex(x, x).conj(),
    ]  # fmt: skip
    assert len({digest(item) for item in apart}) == len(apart)
