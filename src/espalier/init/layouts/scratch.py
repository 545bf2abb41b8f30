"""Runs of a module that leave no trace: a float64 copy with weights of its own, and inputs made from its signature."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.init.layouts.arguments import ROTARY_NAME, VARIADIC, arguments, is_sequence
from espalier.init.layouts.registry import LAZY, BareCheckpoint, holds_lazy

# A copy holds eight bytes an element; beyond this it is not made.
_LARGEST = 2**28
# Modules that call nothing of their own accord: whoever holds them decides what their parts see.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_ZEROS = re.compile(r"residual|alibi|bias")


class CannotRunError(Exception):
    """A module that cannot be copied or run on made-up inputs, and why."""


@dataclass(frozen=True)
class Call:
    """Inputs that a module runs on: ``length`` tokens."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    length: int


def copy_for_probe(module: nn.Module) -> nn.Module:
    """Return a float64 copy on the CPU, in evaluation mode, without hooks, its weights drawn anew.

    Matrices are uniform with deviation ~ 1/√fan-in, biases 0, other vectors ±1 and numbers ±½, with the signs that they
    have (``signs_of``): so a gate that starts closed is open, a norm acts alike on all its channels, and a factor of −1
    turns what it turns. The original is not touched and not kept alive.

    Raises:
        CannotRunError: the copy would be too large, or something in the module cannot be copied.
    """
    if any(has_own_forward(part) for part in module.modules()):
        raise CannotRunError("its forward was replaced on the instance")
    if holds_lazy(module):
        raise CannotRunError(LAZY)
    parameters = dict(module.named_parameters())
    if sum(parameter.numel() for parameter in parameters.values()) > _LARGEST:
        raise CannotRunError("it is too large to be copied")
    generator = torch.Generator().manual_seed(20240229)
    memo = memo_of_copy(module)
    for name, parameter in parameters.items():
        value = torch.empty(parameter.shape, dtype=torch.float64, device="cpu")
        if parameter.ndim >= 2 and parameter.numel():
            bound = (3 / parameter[0].numel()) ** 0.5
            value.uniform_(-bound, bound, generator=generator)
        else:
            place, _, leaf = name.rpartition(".")
            value.fill_(0.5 if parameter.ndim == 0 else 0.0 if "bias" in leaf else 1.0)
            if (signs := signs_of(module.get_submodule(place), leaf, parameter)) is not None:
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
    except Exception as error:
        raise CannotRunError(f"it cannot be copied ({first_line(error)})") from error
    for part in twin.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
            config._attn_implementation_internal = "eager"  # the copy's own: kernels of other kinds need a GPU
    twin.eval()  # some classes override train() and return nothing
    return twin


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the forward pass was replaced on the instance, by other code than ``torch.compile``'s."""
    return "forward" in vars(module) and not type(module).__module__.startswith("torch._dynamo")


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs as it was written: compiled, it hides what happens in it."""
    # Where nothing was compiled, the compiler is not loaded, which takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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
    if type(parameter) not in (Tensor, nn.Parameter) or parameter.is_meta or parameter.ndim > 1 or "bias" in name:
        return None
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return None
    signs = torch.where(parameter.detach().cpu() < 0, -1.0, 1.0)
    if "norm" in type(owner).__name__.lower() and signs.numel():
        return torch.full_like(signs, -1.0 if float(signs.sum()) < 0 else 1.0)
    return signs


class _ProductByProduct(TorchFunctionMode):
    """Keeps attention from fused kernels, also within code that chooses its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        fused = func is nn.functional.scaled_dot_product_attention
        with sdpa_kernel(SDPBackend.MATH) if fused else nullcontext():
            return func(*args, **(kwargs or {}))


@contextmanager
def untraced() -> Iterator[None]:
    """Run on the CPU without gradients, autocast, fused or compiled code, warnings or a trace in torch's generators."""
    fast, default = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    with (
        warnings.catch_warnings(action="ignore"),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        uncompiled(),
        _ProductByProduct(),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            torch.backends.mha.set_fastpath_enabled(fast)


def run(module: nn.Module, call: Call) -> list[Tensor]:
    """Return the floating-point tensors of a module's output on fresh copies of a call's inputs.

    Raises:
        CannotRunError: it raises, or returns no tensor.
    """
    torch.default_generator.manual_seed(0)  # of the fork that ``untraced`` made: repeated calls draw the same numbers
    try:
        out = module(*fresh(call.args), **fresh(call.kwargs))
    except Exception as error:
        raise CannotRunError(first_line(error)) from error
    tensors = [part for part in leaves(out) if part.is_floating_point()]
    if not tensors:
        raise CannotRunError("it returns no tensor")
    return tensors


def calls(module: nn.Module, width: int, heads: int = 0, given: Collection[str] = ()) -> Iterator[Call]:
    """Yield inputs that a module may run on, the most usual first: made from its signature alone.

    Args:
        module: the module.
        width: of a token.
        heads: query heads, if known: rotary tables are as wide as one.
        given: names of optional arguments that are given, too.
    """
    named = [p for p in arguments(module) if p.kind not in VARIADIC]
    if not named:
        return
    generator = torch.Generator().manual_seed(1)
    first, rest = named[0], named[1:]
    needed = [p for p in rest if p.default is p.empty or p.name in given]
    turned = [p for p in rest if p in needed or (ROTARY_NAME.search(p.name) and p.name != "rotary_pos_emb_dim")]
    share = width // heads if heads and width % heads == 0 else 8
    # Rotary angles are given where they can be; a layer may want them in a form of its own, and do without.
    for needs in [turned, needed] if turned != needed else [needed]:
        rotary = any(ROTARY_NAME.search(p.name) for p in needs)
        widths = _rotary_shapes(module, share) if rotary else [()]
        masks = (False, True) if any("mask" in p.name for p in needs) else (False,)
        for length, turn, zero_masks in itertools.product(_lengths(module, width, share), widths, masks):
            rows = next(side for side in range(int(length**0.5), 0, -1) if length % side == 0)
            shapes = [(1, length, width), (length, 1, width), (length, width), (1, rows, length // rows, width)]
            # At last with channels first: an image, and a signal.
            for place, shape in enumerate([*shapes, shapes[3], shapes[0]]):
                # With mean 0 and size 1, as a norm leaves a token: one inside the module does not change them.
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
                x = nn.functional.layer_norm(x, (width,), eps=0.0) if width > 2 else x
                x = x if place < len(shapes) else x.movedim(-1, 1).contiguous()
                values = {p.name: _argument(p, x, length, turn, heads, zero_masks, generator) for p in needs}
                positional = [values.pop(p.name) for p in needs if p.kind is p.POSITIONAL_ONLY]
                if first.kind is first.KEYWORD_ONLY:
                    yield Call((), {first.name: x, **values}, length)
                else:
                    yield Call((x, *positional), values, length)


def bound(module: nn.Module, call: Call) -> dict[str, Any]:
    """Return a call's inputs by the names of the arguments that take them."""
    try:
        return dict(inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments)
    except TypeError as error:
        raise CannotRunError(f"{type(error).__name__}: {error}") from error


def owner_of(names: Mapping[str, nn.Module], name: str) -> tuple[str, nn.Module] | None:
    """Return the nearest module around ``name`` that has code of its own, and its name, or ``None``."""
    if isinstance(names[""], BareCheckpoint):
        return None
    while name:
        name = name.rpartition(".")[0]
        module = names.get(name)
        if module is None or type(module) is nn.Module or isinstance(module, _CONTAINERS):
            continue
        # A wrapper that hands on whatever it gets knows no more than the module itself.
        kinds = [p.kind for p in arguments(module)]
        if VARIADIC[0] not in kinds and not (VARIADIC[1] in kinds and len(kinds) <= 2):
            return name, module
    return None


@untraced()
def calls_of_part(
    owner: nn.Module, path: str, widths: Sequence[int], heads: int, given: Collection[str] = ()
) -> list[Call]:
    """Return the calls that a copy of an owner makes to one of its parts, from the first made-up input that it takes.

    Args:
        owner: the module.
        path: of the part.
        widths: of a token, to try.
        heads: see ``calls``.
        given: see ``calls``.

    Raises:
        CannotRunError: it runs on none of them, or never calls the part.
    """
    twin = copy_for_probe(owner)
    why, part = "", twin.get_submodule(path)
    seen: list[Call] = []

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(Call(fresh(args), fresh(kwargs), 0))

    part.register_forward_pre_hook(record, with_kwargs=True)
    for width in dict.fromkeys(widths):
        for call in calls(twin, width, heads, given):
            try:
                run(twin, call)
            except CannotRunError as error:
                why = why or str(error)
            if seen:
                return [replace(one, length=count_tokens(part, one, widths[0]) or call.length) for one in seen]
    raise CannotRunError(f"{type(owner).__name__}, which calls it, does not run on made-up inputs ({why})")


def count_tokens(part: nn.Module, call: Call, width: int) -> int:
    """Return the number of tokens of a width in the first input, 0 if it has none."""
    first = next(iter(bound(part, call).values()), None)
    if not isinstance(first, Tensor) or not first.ndim:
        return 0
    channels_first = first.ndim in (3, 4) and first.shape[1] == width != first.shape[-1]
    return first.numel() // (width if channels_first else first.shape[-1])


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


def _lengths(module: nn.Module, width: int, share: int) -> list[int]:
    """Return numbers of tokens to try: one that is no width, and those that a windowed module states."""
    lengths = [length for length in (6, 10) if length not in (width, share)][:1]
    for name in ("window_area", "num_patches", "seq_len", "window_size"):
        stated = getattr(module, name, None)
        if isinstance(stated, int) and 1 < stated <= 400:
            lengths += [stated, stated * stated] if name == "window_size" else [stated]
        elif isinstance(stated, tuple | list) and all(isinstance(size, int) for size in stated):
            lengths.append(torch.Size(stated).numel())
    return [length for length in dict.fromkeys(lengths) if length <= 400]


def _rotary_shapes(module: nn.Module, share: int) -> list[tuple[int, ...]]:
    """Return shapes of a rotary table, −1 where it has its positions."""
    stated = [getattr(module, name, None) for name in ("head_dim", "rotary_ndims", "rotary_dim", "qk_rope_head_dim")]
    known = [width for width in stated if isinstance(width, int) and width > 1]
    # Often half of a head is turned, or a quarter.
    widths = dict.fromkeys([*known, share, share // 2, *(width // 2 for width in known), max(2, share // 4)])
    return [shape for width in widths for shape in ((1, -1, width), (-1, width), (1, -1, 1, width))]


def _argument(
    parameter: inspect.Parameter,
    x: Tensor,
    length: int,
    turn: tuple[int, ...],
    heads: int,
    zeros: bool,
    generator: torch.Generator,
) -> Any:
    """Return what a required argument may be, by its name."""
    name, stated = parameter.name, str(parameter.annotation)
    if ROTARY_NAME.search(name):
        # The same angle for all channels fits every way to pair them.
        angles = (torch.arange(length)[:, None] * torch.full(turn[-1:], 0.3, dtype=torch.float64)).reshape(turn)
        both = {"cos": angles.cos(), "sin": angles.sin()}
        told = [wave for word, wave in both.items() if word in name.split("_")]
        if not told and (stated == "torch.Tensor" or "freqs" in name):
            return torch.polar(torch.ones_like(angles), angles)
        return told[0] if len(told) == 1 else tuple(both.values())
    made = (
        ("mask" in name, torch.zeros(1, 1, length, length, dtype=torch.float64) if zeros else None),
        (name == "alibi", torch.zeros(max(heads, 1), 1, length, dtype=torch.float64)),
        (_ZEROS.search(name), torch.zeros_like(x)),
        ("cu_seqlens" in name, torch.tensor([0, length], dtype=torch.int32)),
        (re.search(r"position_ids|positions|^pos$", name), torch.arange(length)[None]),
        (name.lower() in ("h", "height"), 2),
        (name.lower() in ("w", "width"), length // 2),
        (re.search(r"past|cache", name), None),
        (re.search(r"^output|^use_|^return", name) or stated == "bool", False),
        (stated == "int", 0),
    )
    for holds, value in made:
        if holds:
            return value
    if is_sequence(parameter) or "Tensor" in stated or parameter.annotation is parameter.empty:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return None


def first_line(error: Exception) -> str:
    """Return what an error is and says, in a line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:120] if text else type(error).__name__
