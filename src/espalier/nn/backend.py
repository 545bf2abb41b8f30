"""Which implementation of the scans runs, and why: compiled C++ or plain torch on a CPU, mamba_ssm or torch on CUDA."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from espalier.errors import EspalierError, unknown_name

BACKENDS = ("auto", "compiled", "mamba_ssm", "torch")
_forced: ContextVar[str | None] = ContextVar("espalier_backend", default=None)


@dataclass(frozen=True)
class Backend:
    """An implementation and the reason for it; ``print`` shows both."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def backend(device: torch.device | str = "cpu") -> Backend:
    """Return what runs ``selective_scan`` and the causal convolution on ``device``, and why.

    The choice is automatic; ``use_backend`` or the environment variable ``ESPALIER_BACKEND`` (``compiled``,
    ``mamba_ssm``, ``torch``) overrides it. ``ssd`` is matrix products in torch on every CPU.

    Raises:
        EspalierError: a backend is demanded that is unknown or cannot run here.
    """
    kind = torch.device(device).type
    asked, source = _forced.get() or "", "asked for by use_backend"
    if not asked:
        asked, source = os.environ.get("ESPALIER_BACKEND", "auto"), "asked for by ESPALIER_BACKEND"
    if asked not in BACKENDS:
        raise unknown_name("backend", asked, BACKENDS)
    if asked == "torch":
        return Backend("torch", source)
    fast = {"cpu": _compiled, "cuda": _mamba_ssm}.get(kind)
    found = fast() if fast else Backend("torch", f"there are no kernels for {kind}")
    if asked not in ("auto", found.name):
        raise EspalierError(f"backend {asked!r} cannot run on {kind} here ({found.reason}): use 'auto' or 'torch'")
    return found


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Choose the implementation of the scans within a ``with`` block (see ``backend``)."""
    token = _forced.set(name)
    try:
        yield backend()
    finally:
        _forced.reset(token)


def choose(operation: str, tensor: Tensor) -> Backend:
    """Return what runs ``operation`` ("selective_scan", "causal_conv", "ssd") on the device of ``tensor``."""
    found = backend(tensor.device)
    has = {
        "compiled": ("selective_scan", "causal_conv"),
        "mamba_ssm": ("selective_scan", "ssd"),
    }.get(found.name, ())
    return found if operation in has else Backend("torch", f"{found.name} has no {operation}")


@cache
def _compiled() -> Backend:
    from espalier.nn.kernels.build import KernelBuildError
    from espalier.nn.kernels.cpu import load

    try:
        return Backend("compiled", f"C++ kernels from {load()}")
    except KernelBuildError as error:
        reason = f"no C++ kernels: {error}"
        warnings.warn(f"espalier runs Mamba-1 in plain torch, several times slower: {reason}", stacklevel=3)
        return Backend("torch", reason)


@cache
def _mamba_ssm() -> Backend:
    if importlib.util.find_spec("mamba_ssm") is None:
        return Backend("torch", "mamba_ssm is not installed: pip install mamba-ssm for its CUDA kernels")
    return Backend("mamba_ssm", "mamba_ssm is installed")
