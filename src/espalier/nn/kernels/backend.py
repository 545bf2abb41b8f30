"""Which implementation of the hot loops runs, and why: compiled C++ on a CPU, mamba_ssm or Triton on CUDA, or torch."""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from espalier.errors import EspalierError, unknown_name
from espalier.nn.precision import is_exporting, is_transformed

BACKENDS = ("auto", "compiled", "mamba_ssm", "triton", "torch")
_OPERATIONS = {
    "compiled": ("selective_scan", "ssd", "causal_conv", "gated_norm", "orthogonal", "depthwise"),
    "mamba_ssm": ("selective_scan", "ssd"),
    "triton": ("selective_scan", "ssd"),
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
    ``mamba_ssm``, ``triton``, ``torch``) overrides it.

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
    missing = []
    for name, find in _FINDERS.get(kind, {}).items():
        if asked in ("auto", name):
            found = find()
            if isinstance(found, Backend):
                return found
            missing.append(found)
    reason = "; ".join(missing) or f"there are no such kernels for {kind}"
    if asked != "auto":
        raise EspalierError(f"backend {asked!r} cannot run on {kind} here ({reason}): use 'auto' or 'torch'")
    if kind in _FINDERS:
        _warn_once(reason)
    return Backend("torch", reason)


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Choose the implementation within a ``with`` block (see ``backend``); where it cannot run is an error."""
    token = _forced.set(name)
    try:
        yield backend("cuda" if name in _FINDERS["cuda"] else "cpu")
    finally:
        _forced.reset(token)


def choose(operation: str, kind: str) -> str:
    """Return the name of what runs ``operation``, a name of ``_OPERATIONS``, on a kind of device.

    ``"formula"`` stands for torch's own operations without any backward pass by hand: transforms have no rules for
    anything else, and the sizes of pieces and segments would become a part of an exported program.
    """
    if is_transformed():
        return "formula"
    found = backend(kind).name
    name = found if operation in _OPERATIONS.get(found, ()) else "torch"
    return "formula" if is_exporting() and name != "compiled" else name


# ``torch.compile`` asks once, while it traces, instead of tracing into the choice. The public way to set this mark,
# torch.compiler.assume_constant_result, imports the whole compiler for it.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _compiled() -> Backend | str:
    """Return the backend, or why it cannot run; so do those below."""
    from espalier.nn.kernels.library import KernelError, load

    try:
        return Backend("compiled", f"C++ kernels from {load()}")
    except KernelError as error:
        return f"no C++ kernels: {error}"


@cache
def _mamba_ssm() -> Backend | str:
    try:
        module = importlib.import_module("mamba_ssm")
        importlib.import_module("espalier.nn.kernels.cuda")
    except ImportError as error:
        return f"mamba_ssm's kernels cannot be imported ({error}): pip install mamba-ssm"
    return Backend("mamba_ssm", f"mamba_ssm {getattr(module, '__version__', '')} is installed")


@cache
def _triton() -> Backend | str:
    try:
        module = importlib.import_module("triton")
        importlib.import_module("espalier.nn.kernels.triton_scans")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, which it needs to start kernels: install gcc"
    return Backend("triton", f"our kernels in Triton {module.__version__}")


# By kind of device, the preferred ones first.
_FINDERS: dict[str, dict[str, Callable[[], Backend | str]]] = {
    "cpu": {"compiled": _compiled},
    "cuda": {"mamba_ssm": _mamba_ssm, "triton": _triton},
}


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"espalier runs Mamba and orthogonal layers in plain torch, several times slower: {reason}", stacklevel=3
    )
