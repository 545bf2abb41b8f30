"""Whether code uses a depthwise convolution's weight as its kernel, as it is, and for nothing else: runs of it say."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.init.adapters import is_adapted
from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.keys import module_key, names_in
from espalier.init.layouts.maps import maps
from espalier.init.layouts.prove import cached
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, run, untraced, watch

# Vectors and numbers of a copy: a factor of 1 would leave a kernel as it is.
_FACTORS = 0.3
# What code names that gets at the weights of a part, and what it may ask of them that is no value of theirs.
_WEIGHTS = re.compile(r"^(weight|_?(named_)?parameters|get_parameter|state_dict|functional_call)$")
_NO_VALUES = {"dtype", "device", "shape", "size", "ndim", "requires_grad"}


class OtherUseError(CannotRunError):
    """A run shows a weight that is used otherwise than as the kernel."""


def prove_kernel(callers: Sequence[tuple[str, nn.Module]], name: str, module: Convolution) -> bool:
    """Return whether every run leaves the convolution to the module's own call, with its weight as the kernel.

    The nearest caller is run always; one farther out only where its code gets at weights, as it may be a whole model.
    One that cannot be run is believed where its code does not.

    Args:
        callers: what runs the module, innermost first, by name; itself first if it has code of its own.
        name: of the convolution.
        module: it.

    Raises:
        OtherUseError: code uses the weight in another way.
        CannotRunError: code may use it in another way, and cannot be run.
    """
    if any(is_adapted(caller) for _, caller in callers):
        return True  # it is measured as it is below the adapter, and not written
    plain, nearest = True, next((caller for _, caller in callers if caller is not module), None)
    for outer, caller in callers:
        itself = caller is module
        if not (itself or caller is nearest or _takes_weights(caller)):
            continue
        path = name[len(outer) :].lstrip(".")
        try:
            plain &= cached((module_key(caller), path, "kernel"), partial(_convolves, caller, path, module))
        except OtherUseError:
            raise
        except CannotRunError as error:
            if itself or _takes_weights(caller):
                raise CannotRunError(f"{type(caller).__name__} may change its weight, and {error}") from error
    return plain


@untraced()
def _convolves(caller: nn.Module, path: str, module: Convolution) -> bool:
    """Return whether a caller's copy leaves the convolution to the module's own call, or raise what else it does."""
    twin = copy_for_probe(caller, _FACTORS)
    part = twin.get_submodule(path) if path else twin
    why = CannotRunError("nothing is known of its inputs")
    for call, _ in maps(caller, module):
        try:
            (first, met, alone), (second, again, _) = (_with_another_kernel(twin, part, call, seed) for seed in (8, 9))
        except CannotRunError as error:
            why = error
            continue
        same = len(first) == len(second) and all(
            a.shape == b.shape and torch.allclose(a, b, 1e-9, 1e-9, equal_nan=True)
            for a, b in zip(first, second, strict=True)
        )
        if same and met and again:
            return alone
        if not same:
            how = "also for something else" if met and again else "changed"
            raise OtherUseError(f"{type(caller).__name__} uses it {how}, so that it is not the kernel")
        why = CannotRunError("it calls no convolution with it")
    raise CannotRunError(f"{type(caller).__name__} does not run on made-up inputs ({why})")


def _with_another_kernel(twin: nn.Module, part: nn.Module, call: Call, seed: int) -> tuple[list[Tensor], int, bool]:
    """Return outputs of a run in which every convolution with the weight takes another kernel, always the same.

    What still depends on the weight uses it otherwise. And how many those are, and whether the module made all of them.
    """
    weight = part.get_parameter("weight")
    # Sixteenths up to six, which half precision has, too.
    weight.copy_(torch.randint(-99, 100, weight.shape, generator=torch.Generator().manual_seed(seed)) / 16)
    with _Convolutions(weight) as seen:
        watch(part, partial(_enter, seen), partial(_leave, seen))
        try:
            outputs = run(twin, call)
        finally:
            del part.forward  # of the instance, which ``watch`` gave it
    return outputs, seen.inside + seen.outside, not seen.outside


def _enter(seen: _Convolutions, *_: Any) -> None:
    seen.depth += 1


def _leave(seen: _Convolutions, _: Any) -> None:
    seen.depth -= 1


class _Convolutions(TorchDispatchMode):
    """Takes another kernel in the place of one of these values, and counts within calls of the module and without."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel, self.depth, self.inside, self.outside = kernel.clone(), 0, 0, 0
        self.other = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(7), dtype=kernel.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self._is_it(args[1]) and not args[6]:  # transposed
            self.inside += self.depth > 0
            self.outside += self.depth == 0
            args = (args[0], self.other.to(args[1].dtype).view_as(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _is_it(self, given: Tensor) -> bool:
        alike = len(given) == len(self.kernel) and given.numel() == self.kernel.numel()
        return alike and torch.equal(given.flatten().to(self.kernel.dtype), self.kernel.flatten())


def _takes_weights(caller: nn.Module) -> bool:
    """Return whether code that a forward may run gets at values of weights that are not its module's own."""
    return any(_gets_at_weights(function.__code__) for function in _reached(caller))


def _gets_at_weights(code: CodeType) -> bool:
    found = [(each.argval, after.argval) for each, after in pairwise(dis.get_instructions(code))]
    named = any(isinstance(name, str) and _WEIGHTS.search(name) and after not in _NO_VALUES for name, after in found)
    return named or any(_gets_at_weights(each) for each in code.co_consts if isinstance(each, CodeType))


def _reached(module: nn.Module) -> Iterator[FunctionType]:
    """Yield a module's forward, and the methods and functions that it calls by name, as deep as they go."""
    held = [vars(cls) for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
    queue: list[Any] = [getattr(module.forward, "__func__", module.forward)]
    queue += [table["forward"] for table in held if "forward" in table]
    met = set[FunctionType]()
    while queue:
        found = queue.pop()
        function = inspect.unwrap(getattr(found, "__func__", getattr(found, "fget", found)))
        if not isinstance(function, FunctionType) or function in met or function.__module__.startswith("torch."):
            continue
        met.add(function)
        yield function
        names = names_in(function.__code__) - _NO_VALUES
        queue += [table[name] for table in (function.__globals__, *held) for name in names if name in table]
