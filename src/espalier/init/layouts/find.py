"""Which modules of a model are layers that can be written: registered ones, proven guesses, and why the rest is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init.layouts.names import looks_like_attention, reads_cross, says_cross
from espalier.init.layouts.probe_depthwise import align
from espalier.init.layouts.prove import prove, prove_use
from espalier.init.layouts.registry import (
    COMPUTED,
    GUESSES,
    LAYOUTS,
    AttentionWeights,
    DepthwiseWeights,
    Found,
    Layout,
    Skipped,
    class_path,
    refuse_computed,
)
from espalier.init.sharded import whole

_EMPTY = "its weights have no elements here (ZeRO-3 keeps them elsewhere): write before sharding"
_CROSS = Skipped("attention", "cross-attention compares two sequences: left alone")


def find_layers(model: nn.Module, *, shapes: bool = False) -> Iterator[tuple[str, str, Found]]:
    """Yield ``(name, host class, weights)`` for every layer that a layout knows, in module order, each module once.

    Modules inside a recognised one are not looked at again. A class that nobody registered gives weights only where a
    run of the module proves them (see ``probe_attention``), and a module that looks like attention but is not
    understood gives ``Skipped``, so that no attention layer goes without a row. The views of a sharded layer are of its
    whole weights, gathered when it is yielded; what was written to them reaches the shards when the next one is asked
    for.

    Args:
        model: any module.
        shapes: gather nothing; the views of sharded layers are then on the meta device.

    Raises:
        EspalierError: a module lacks an attribute that its layout reads (another version of the class).
    """
    names = dict(model.named_modules())
    attention = {name for name, module in names.items() if _is_attention(module)}
    # What has attention inside it is named for that: the innermost is the layer.
    attention -= {name[:dot] for name in attention for dot in _dots(name)} | ({""} if len(attention) > 1 else set())
    inside: list[str] = []
    for name, module in names.items():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        with whole(module, shapes=True):
            found = _read(names, name, module)
        if found is None:
            if name in attention:
                yield name, type(module).__name__, _not_understood(module)
            continue
        prefix = f"{name}." if name else ""
        inside.append(prefix)
        with whole(module, shapes=shapes) as sharded:
            if sharded:
                found = _read(names, name, module)
                assert found is not None
            layers = found if isinstance(found, Mapping) else {"": found}
            for child, weights in layers.items():
                yield prefix + child if child else name, type(module).__name__, weights


def _read(names: Mapping[str, nn.Module], name: str, module: nn.Module) -> Found | Mapping[str, Found] | None:
    """Return what may be written of a module, or why it may not, or ``None`` where nothing is recognised."""
    host = next((cls for cls in type(module).__mro__ if class_path(cls) in LAYOUTS), None)
    if host is None:
        return _guess(names, name, module)
    layout, kind = LAYOUTS[class_path(host)]
    found = _apply(layout, kind, name, module)
    if isinstance(found, Mapping):
        # A subclass may call its parts as it likes: they are looked at one by one.
        own = _has_own_code(type(module), host)
        return (
            None if own else {child: _vet(f"{name}.{child}".lstrip("."), module, part) for child, part in found.items()}
        )
    if found is None or isinstance(found := _vet(name, module, found), Skipped):
        return found
    if isinstance(found, DepthwiseWeights) and kind == "depthwise" and host.__module__.startswith("torch."):
        return align(names, name, module, found, own_code=_has_own_code(type(module), host))
    if _has_own_code(type(module), host):
        return prove(names, name, module, found, layout)
    if host is nn.MultiheadAttention and isinstance(found, AttentionWeights):
        return prove_use(names, name, module, found)
    return found


def _guess(names: Mapping[str, nn.Module], name: str, module: nn.Module) -> Found | None:
    """Return the first guess that a run of the module proves, else why the first is not proven."""
    refused: Found | None = None
    for guess in GUESSES:
        found = _apply(guess, "ssm" if "conv1d" in module._modules else "attention", name, module)
        assert not isinstance(found, Mapping)
        if found is not None and not isinstance(found := _vet(name, module, found), Skipped):
            found = prove(names, name, module, found, guess)
        if found is not None and not isinstance(found, Skipped):
            return found
        refused = refused or found
    return refused


def _apply(layout: Layout, kind: str, name: str, module: nn.Module) -> Found | Mapping[str, Found] | None:
    try:
        found = layout(module)
        if found is not None and any(parameter.numel() == 0 for parameter in module.parameters()):
            return Skipped(kind, _EMPTY)
        return found
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        # What a layout takes for granted does not hold: the row says so, and the other layers go on.
        if any(hasattr(part, "base_layer") or hasattr(part, "lora_A") for part in module.modules()):
            return Skipped(kind, "it carries an adapter (LoRA): write the base model, then add adapters")
        if any(parameter.numel() == 0 for parameter in module.parameters()):
            return Skipped(kind, _EMPTY)
        return Skipped(kind, f"its layout cannot read it ({type(error).__name__}: {error}): register one for its class")
    except AttributeError as error:
        host = class_path(type(module))
        raise EspalierError(f"layer {name!r} is a {host}, but {error}: register a layout for this class") from error


def _vet(name: str, module: nn.Module, found: Found) -> Found:
    """Return what a layout read, or why it must not be written whatever the module computes."""
    if isinstance(found, Skipped):
        return found
    kind = "attention"
    if isinstance(found, AttentionWeights):
        if reads_cross(name) or says_cross(module):
            return _CROSS
    else:
        kind = "depthwise" if isinstance(found, DepthwiseWeights) else "ssm"
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    views = [view for field in vars(found).values() for view in (field if isinstance(field, tuple) else (field,))]
    if any(isinstance(view, Tensor) and view.untyped_storage()._cdata not in own for view in views):
        return Skipped(kind, COMPUTED)
    return refuse_computed(module, kind) or found


def _has_own_code(cls: type, host: type) -> bool:
    """Return whether a subclass of a registered class redefines anything of it."""
    theirs = {
        name for base in host.__mro__ if base is not nn.Module and issubclass(base, nn.Module) for name in vars(base)
    }
    theirs = (theirs | {"forward", "__init__"}) - {"__module__", "__doc__", "__annotations__", "__constants__"}
    theirs -= {"__parameters__", "__orig_bases__", "__static_attributes__", "__firstlineno__"}
    between = cls.__mro__[: cls.__mro__.index(host)]
    return any(theirs & set(vars(base)) for base in between if base is not nn.Module)


def _is_attention(module: nn.Module) -> bool:
    registered = LAYOUTS.get(class_path(type(module)))
    return looks_like_attention(module) or (registered is not None and registered[1] == "attention")


def _not_understood(module: nn.Module) -> Skipped:
    """Return why a module that looks like attention is left alone."""
    children = {name for name, _ in module.named_children()}
    if any(name.startswith(("kv_a_proj", "kv_down", "kv_a")) for name in children):
        return Skipped(
            "attention", "multi-head latent attention: its keys and values go through a latent, no layout yet"
        )
    if says_cross(module):
        return _CROSS
    return Skipped("attention", "it looks like attention, in a form that no layout knows: register one for its class")


def _dots(name: str) -> list[int]:
    return [position for position, letter in enumerate(name) if letter == "."]
