"""What evaluation keeps: orthogonal operators for the sizes seen last, valid for the parameters' present contents."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels.split_complex import same
from espalier.nn.precision import is_tracing, outside_graphs, takes_batches, without_autocast

# Note [Contents, not versions]
# A parameter's version counter misses writes through ``.data``, which is how many an exponential average is swapped in.
# The certificate of a net stands or falls with its weights, so the cache compares their contents. That reads the
# parameters once a forward pass, far less than the product with the spectrum reads, and no write can be missed.
#
# Note [One snapshot]
# Threads share a layer, and one may write its parameters while another builds. Under a lock the parameters are copied
# first, and what is built is built from the copies: an entry always belongs to the contents that are kept beside it.

_ENTRIES = 4

Build = Callable[..., Tensor]
_constant: ContextVar[bool] = ContextVar("espalier_constant_operators", default=False)


@contextlib.contextmanager
def constant_operators() -> Iterator[None]:
    """Let graphs hold the operators that the last forward pass in evaluation kept, as constants.

    For exporting a trained net: what runs the graph elsewhere need not know how to invert a matrix.
    """
    token = _constant.set(True)
    try:
        yield
    finally:
        _constant.reset(token)


class OperatorCache:
    """Results by key for one state of some parameters; copying or pickling it gives an empty one.

    At most four keys are kept, the oldest goes first. Threads may share it; see Note [One snapshot].
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contents: list[Tensor] = []
        self._entries: dict[Hashable, Tensor] = {}

    @outside_graphs
    def get(self, key: Hashable, parameters: Sequence[Tensor], build: Build, dtype: torch.dtype) -> Tensor:
        """Return ``build(*parameters)``, made in float64 and rounded once, differentiable in the parameters.

        Nothing is built if it was before, for this key and dtype, and the parameters have the contents they had then.
        Gradients of other tensors never pass here, so an attack on a net's input does not pay for its parameters' ones.

        Args:
            key: image size, and whatever else but the parameters the result depends on.
            parameters: what the result is built from. See Note [Contents, not versions].
            build: the differentiable function that makes it.
            dtype: of the result.
        """
        # Dynamo, which strict export runs, reads no context variable; ``espalier export`` is not strict.
        if not torch.compiler.is_dynamo_compiling() and _constant.get() and (key, dtype) in self._entries:
            return self._entries[key, dtype]
        # The tracing ONNX exporter has no inverse: what it writes is a trained net, with its operators.
        onnx = torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()
        if (is_tracing() and not onnx) or parameters[0].is_meta:
            # A graph must hold how the operator follows from its parameters, and a tensor that belongs to a transform
            # must not outlive it. Contents that do not exist cannot be compared.
            return build(*(parameter.double() for parameter in parameters)).to(dtype)
        with _untraced(), torch.inference_mode(False), torch.no_grad(), self._lock:
            planes = self._planes((key, dtype), parameters, build)
        if onnx or not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)):
            return planes
        result: Tensor = _Reattach.apply(planes, build, *parameters)
        return result

    def _planes(self, key: tuple[Hashable, torch.dtype], parameters: Sequence[Tensor], build: Build) -> Tensor:
        current = len(parameters) == len(self._contents) and all(map(same, parameters, self._contents))
        if not current:
            self._entries = {}
            self._contents = [parameter.detach().clone() for parameter in parameters]
        if key not in self._entries:
            made = build(*(copy.double() for copy in self._contents)).to(key[1])
            while len(self._entries) >= _ENTRIES:
                del self._entries[next(iter(self._entries))]
            self._entries[key] = made
        return self._entries[key]

    def __reduce__(self) -> tuple[type[OperatorCache], tuple[()]]:
        """Pickle, and be copied, as an empty cache."""
        return OperatorCache, ()


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Hide what happens from the tracing ONNX exporter, to which its results are then constants."""
    tracer: Any = torch._C  # its setter has no type
    state = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


class _Reattach(torch.autograd.Function):
    """A cached result out; its gradient is carried to the parameters by building it again."""

    @staticmethod
    def forward(ctx: Any, cached: Tensor, build: Build, *parameters: Tensor) -> Tensor:
        """Return the cached tensor as a new view."""
        ctx.build = build
        ctx.save_for_backward(*parameters)
        return cached.view_as(cached)

    @staticmethod
    @takes_batches
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parameters, differentiable in turn under ``create_graph``."""
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that the derivative by one parameter leaves the others out even if they depend on it.
            again = [p.view_as(p) if twice else p.detach().requires_grad_() for p in ctx.saved_tensors]
            asked = [p for p in again if p.requires_grad]
            found = iter(torch.autograd.grad(ctx.build(*again), asked, grad, create_graph=twice))
            return None, None, *(next(found) if p.requires_grad else None for p in again)
