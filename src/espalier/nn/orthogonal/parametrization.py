"""Orthogonal weights for plain linear layers, by ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from espalier.errors import EspalierError
from espalier.nn.orthogonal.transform import cayley
from espalier.nn.precision import no_autocast


def parametrize_cayley(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a matrix of a module orthogonal in place: ``Q = B·cayley(W)`` with W learned and B a fixed rotation.

    The matrix starts as the orthogonal one nearest to what it was, and so does any matrix assigned later
    (``module.weight = matrix``): B becomes it, extended to a square rotation, and W becomes zero. All orthogonal
    matrices can be reached that way, reflections included.

    Args:
        module: e.g. an ``nn.Linear``.
        name: of the parameter, a matrix; (semi-)orthogonal along its shorter side.

    Returns:
        The module. ``parametrize.remove_parametrizations(module, name)`` makes the matrix a plain parameter again.

    Raises:
        EspalierError: there is no such parameter, or it is no matrix of finite real floating-point numbers; on an
            assigned matrix, another shape, or numbers that are not finite and real.

    Source: arXiv 2104.07167, section 4; the fixed rotation as in arXiv 1909.09501.
    """
    matrix = getattr(module, name, None)
    if not isinstance(matrix, Tensor):
        raise EspalierError(f"{type(module).__name__} has no parameter {name!r}: name one of its matrices")
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise EspalierError(f"{name!r} of shape {tuple(matrix.shape)} is no matrix: for convolutions use CayleyConv2d")
    if not matrix.is_floating_point():  # the rotation is real: an imaginary part would be dropped
        raise EspalierError(f"{name!r} is {matrix.dtype}: only real floating-point matrices have this parametrisation")
    parametrize.register_parametrization(module, name, _Cayley(matrix))
    return module


class _Cayley(nn.Module):
    """W ↦ B·cayley(W), or cayley(W)·Bᵀ for wide matrices."""

    base: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.shape, side = matrix.shape, max(matrix.shape)
        self.register_buffer("base", torch.eye(side, dtype=matrix.dtype, device=matrix.device))
        self.register_load_state_dict_post_hook(_straighten)

    def forward(self, w: Tensor) -> Tensor:
        """Return the orthogonal matrix."""
        with no_autocast(w.device):
            q = cayley(w)
            return q @ self.base.mT if w.shape[0] < w.shape[1] else self.base @ q

    @torch.no_grad()
    def right_inverse(self, matrix: Tensor) -> Tensor:
        """Turn the base to the orthogonal matrix nearest to the one given, and return W = 0."""
        if matrix.shape != self.shape or matrix.is_complex():
            raise EspalierError(f"matrix is {matrix.dtype} {tuple(matrix.shape)}: give a real one, {tuple(self.shape)}")
        if not matrix.is_meta and not matrix.isfinite().all():
            raise EspalierError("no orthogonal matrix is nearest to one with NaN or infinity: give finite numbers")
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
        self.base.copy_(_nearest_rotation(tall))
        return torch.zeros_like(matrix, dtype=self.base.dtype, device=self.base.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Cayley:
        before = self.base
        super()._apply(fn, recurse)
        if before.is_meta and not self.base.is_meta:  # ``to_empty`` leaves whatever was in memory
            nn.init.eye_(self.base)
        elif self.base.dtype != before.dtype:
            _straighten(self)
        return self


@torch.no_grad()
def _nearest_rotation(tall: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to a tall one, extended to a square one, in float64."""
    left, _, right = torch.linalg.svd(tall.double())
    width = tall.shape[1]
    return torch.cat((left[:, :width] @ right, left[:, width:]), 1)


@torch.no_grad()
def _straighten(module: nn.Module, *_: Any) -> None:
    """Make the base orthogonal again where half precision has rounded it: no step of training would."""
    assert isinstance(module, _Cayley)
    base = module.base
    if type(base) is not Tensor or base.is_meta or not base.isfinite().all():  # fake tensors have no numbers
        return
    wide = base.cpu().double()  # not every device has float64
    excess = (wide.mT @ wide - torch.eye(len(base), dtype=torch.float64, device="cpu")).abs().max()
    if excess > (8 + len(base)) * torch.finfo(base.dtype).eps:  # as good as its dtype is, it stays as it was saved
        base.copy_(_nearest_rotation(wide))
