"""Which implementation of the hot loops runs, and why: compiled C++ or torch on a CPU, mamba_ssm or torch on CUDA."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from espalier.errors import EspalierError, unknown_name

BACKENDS = ("auto", "compiled", "mamba_ssm", "torch")
_OPERATIONS = {
    "compiled": ("selective_scan", "ssd", "causal_conv", "gated_norm", "orthogonal", "depthwise"),
    "mamba_ssm": ("selective_scan", "ssd"),
}
_forced: ContextVar[str | None] = ContextVar("espalier_backend", default=None)


@dataclass(frozen=True)
class Backend:
    """An implementation and the reason for it; ``print`` shows both."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def backend(device: torch.device | str = "cpu") -> Backend:
    """Return what runs the scans, the causal convolution, the gated norm and orthogonal layers on ``device``, and why.

    The choice is automatic; ``use_backend`` or the environment variable ``ESPALIER_BACKEND`` (``compiled``,
    ``mamba_ssm``, ``torch``) overrides it.

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
    """Choose the implementation within a ``with`` block (see ``backend``)."""
    token = _forced.set(name)
    try:
        yield backend()
    finally:
        _forced.reset(token)


def choose(operation: str, kind: str) -> str:
    """Return the name of what runs ``operation``, a name of ``_OPERATIONS``, on a kind of device."""
    found = backend(kind).name
    return found if operation in _OPERATIONS.get(found, ()) else "torch"


# ``torch.compile`` asks once, while it traces, instead of tracing into the choice. The public way to set this mark,
# torch.compiler.assume_constant_result, imports the whole compiler for it.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _compiled() -> Backend:
    from espalier.nn.kernels.library import KernelError, load

    try:
        return Backend("compiled", f"C++ kernels from {load()}")
    except KernelError as error:
        return _fall_back(f"no C++ kernels: {error}")


@cache
def _mamba_ssm() -> Backend:
    try:
        module = importlib.import_module("mamba_ssm")
        importlib.import_module("espalier.nn.kernels.cuda")
    except ImportError as error:
        return _fall_back(f"mamba_ssm's kernels cannot be imported ({error}): pip install mamba-ssm")
    return Backend("mamba_ssm", f"mamba_ssm {getattr(module, '__version__', '')} is installed")


def _fall_back(reason: str) -> Backend:
    """Warn, once as the callers are cached, that the slower implementation runs."""
    warnings.warn(
        f"espalier runs Mamba and orthogonal layers in plain torch, several times slower: {reason}", stacklevel=2
    )
    return Backend("torch", reason)
