"""Whether code uses a depthwise convolution's weight as its kernel, as it is, and for nothing else: runs of it say."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.init.adapters import is_adapted
from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.at_home import is_at_home
from espalier.init.layouts.keys import module_key, names_in
from espalier.init.layouts.maps import maps
from espalier.init.layouts.owners import calls_of_owner
from espalier.init.layouts.prove import cached, token_widths
from espalier.init.layouts.scratch import (
    Call,
    CannotRunError,
    copy_for_probe,
    has_own_forward,
    leaves,
    run,
    untraced,
    watch,
)

# Vectors and numbers of a copy: a factor of 1 would leave a kernel as it is.
_FACTORS = 0.3
# What code names that gets at the weights of a part, and what it may ask of them that is no value of theirs.
_WEIGHTS = re.compile(r"^(weight|_?(named_)?parameters|get_parameter|state_dict|functional_call)$")
_NO_VALUES = {"dtype", "device", "shape", "size", "ndim", "requires_grad"}


class OtherUseError(CannotRunError):
    """A run shows a weight that is used otherwise than as the kernel."""


def prove_kernel(callers: Sequence[tuple[str, nn.Module]], name: str, module: Convolution) -> bool:
    """Return whether every run convolves as the module's own call does, with its weight as the kernel.

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
        # What is ours is tested as such, and a block of it may be too large for a copy.
        ours = type(caller).__module__.startswith("espalier.") and is_at_home(caller, type(caller))
        ours = ours and not has_own_forward(caller)
        if not itself and (ours or not (caller is nearest or _takes_weights(caller, module))):
            continue
        path = name[len(outer) :].lstrip(".")
        try:
            plain &= cached((module_key(caller), path, "kernel"), partial(_convolves, caller, path, module))
        except OtherUseError:
            raise
        except CannotRunError as error:
            if itself or _takes_weights(caller, module):
                raise CannotRunError(f"{type(caller).__name__} may change its weight, and {error}") from error
    return plain


@untraced()
def _convolves(caller: nn.Module, path: str, module: Convolution) -> bool:
    """Return whether a caller's copy convolves as the module's own call does, or raise what else it does."""
    twins = [copy_for_probe(caller, _FACTORS) for _ in range(2)]  # each keeps what it keeps of earlier runs
    why, begun = CannotRunError("nothing is known of its inputs"), list[bool]()
    over_time = token_widths(caller) if len(module.kernel_size) == 1 else []
    made = chain((call for call, _ in maps(caller, module)), calls_of_owner(caller, over_time, 1, ()))
    for call in made:
        seen = [_Convolutions(twin, path, module, seed) for seed, twin in enumerate(twins)]
        try:
            first, second = (each.outputs(twin, call) for each, twin in zip(seen, twins, strict=True))
        except CannotRunError as error:
            why = error
            # What stands behind the convolution may want a GPU.
            begun += [seen[0].alike] * (seen[0].met and not seen[0].read)
            continue
        same = len(first) == len(second) and all(
            a.shape == b.shape and torch.allclose(a, b, 1e-9, 1e-9, equal_nan=True)
            for a, b in zip(first, second, strict=True)
        )
        met = all(each.met for each in seen)
        if same and met:
            return seen[0].alike
        if not same:
            how = "also for something else" if met else "changed"
            raise OtherUseError(f"{type(caller).__name__} uses it {how}, so that it is not the kernel")
        why = CannotRunError("it calls no convolution with it")
    if begun:
        return all(begun)
    raise CannotRunError(f"{type(caller).__name__} does not run on made-up inputs ({why})")


class _Convolutions(TorchDispatchMode):
    """Draws a weight, and in every convolution that takes it as it is puts another kernel, always the same.

    What still depends on the weight uses it otherwise.

    Attributes:
        met: whether there is such a convolution.
        alike: whether all have the module's stride, padding and dilation, or are its own.
        read: whether anything else outside of the module takes the weight's values.
    """

    def __init__(self, twin: nn.Module, path: str, module: Convolution, seed: int) -> None:
        super().__init__()
        self.part = twin.get_submodule(path) if path else twin
        self.options = [list(each) for each in (module.stride, module.padding, module.dilation)]
        self.weight, generator = self.part.get_parameter("weight"), torch.Generator().manual_seed(seed)
        # Sixteenths up to six, which half precision has, too.
        self.weight.copy_(torch.randint(-99, 100, self.weight.shape, generator=generator) / 16)
        self.kernel = self.weight.clone()
        self.other = torch.randn(self.kernel.shape, generator=torch.Generator().manual_seed(7))
        self.depth, self.met, self.alike, self.read = 0, False, True, False

    def outputs(self, twin: nn.Module, call: Call) -> list[Tensor]:
        """Return what a run gives."""
        watch(self.part, lambda *_: self._go(1), lambda _: self._go(-1))
        try:
            with self:
                return run(twin, call)
        finally:
            del self.part.forward  # of the instance, which ``watch`` gave it

    def _go(self, deeper: int) -> None:
        self.depth += deeper

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self._is_it(args[1]) and not args[6]:  # transposed
            out = func(args[0], self.other.to(args[1].dtype).view_as(args[1]), *args[2:])
            self.met = True  # by inputs that it takes
            self.alike &= self.depth > 0 or [list(each) for each in args[3:6]] == self.options
            return out
        if not self.depth and not func.is_view:
            held = self.weight.untyped_storage()._cdata
            self.read |= any(each.untyped_storage()._cdata == held for each in leaves(args))
        return func(*args, **(kwargs or {}))

    def _is_it(self, given: Tensor) -> bool:
        alike = len(given) == len(self.kernel) and given.numel() == self.kernel.numel()
        return alike and torch.equal(given.flatten().to(self.kernel.dtype), self.kernel.flatten())


def _takes_weights(caller: nn.Module, module: nn.Module) -> bool:
    """Return whether code that a forward may run gets at values of weights that may be a module's within it."""
    others = {name for name, part in caller.named_children() if all(each is not module for each in part.modules())}
    return any(_gets_at_weights(function.__code__, others) for function in _reached(caller))


def _gets_at_weights(code: CodeType, others: set[str]) -> bool:
    """Return whether code names weights, but for those of parts of its own by these names."""
    names = [None, None, *(each.argval for each in dis.get_instructions(code))]
    found = zip(names, names[1:], names[2:], [*names[3:], None], strict=False)
    named = any(
        isinstance(name, str) and _WEIGHTS.search(name) and after not in _NO_VALUES
        and not (owner == "self" and part in others)
        for owner, part, name, after in found
    )  # fmt: skip
    return named or any(_gets_at_weights(each, others) for each in code.co_consts if isinstance(each, CodeType))


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
