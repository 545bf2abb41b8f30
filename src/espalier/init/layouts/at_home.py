"""Whether a class that is registered still runs its library's code, on which its layout stands."""

from __future__ import annotations

from torch import Tensor, nn

from espalier.init.layouts.registry import AttentionWeights, Found, Layout, Skipped, attribute
from espalier.init.layouts.scratch import own_function

# Factors of scores that a class computes as it is built.
_FACTORS = ("scaling", "scale", "softmax_scale", "norm_factor", "inv_norm_factor")


def foreign_part(module: nn.Module, host: type, layout: Layout, found: Found) -> Skipped | None:
    """Return why a class's own layout does not hold for a module in which code of another's stands, or ``None``.

    What is registered here vouches for a library's code: not for a linear layer that was put in its place, a forward
    that was patched into a class, or a function that was registered with the library. What a user registers is taken at
    its word.
    """
    if isinstance(found, Skipped) or not is_ours(layout):
        return None
    if isinstance(found, AttentionWeights):
        if function := own_function(module):
            return Skipped("attention", f"it calls the attention function {function!r}, which is not its library's")
        factors = {name: attribute(module, name) for name in _FACTORS}
        if turned := [name for name, value in factors.items() if isinstance(value, int | float) and value < 0]:
            return Skipped("attention", f"its {turned[0]} is below zero")
    held = {view.untyped_storage()._cdata for view in vars(found).values() if isinstance(view, Tensor)}
    for name, part in module.named_modules():
        # torch's own layer takes its output projection's weight and never calls it.
        if name and host is nn.MultiheadAttention:
            continue
        holds = any(parameter.untyped_storage()._cdata in held for parameter in part.parameters())
        if holds and not is_at_home(part, host):
            words = f"{name or 'it'} ({type(part).__name__}) runs code that is not its library's"
            return Skipped(found.kind, f"{words}: write before it is replaced, or register a layout for its class")
    return None


def foreign_beside(module: nn.Module, host: type, layout: Layout) -> str:
    """Return in words which part without weights that are written, a norm, say, runs code of another's, or ""."""
    if host is nn.MultiheadAttention or not is_ours(layout):
        return ""
    names = (f"{name} ({type(part).__name__})" for name, part in module.named_modules() if not is_at_home(part, host))
    return next((f"{name} runs code that is not its library's" for name in names), "")


def is_ours(layout: Layout) -> bool:
    """Return whether a layout is one of this library, and no user's."""
    return str(getattr(layout, "func", layout).__module__).startswith("espalier.")


def is_at_home(module: nn.Module, host: type) -> bool:
    """Return whether calling a module runs code of torch's or of the library of ``host``."""
    homes = {"torch", host.__module__.partition(".")[0]}
    for name in ("forward", "__call__"):
        code = getattr(type(module), name, None)
        while code is not None:  # a function that wraps another takes over its module's name, but not its globals
            place = getattr(code, "__globals__", {}).get("__name__") or getattr(code, "__module__", "")
            if str(place).partition(".")[0] not in homes:
                return False
            code = getattr(code, "__wrapped__", None)
    return True
