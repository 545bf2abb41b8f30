"""A case of the corpus: a fault of a public report, rebuilt on a tiny model, and the same model without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# What a case builds: the arguments of ``diagnose``.
Build = Callable[[bool], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: the cause in words.
        thread: the public report, "owner/name#number"; empty where none is known to us.
        check: the check that must catch it.
        layer: the layer that must be named.
        severity: how severe the finding must be.
        build: returns the arguments of ``diagnose``, with the fault or without.
    """

    name: str
    thread: str
    check: str
    layer: str
    severity: str
    build: Build


CASES: list[Case] = []


def case(thread: str, check: str, layer: str, severity: str = "error") -> Callable[[Build], Build]:
    """Add a function ``build(fault)`` to the corpus (decorator)."""

    def add(build: Build) -> Build:
        CASES.append(Case(build.__name__.replace("_", " "), thread, check, layer, severity, build))
        return build

    return add


def garbage(*shape: int) -> torch.Tensor:
    """Return what ``torch.empty`` leaves where pointers lay before: pairs of address halves, read as float32."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    words = torch.where(numbers % 2 == 1, torch.tensor(0x7F3A), 0x5C001000 + 64 * numbers % (1 << 20))
    return words.to(torch.int32).view(torch.float32).reshape(shape)
