"""An upper bound on the ℓ2 Lipschitz constant of a network, or the name of the module that has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from espalier.errors import EspalierError
from espalier.nn.lipschitz.constant import Lipschitz, LipschitzComposite

Rule = Callable[[Any], float]


class UncertifiableError(EspalierError):
    """No Lipschitz constant can be stated for a module; the message names the module and says why.

    Args:
        reason: why not, and what to do.
        module: path and class of the module; a rule leaves it out, the walk adds it.
    """

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(f"no Lipschitz constant for {module}: {reason}" if module else reason)
        self.module = module


_RULES: dict[type[nn.Module], Rule] = {}


def register_lipschitz(*classes: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Make a function known as the ℓ2 Lipschitz constant of modules of ``classes`` (decorator).

        @register_lipschitz(MyLayer)
        def my_layer(module: MyLayer) -> float:
            return spectral_norm(module.weight)

    The rule is asked with the module at every call, so it sees the present weights and mode; it may raise
    ``UncertifiableError`` with the reason alone, the path is added. It holds for subclasses that keep ``forward``. Your
    own modules can state their constant themselves instead: see ``espalier.nn.lipschitz``.

    Args:
        classes: the module classes; a second registration replaces the first.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(classes, rule))
        return rule

    return register


def lipschitz_bound(net: nn.Module) -> float:
    """Return an upper bound on the ℓ2 Lipschitz constant of ``net`` with its present weights and mode.

    The product of what its modules state, rounded up: ``nn.Sequential`` is walked, a module with
    ``lipschitz_constant`` (or ``lipschitz_constant_from``) is believed, the layers of torch that
    ``espalier.certify.rules`` knows are computed, and everything else is refused: a forward pass can hold anything.

    Args:
        net: the network, its input normalisation included.

    Raises:
        UncertifiableError: a module without a known finite constant, named by its path.
    """
    return _bound(net, "")


def chain(net: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a composition in order, with their paths: ``nn.Sequential`` opened, all else as it is.

    Raises:
        UncertifiableError: a container that is not the plain composition it looks like.
    """
    if isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward:
        _refuse_changed(net, path)
        for name, child in net.named_children():
            yield from chain(child, f"{path}.{name}" if path else name)
    else:
        yield path, net


def product_up(constants: Iterator[float]) -> float:
    """Return the product of non-negative factors, rounded up at every step that rounds."""
    total = 1.0
    for constant in constants:
        exact = 1.0 in (total, constant) or 0.0 in (total, constant)
        total = total * constant if exact else math.nextafter(total * constant, math.inf)
    return total


def _bound(net: nn.Module, path: str) -> float:
    return product_up(module_bound(module, where) for where, module in chain(net, path))


def module_bound(module: nn.Module, path: str) -> float:
    """Return the constant of one module that is not a plain composition.

    Args:
        module: the module.
        path: its name, for the error.

    Raises:
        UncertifiableError: no finite constant is known.
    """
    _refuse_changed(module, path)
    try:
        constant = float(_stated(module, path))
    except UncertifiableError as error:
        if error.module:
            raise
        raise _refusal(module, path, str(error)) from None
    if not math.isfinite(constant) or constant < 0:
        raise _refusal(module, path, f"its constant is {constant}: are its weights finite?")
    return constant


def _stated(module: nn.Module, path: str) -> float:
    rule = _rule(type(module))
    if rule is not None:
        return rule(module)
    if isinstance(module, LipschitzComposite) and _speaks_for_itself(module, "lipschitz_constant_from"):
        names = {child: name for name, child in module.named_modules()}
        return module.lipschitz_constant_from(
            lambda child: _bound(child, ".".join(filter(None, (path, names.get(child, "?")))))
        )
    if isinstance(module, Lipschitz) and _speaks_for_itself(module, "lipschitz_constant"):
        return module.lipschitz_constant()
    raise UncertifiableError(
        "nothing is known about its forward pass: give it lipschitz_constant(), or register_lipschitz a rule"
    )


def _rule(cls: type[nn.Module]) -> Rule | None:
    # A subclass that brings its own forward is another function: the rule of its parent says nothing about it.
    known = (parent for parent in cls.__mro__ if parent in _RULES)
    return next((_RULES[parent] for parent in known if cls.forward is parent.forward), None)


def _speaks_for_itself(module: nn.Module, method: str) -> bool:
    """Say whether the statement is at least as derived as the forward pass that it is about."""
    order = type(module).__mro__
    return _first(order, method) <= _first(order, "forward")


def _first(order: tuple[type, ...], name: str) -> int:
    return next(index for index, cls in enumerate(order) if name in vars(cls))


def _refuse_changed(module: nn.Module, path: str) -> None:
    """Refuse a module whose call is not its class's forward pass."""
    if "forward" in vars(module):
        raise _refusal(module, path, "its forward pass was replaced on the instance")
    if module._forward_hooks or module._forward_pre_hooks:
        raise _refusal(module, path, "a forward hook can change what it computes: remove the hook")


def _refusal(module: nn.Module, path: str, reason: str) -> UncertifiableError:
    kind = type(module).__name__
    return UncertifiableError(reason, f"{path} ({kind})" if path else kind)
