"""Which tensors the compiled kernels may take: plain ones in memory, under no transform and no mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, vmap

from espalier.nn import CayleyConv2d
from espalier.nn.kernels.library import usable


class _Subclass(Tensor):
    pass


def test_only_plain_tensors_are_usable() -> None:
    plain = torch.ones(3, 4)
    fake = FakeTensorMode()
    unusable = {
        "subclass": plain.as_subclass(_Subclass),
        "negative bit": torch._neg_view(plain),
        "imaginary part of a conjugate": torch.ones(3, dtype=torch.complex64).conj().imag,
        "fake": fake.from_tensor(plain),
        "functional": torch._to_functional_tensor(plain),
        "meta": plain.to("meta"),
        "sparse": plain.to_sparse(),
        "zeros without memory": torch._efficientzerotensor((3,)),
        "in blocks of oneDNN": plain.to_mkldnn(),
        "nested": torch.nested.as_nested_tensor([plain, plain], layout=torch.jagged),
        "half": plain.half(),
        "no memory": _emptied(),
    }
    assert {name for name, tensor in unusable.items() if usable(tensor)} == set()
    assert all(usable(tensor) for tensor in (plain, nn.Parameter(plain), plain.T[1:], plain[:0], plain.double(), None))
    assert not usable(plain, unusable["fake"])


def _emptied() -> Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def test_nothing_is_usable_under_a_transform_or_a_mode() -> None:
    seen = []
    plain = torch.ones(3)

    def look(x: Tensor) -> Tensor:
        seen.append(usable(x) or usable(plain))
        return x + 1

    vmap(look)(torch.ones(2, 3))
    functionalize(look)(plain)
    with FakeTensorMode():
        seen.append(usable(plain))
    assert seen == [False] * 3
    assert usable(plain)


def test_a_layer_reads_the_negative_bit() -> None:
    layer = CayleyConv2d(4, 4, 3, generator=torch.Generator().manual_seed(0)).eval()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))
