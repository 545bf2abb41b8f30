"""A network that does something else for users than while it is bounded is refused, also where that shows nowhere."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.nn import CayleyLinear
from tests.certify.test_trail import Runs, far


def steep(x: Tensor, yes: Any = True) -> Tensor:
    """Return x, with a slope of 1000 far from pixels if told so."""
    return x + (999 * far(x) if yes else far(x))


def hidden_from_modes(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor:
        with torch._C.DisableTorchFunction():
            y.add_(999 * (x - 5).relu())
    return y


def through_memory(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor and not x.requires_grad:
        numbers = (ctypes.c_double * 1).from_address(y.data_ptr())
        numbers[0] += 999 * max(numbers[0] - 5, 0)
    return y


def through_numpy(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor and not x.requires_grad:
        numbers = y.numpy()
        numbers += 999 * (numbers - 5).clip(0)
    return y


def in_a_thread(x: Tensor) -> Tensor:
    made = []
    thread = threading.Thread(target=lambda: made.append(steep(x, type(x) is Tensor)))
    thread.start()
    thread.join()
    return made[0]


def caught(x: Tensor) -> Tensor:
    try:
        return steep(x, hash(x.shape[0]) and type(x) is Tensor)
    except TypeError:
        return steep(x, False)


def caught_refusal(x: Tensor) -> Tensor:
    try:
        return x + 999 * far(x) if type(x) is Tensor else x + far(x)
    except UncertifiableError:
        return x + far(x)


def names_one_tensor(x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, False)
    return steep(x, y is x)


def by_leaf(x: Tensor) -> Tensor:
    return steep(x, not x.is_leaf)


def other_constant(x: Tensor) -> Tensor:
    return x + (999.0 if torch.is_grad_enabled() else 1.0) * far(x)


def other_operands(x: Tensor) -> Tensor:
    a, b = x + far(x), x + far(3 * x)
    return a if not torch.is_grad_enabled() else b


def other_order(x: Tensor) -> Tensor:
    a, b = far(x), 3 * x
    return b - a if torch.is_grad_enabled() else a - b


def count_as_constant(x: Tensor) -> Tensor:
    return x + far(x) * torch.ones(len(x.shape), 1)[:1] if isinstance(x.shape[0], int) else x + far(x)


def written_without_gradients(x: Tensor) -> Tensor:
    y = x + far(x)
    if x.requires_grad:
        with torch.no_grad():
            y.mul_(1 + far(x))
    return y


class Coarse(Tensor):
    """A constant that rounds what it meets."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        result = func(*args, **(kwargs or {}))
        return steep(result) if func in (Tensor.mul, torch.mul) else result


class Steep(TorchDispatchMode):
    """Makes another operation of relu."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * (999 if func is torch.ops.aten.relu.default else 1)


def under_a_mode(x: Tensor, always: bool) -> Tensor:
    with Steep() if always or torch.is_grad_enabled() else nullcontext():
        return x + far(x)


def by_exception(x: Tensor) -> Tensor:
    if x.requires_grad and len(x) == 5:
        raise RuntimeError("not this many")
    return steep(x, x.requires_grad)


def in_a_callback(x: Tensor) -> Tensor:
    y = x + far(x)
    if torch.is_grad_enabled():
        torch.zeros(1).apply_(lambda zero: y.data.add_(999 * far(x.data)) is None)
    return y


def in_a_backward_pass(x: Tensor) -> Tensor:
    y = x + far(x)
    if torch.is_grad_enabled():
        one = torch.ones(1, requires_grad=True)
        one.register_hook(lambda grad: y.data.add_(999 * far(x.data)) is None or None)
        (2 * one).sum().backward()
    return y


def in_place_in_a_thread(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor and not x.requires_grad:
        thread = threading.Thread(target=lambda: y.add_(999 * far(x)))
        thread.start()
        thread.join()
    return y


def in_small_batches(x: Tensor) -> Tensor:
    return torch.cat([steep(y) for y in x.view(2, -1, 3)]) if torch.is_grad_enabled() else x + far(x)


def in_two_parts(x: Tensor) -> Tensor:
    return torch.cat([steep(y) for y in x.split([2, 2])]) if x.requires_grad else x + far(x)


def if_even(x: Tensor) -> Tensor:
    try:
        return steep(x, torch.is_grad_enabled() and x.view(2, -1, 3) is not None)
    except RuntimeError:
        return x + far(x)


def into_a_constant(x: Tensor) -> Tensor:
    y, kept = 999 * far(x), torch.zeros(x.shape[0], 3, dtype=x.dtype)
    if torch.is_grad_enabled():
        kept.copy_(y)
    return x + far(x) + kept + 0 * y


def into_a_memory(x: Tensor) -> Tensor:
    y, kept = 999 * far(x), torch.zeros(3, dtype=x.dtype)
    if torch.is_grad_enabled():
        kept.index_copy_(0, torch.arange(3), y.detach()[0])
    return x + far(x) + kept + 0 * y


def number_by_number(x: Tensor) -> Tensor:
    y = x + far(x)
    return (
        y
        if type(x) is not Tensor or torch.is_grad_enabled()
        else y.apply_(lambda pixel: pixel + 999 * max(0, pixel - 5))
    )


def apart_from_autograd(x: Tensor) -> Tensor:
    y = x + far(x)
    z = y if y.is_inference() else y.clone()
    z.mul_(-20)
    return y - 0.01 * z


def through_data(x: Tensor) -> Tensor:
    y = x + far(x)
    z = y.data if torch.is_grad_enabled() else y.clone()
    z.mul_(3)
    return y + 0.1 * z


def by_range(x: Tensor) -> Tensor:
    return (x + far(x))[:, range(2, -1, -1) if torch.is_grad_enabled() else range(3)]


def called_clone(x: Tensor) -> Tensor:
    def clone(x: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x,)):
            return torch.overrides.handle_torch_function(clone, (x,), x)
        return steep(x)

    return x + far(x) if type(x) is not Tensor else clone(x)


def named_as_another(x: Tensor) -> Tensor:
    def relu(x: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x,)):
            return torch.overrides.handle_torch_function(relu, (x,), x)
        return steep(x)

    relu.__qualname__ = relu.__name__ = "torch.relu"
    return relu(x)


DOES_SOMETHING_ELSE: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda x: steep(x, type(x) is Tensor),
    "class name": lambda x: steep(x, type(x).__name__ == "Tensor"),
    "gradients on": lambda x: steep(x, torch.is_grad_enabled()),
    "requires_grad": lambda x: steep(x, x.requires_grad),
    "grad_fn": lambda x: steep(x, x.grad_fn is not None),
    "grad_fn of a result": lambda x: steep(x, (2 * x).grad_fn is not None),
    "leaf": by_leaf,
    "inference mode": lambda x: steep(x, torch.is_inference_mode_enabled()),
    "inference tensor": lambda x: steep(x, x.is_inference()),
    "text of the shape": lambda x: steep(x, "N" not in str(x.shape)),
    "text of the count": lambda x: steep(x, str(x.shape[0]).isdigit()),
    "type of the count": lambda x: steep(x, isinstance(x.shape[0], int)),
    "hash of the count": caught,
    "text of the tensor": lambda x: steep(x, "Bounded" not in type(x).__repr__(x) if type(x) is not Tensor else True),
    "attributes": lambda x: steep(x, not hasattr(x, "bound")),
    "names": names_one_tensor,
    "a constant": other_constant,
    "operands": other_operands,
    "order": other_order,
    "a constant of another size": count_as_constant,
    "hidden from modes": hidden_from_modes,
    "memory": through_memory,
    "numpy": through_numpy,
    "a thread": in_a_thread,
    "caught refusal": caught_refusal,
    "many images with gradients": lambda x: steep(x, torch.is_grad_enabled() and x.shape[0] != 5),
    "more than 64 that want one": lambda x: steep(x, x.requires_grad and x.size(0) > 64),
    "many plain ones": lambda x: steep(x, type(x) is Tensor and len(x) != 5),
    "wants a gradient while they are off": lambda x: steep(x, x.requires_grad and not torch.is_grad_enabled()),
    "made outside of inference mode": lambda x: steep(x, torch.is_inference_mode_enabled() and not x.is_inference()),
    "an inference tensor outside": lambda x: steep(x, x.is_inference() and not torch.is_inference_mode_enabled()),
    "a gradient from before": lambda x: steep(x, x.grad is not None),
    "the last operation": lambda x: steep(x, type(x.grad_fn).__name__ == "AddBackward0"),
    "a parameter": lambda x: steep(x, isinstance(x, nn.Parameter)),
    "strides": lambda x: steep(x, not x.is_contiguous()),
    "an exception": by_exception,
    "a class of its own": lambda x: x + x * torch.ones(3).as_subclass(Coarse),
    "a mode": lambda x: under_a_mode(x, True),
    "a mode with gradients": lambda x: under_a_mode(x, False),
    "a callback": in_a_callback,
    "a backward pass": in_a_backward_pass,
    "in place in a thread": in_place_in_a_thread,
    "the name of another": named_as_another,
    "called clone": called_clone,
    "small batches": in_small_batches,
    "two parts": in_two_parts,
    "even batches": if_even,
    "into a constant": into_a_constant,
    "into a memory": into_a_memory,
    "number by number": number_by_number,
    "apart from autograd": apart_from_autograd,
    "through data": through_data,
    "a range": by_range,
    "a leaf while they are off": lambda x: steep(
        x, x.requires_grad and not (torch.is_grad_enabled() or isinstance(x, nn.Parameter))
    ),
    "a result while they are off": lambda x: steep(x, x.grad_fn is not None and not torch.is_grad_enabled()),
    "a leaf in inference mode": lambda x: steep(x, x.requires_grad and torch.is_inference_mode_enabled()),
    "strides with gradients": lambda x: steep(x, torch.is_grad_enabled() and not x.is_contiguous()),
    "strides of a leaf": lambda x: steep(x, x.requires_grad and not x.is_contiguous()),
    "a plain number with gradients": lambda x: steep(x, type(x.shape[0]) is int and torch.is_grad_enabled()),
    "a constant of that length": lambda x: steep(
        x, isinstance(x.shape[0], int) and torch.is_grad_enabled() and torch.zeros(x.shape[0]).numel() > 64
    ),
    "a change in place": written_without_gradients,
    "strides of a result": lambda x: steep(x, not (2 * x).is_contiguous()),
    "one image": lambda x: steep(x, x.squeeze(0).ndim == 1),
}  # fmt: skip


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("kind", DOES_SOMETHING_ELSE)
def test_a_network_that_does_something_else_for_users_is_refused(kind: str, images: int) -> None:
    function = DOES_SOMETHING_ELSE[kind]
    net = nn.Sequential(Runs(lambda net, x: function(x)), nn.Linear(3, 2)).eval()
    x = torch.rand(images, 3)
    with pytest.raises(UncertifiableError):
        certify(net, x, torch.zeros(images, dtype=torch.long))
    with pytest.raises(UncertifiableError):
        lipschitz_bound(net, x)


def test_a_layer_that_is_set_to_something_else_with_gradients_is_refused() -> None:
    def turned(net: Runs, x: Tensor, layer: nn.Conv1d) -> Tensor:
        grown = 1000 if torch.is_grad_enabled() else 1
        with torch.no_grad():
            layer.weight.mul_(grown)
        y = layer(x[:, None])[:, 0]
        with torch.no_grad():
            layer.weight.div_(grown)
        return y

    def with_gradients(net: Runs, x: Tensor, layer: nn.Conv1d) -> Tensor:
        before, on = layer.weight, torch.is_grad_enabled()
        layer.weight = nn.Parameter(before.detach() * (1000 if on else 1))
        y = layer(x[:, None])[:, 0]
        layer.weight = before
        return y

    for function in (turned, with_gradients):
        net = Runs(function, nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)).eval()
        with pytest.raises(UncertifiableError):
            lipschitz_bound(net, torch.rand(2, 3))


@pytest.mark.parametrize("function_mode", [False, True])
def test_a_layer_under_a_mode_is_refused(function_mode: bool) -> None:
    class Rewritten(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return 9 * result if func in (F.linear, Tensor.matmul, torch.matmul, Tensor.mm) else result

    def under(net: Runs, x: Tensor, layer: nn.Module) -> Tensor:
        on = torch.is_grad_enabled()
        with (Rewritten() if function_mode else Steep()) if on else nullcontext():
            return layer(x)

    with pytest.raises(UncertifiableError):
        lipschitz_bound(Runs(under, CayleyLinear(3, 3)).eval(), torch.rand(2, 3))


def test_autocast_with_gradients_is_refused() -> None:
    def cast(net: Runs, x: Tensor, layer: nn.Linear) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
            return layer(x).to(x.dtype)

    net = Runs(cast, nn.Linear(3, 2)).eval()
    with pytest.raises(UncertifiableError, match="autocast"):
        certify(net, torch.rand(2, 3), torch.zeros(2, dtype=torch.long), arithmetic="float32")


def test_a_network_that_knows_itself_by_name_is_refused() -> None:
    scales: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()

    def scaled(net: Runs, x: Tensor) -> Tensor:
        return x * scales.get(net, 1.0)

    first = Runs(scaled)
    scales[first] = 3.0
    net = nn.Sequential(first, nn.Linear(3, 2)).eval()
    x = torch.rand(2, 3)
    with pytest.raises(UncertifiableError, match="other scores"):
        certify(net, x, net(x).argmax(1))
