"""Runs of a module that leave no trace: a float64 copy with weights of its own, watched or not, and its owner."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from espalier.init.layouts.arguments import VARIADIC, arguments
from espalier.init.layouts.registry import LAZY, BareCheckpoint, holds_lazy
from espalier.randomness import generators_kept

# A copy holds eight bytes an element; beyond this it is not made.
_LARGEST = 2**28
# ``b_Q`` and ``bq`` are biases in code that has its matrices as ``W_Q`` and ``Wq``.
_BIAS = re.compile(r"bias|^_?b(_[a-zA-Z]+|[qkvoQKVO])?$")
_GAIN = re.compile(r"(^|_)(gamma|gain|scale|temperature|tau)$")
# Modules that call nothing of their own accord: whoever holds them decides what their parts see.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class CannotRunError(Exception):
    """A module that cannot be copied or run on made-up inputs, and why."""


@dataclass(frozen=True)
class Call:
    """Inputs that a module runs on: ``length`` tokens; ``supposed`` if no name says what one of them is."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    length: int
    supposed: bool = False


def copy_for_probe(module: nn.Module, vectors: float = 1.0) -> nn.Module:
    """Return a float64 copy on the CPU, in evaluation mode, without hooks, its weights drawn anew.

    Matrices are uniform with deviation ~ 1/√fan-in, biases 0, other vectors ±1 and numbers ±½, with the signs that they
    have (``signs_of``): so a gate that starts closed is open, a norm acts alike on all its channels, and a factor of −1
    turns what it turns. The original is not touched and not kept alive.

    Args:
        module: the module.
        vectors: the size of the entries of vectors that are no biases.

    Raises:
        CannotRunError: the copy would be too large, or something in the module cannot be copied.
    """
    if any(has_own_forward(part) for part in module.modules()):
        raise CannotRunError("its forward was replaced on the instance")
    if holds_lazy(module):
        raise CannotRunError(LAZY)
    if any(isinstance(part, torch.jit.ScriptModule) and [*part.parameters()] for part in module.modules()):
        raise CannotRunError("a part of it with weights is compiled by torch.jit")
    parameters = dict(module.named_parameters())
    if sum(parameter.numel() for parameter in parameters.values()) > _LARGEST:
        raise CannotRunError("it is too large to be copied")
    generator = torch.Generator().manual_seed(20240229)
    memo = memo_of_copy(module)
    for name, parameter in parameters.items():
        value = torch.empty(parameter.shape, dtype=torch.float64, device="cpu")
        place, _, leaf = name.rpartition(".")
        owner = module.get_submodule(place)
        if is_bias(owner, leaf) and ("bias" not in leaf or is_vector(leaf, parameter)):  # and no table of positions
            value.zero_()
        elif not is_vector(leaf, parameter) and parameter.numel():
            bound = (3 / parameter[0].numel()) ** 0.5
            value.uniform_(-bound, bound, generator=generator)
        else:
            value.fill_(0.5 if parameter.ndim == 0 else vectors)
            if (signs := signs_of(owner, leaf, parameter)) is not None:
                value.mul_(signs)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise CannotRunError(f"its buffer {name} is on the meta device")
        memo[id(buffer)] = buffer.detach().to("cpu", torch.float64 if buffer.is_floating_point() else None, copy=True)
    # FSDP2 gives each module a class of its own, which forbids copies; the class below it does not.
    sharded = [(part, nn.Module.__new__(base)) for part in module.modules() if (base := _below_fsdp(type(part)))]
    memo.update((id(part), twin) for part, twin in sharded)
    try:
        for part, bare in sharded:
            bare.__dict__.update(
                (key, copy.deepcopy(value, memo)) for key, value in vars(part).items() if "composable_api" not in key
            )
        twin = copy.deepcopy(module, memo)
    except (Exception, SystemExit) as error:
        raise CannotRunError(f"it cannot be copied ({first_line(error)})") from error
    for part in twin.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa") and not own_function(part):
            config._attn_implementation_internal = "eager"  # the copy's own: kernels of other kinds need a GPU
    twin.eval()  # some classes override train() and return nothing
    return twin


def own_function(module: nn.Module) -> str:
    """Return the name under which a user registered the attention function that a transformers module calls, or ""."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    known = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    function = known.get(name) if isinstance(name, str) else None
    place = str(getattr(function, "__globals__", {}).get("__name__", "transformers"))
    return str(name) if function is not None and place.partition(".")[0] != "transformers" else ""


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the forward pass was replaced on the instance, by other code than ``torch.compile``'s."""
    return "forward" in vars(module) and not type(module).__module__.startswith("torch._dynamo")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code, and what is compiled meanwhile, as it was written: compiled, it hides what happens in it."""
    # Where nothing was compiled, the compiler is not loaded, which takes seconds.
    plain = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    kept = torch.compile

    def as_written(model: Any = None, **_: Any) -> Any:
        return model if model is not None else lambda wrapped: wrapped

    try:
        torch.compile = as_written
        with plain:
            yield
    finally:
        torch.compile = kept


def memo_of_copy(module: nn.Module) -> dict[int, Any]:
    """Return what ``copy.deepcopy`` is to take for some things in a module, so that it can be copied.

    Hooks may hold anything, and may do anything: the copy has none. Tensors that a forward pass left (an attention map,
    a computed weight) belong to a graph, which torch does not copy.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        memo.update((id(value), type(value)()) for key, value in vars(part).items() if "_hooks" in key)
        memo.update((id(tensor), tensor.detach().clone()) for tensor in leaves(vars(part)) if not tensor.is_leaf)
    return memo


def signs_of(owner: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """Return the signs that a copy keeps of a parameter, 1 for zero: those of vectors and numbers that are no biases.

    Those of a norm are all that of most: training turns single gains, and those say nothing of the layer.

    Args:
        owner: the module that holds it.
        name: of the parameter in there.
        parameter: the parameter; there is nothing to keep of one that is nowhere, or in pieces.
    """
    if type(parameter) not in (Tensor, nn.Parameter) or parameter.is_meta or is_bias(owner, name):
        return None
    if not is_vector(name, parameter) or not parameter.is_floating_point() or parameter.element_size() < 2:
        return None
    signs = torch.where(parameter.detach().cpu() < 0, -1.0, 1.0)
    if "norm" in type(owner).__name__.lower() and signs.numel():
        return torch.full_like(signs, -1.0 if float(signs.sum()) < 0 else 1.0)
    return signs


def has_numbers(module: nn.Module) -> bool:
    """Return whether a module or a part of it, a norm apart, has a vector that is no bias: a factor, a gate, a mix."""
    return any(
        parameter.ndim and is_vector(name, parameter) and not is_bias(part, name)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if not (is_lazy(parameter) or "norm" in type(part).__name__.lower())
    )


def is_bias(owner: nn.Module, name: str) -> bool:
    """Return whether a module's parameter or buffer of this name is a bias: what is called b may be a factor.

    A bias of every head, (H, K), has two axes as a factor has, and stands beside the matrices of every head.
    """
    own = {**owner._buffers, **owner._parameters}
    if not _BIAS.search(name) or "bias" in name or (value := own.get(name)) is None or is_lazy(value):
        return bool(_BIAS.search(name))
    wide = [size for size in value.shape if size > 1]
    matrices = [part.shape for part in own.values() if part is not None and not is_lazy(part) and part.ndim == 3]
    return len(wide) < 2 or (len(wide) == 2 and any(m[0] == wide[0] and wide[1] in m[1:] for m in matrices))


def is_vector(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a number or a vector, whatever its axes of one: (H, 1, 1) is a factor a head.

    So is a gain of several axes, (H, 1, k) for each head and channel, which its name tells.
    """
    gain = _GAIN.search(name) and parameter.ndim > 2
    return bool(gain) or (sum(size > 1 for size in parameter.shape) < 2 and (parameter.ndim != 2 or name != "weight"))


class _ProductByProduct(TorchFunctionMode):
    """Keeps attention from fused kernels, also within code that chooses its own, and all of a run in float64.

    Code that asks for float32 (a time, positions) would meet float64 weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # What torch calls within its own function is not seen here.
        fused = func in (nn.functional.scaled_dot_product_attention, nn.functional.multi_head_attention_forward)
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        kwargs = {key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()}
        with sdpa_kernel(SDPBackend.MATH) if fused else nullcontext():
            return func(*args, **kwargs)


@contextmanager
def untraced() -> Iterator[None]:
    """Run on the CPU without gradients, autocast, fused or compiled code, words or a trace in a generator."""
    fast, default = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    silenced = logging.root.manager.disable
    with (
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),  # where torch.fx prints a traceback of every error before it is raised
        generators_kept(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        uncompiled(),
        _ProductByProduct(),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_default_dtype(torch.float64)
        logging.disable()
        try:
            yield
        finally:
            logging.disable(silenced)
            torch.set_default_dtype(default)
            torch.backends.mha.set_fastpath_enabled(fast)


def run(module: nn.Module, call: Call) -> list[Tensor]:
    """Return the floating-point tensors of a module's output on fresh copies of a call's inputs.

    Raises:
        CannotRunError: it raises, or returns no tensor.
    """
    # All three are put back by ``untraced``: repeated calls draw the same numbers.
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    try:
        out = module(*fresh(call.args), **fresh(call.kwargs))
    except (Exception, SystemExit) as error:
        raise CannotRunError(first_line(error)) from error
    tensors = [part for part in leaves(out) if part.is_floating_point()]
    if not tensors:
        raise CannotRunError("it returns no tensor")
    return tensors


def watch(
    part: nn.Module,
    enter: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Any] | None],
    leave: Callable[[Any], None] | None = None,
) -> None:
    """Tell of every call of a scratch copy, also of its ``forward`` alone, which runs no hook.

    Args:
        part: the copy, or a part of one.
        enter: takes the arguments and those by name, and may return others in their place.
        leave: takes what is returned, or ``None`` after an exception.
    """
    forward = part.forward

    @functools.wraps(forward)
    def told(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = enter(args, kwargs) or (args, kwargs)
        out = None
        try:
            out = forward(*args, **kwargs)
        finally:
            if leave is not None:
                leave(out)
        return out

    part.forward = told


def bound(module: nn.Module, call: Call) -> dict[str, Any]:
    """Return a call's inputs by the names of the arguments that take them."""
    try:
        return dict(inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments)
    except TypeError as error:
        raise CannotRunError(f"{type(error).__name__}: {error}") from error


def owner_of(names: Mapping[str, nn.Module], name: str) -> tuple[str, nn.Module] | None:
    """Return the nearest module around ``name`` that has code of its own, and its name, or ``None``.

    One whose forward names no arguments is asked only where none above does: with several parts, or a forward of
    another's, it may hand on to each what it likes.
    """
    nameless: tuple[str, nn.Module] | None = None
    if isinstance(names[""], BareCheckpoint):
        return None
    while name:
        name = name.rpartition(".")[0]
        module = names.get(name)
        if module is None or type(module) is nn.Module or isinstance(module, CONTAINERS):
            continue
        # A wrapper that hands on whatever it gets knows no more than the module itself.
        kinds = [p.kind for p in arguments(module)]
        if VARIADIC[0] not in kinds and not (VARIADIC[1] in kinds and len(kinds) <= 2):
            return name, module
        if nameless is None and (len(list(module.children())) > 1 or has_own_forward(module)):
            nameless = name, module
    return nameless


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dictionaries and output records."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)


def fresh(value: Any) -> Any:
    """Return nested arguments with every tensor cloned, so that a module that writes to its input spoils nothing."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: fresh(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(fresh, value))
    return value


def _below_fsdp(cls: type) -> type[nn.Module] | None:
    return cls.__bases__[-1] if "__deepcopy__" in vars(cls) and cls.__bases__[0].__name__ == "FSDPModule" else None


def first_line(error: BaseException) -> str:
    """Return what an error is and says, in a line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:120] if text else type(error).__name__
