"""The public surface with its signatures; ``python tests/test_surface.py`` writes it anew, for a reviewed change."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import espalier

SURFACE = Path(__file__).parent / "public_surface.txt"


def surface() -> list[str]:
    """Return ``module.name(signature)`` for every name in the ``__all__`` of every package."""
    packages = ["espalier"]
    packages += [m.name for m in pkgutil.walk_packages(espalier.__path__, "espalier.") if m.ispkg]
    lines = []
    for name in packages:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            shown = f": {type(thing).__name__}"
            # An exception has no signature of its own.
            if callable(thing) and not (isinstance(thing, type) and issubclass(thing, BaseException)):
                # A default that is a function shows its address.
                shown = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
            lines.append(f"{name}.{public}{shown}")
    return sorted(lines)


def test_public_surface_is_frozen() -> None:
    frozen = SURFACE.read_text().splitlines()
    now = surface()
    left, joined = sorted(set(frozen) - set(now)), sorted(set(now) - set(frozen))
    assert not left, f"left the public surface, or changed: {left}; joined: {joined}"
    assert not joined, f"joined the public surface: {joined}"


if __name__ == "__main__":
    SURFACE.write_text("\n".join(surface()) + "\n")
