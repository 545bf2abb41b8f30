"""Matrices near a multiple of the identity, and their split into two factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from espalier.errors import EspalierError, unknown_name

Method = Literal["auto", "exact", "fast"]
METHODS = ("auto", "exact", "fast")
NOISES = ("normal", "uniform")

# Note [Only the top triplets]
# The best rank-k approximation needs k of d singular triplets, and for k « d a full SVD wastes nearly all its work. The
# spectrum of αZ + βI decays slowly, so plain subspace iteration needs many steps; a Chebyshev polynomial of AᵀA
# that is small below the cut and steep above it needs few. The cut is known: the spectrum's limit depends on α, β
# and the fraction k/d alone, so a small matrix of the same law tells it. A Rayleigh-Ritz step ends it exactly.
_OVERSAMPLING = 1.5
_DEGREE_PER_ROOT_WIDTH = 1.5
_CUT_SLACK = 1.2
_PILOT = 256

# Note [Turned copies]
# Gaussian noise has no preferred axes: O Z Oᵀ has the law of Z for every orthogonal O, and O I Oᵀ = I. So for a random
# O, uniformly drawn, O A Oᵀ is another draw of αZ + βI, with the same singular values turned to fresh directions, and
# its top triplets are those of A times O: no second decomposition. O acts on the 2k columns of [L R] = Q R alone, and
# O Q is simply a uniformly random orthonormal frame. Each copy has exactly the law of a fresh draw; together they share
# one spectrum, which hardly varies from draw to draw at the widths where this is used.


def near_identity(
    dim: int,
    alpha: float,
    beta: float,
    *,
    noise: str = "normal",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a matrix near a multiple of the identity: ``A = αZ + βI``.

    Z has independent entries of mean 0 and variance 1/d, so that its largest singular value is near 2 at every width.

    Args:
        dim: d, rows and columns.
        alpha: strength of the noise.
        beta: strength of the identity.
        noise: ``"normal"``, or ``"uniform"`` on ±√(3/d); the products' statistics are the same.
        generator: source of the noise; torch's global one if none is given.
        device: where the matrix is drawn.

    Returns:
        A, shape (d, d), float32.

    Raises:
        EspalierError: an unknown noise.

    Source: arXiv 2305.09828, section 3.
    """
    if noise == "normal":
        matrix = torch.randn(dim, dim, generator=generator, device=device).mul_(alpha / dim**0.5)
    elif noise == "uniform":
        matrix = torch.rand(dim, dim, generator=generator, device=device).sub_(0.5).mul_(alpha * (12 / dim) ** 0.5)
    else:
        raise unknown_name("noise", noise, NOISES)
    matrix.diagonal().add_(beta)
    return matrix


def split(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Split a matrix into two balanced factors: ``A ≈ L Rᵀ``, L = U S^½, R = V S^½ from its k top singular triplets.

    Args:
        matrix: A, shape (m, n).
        rank: k; all of them when left out, and then the product is exact.

    Returns:
        L of shape (m, k) and R of shape (n, k).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vh[:rank].mT * root


def split_square(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Split a square matrix into two balanced full-rank factors, exactly: ``A = L Rᵀ``.

    ``L = U D``, ``R = Aᵀ U D⁻¹`` with ``A Aᵀ = U S² Uᵀ`` and ``D = S^½``: one symmetric eigen-decomposition, a third of
    an SVD's time. Squaring spoils the smallest singular values, but not the product: it holds for every orthogonal U
    and every diagonal D, so a floor under D costs balance in directions that hardly count, and no exactness.

    Args:
        matrix: A, shape (d, d).

    Returns:
        L and R, both (d, d).
    """
    eigenvalues, u = torch.linalg.eigh(matrix @ matrix.mT)
    floor = eigenvalues[-1].clamp_min(torch.finfo(matrix.dtype).tiny) * 1e-6
    root = eigenvalues.clamp_min(floor) ** 0.25
    return u * root, (matrix.mT @ u) / root


def near_identity_factors(
    dim: int,
    rank: int,
    alpha: float,
    beta: float,
    *,
    noise: str = "normal",
    method: Method = "auto",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw ``A = αZ + βI`` and return the factors of its best rank-k approximation: ``L Rᵀ ≈ A``.

    Args:
        dim: d.
        rank: k ≤ d.
        alpha: strength of the noise.
        beta: strength of the identity.
        noise: law of Z, as in ``near_identity``.
        method: ``"exact"`` by a full SVD; ``"fast"`` by a Chebyshev-filtered subspace that captures at least 99.5 % of
            the energy of the exact one; ``"auto"`` is fast where that pays (d ≥ 256 and k ≤ d/4).
        generator: source of the noise.
        device: where to compute.

    Returns:
        L and R, both (d, k), float32.

    Raises:
        EspalierError: a rank outside 1…d, or an unknown method or noise.

    Source: arXiv 2305.09828, section 3.
    """
    if not 1 <= rank <= dim:
        raise EspalierError(f"rank {rank} is outside 1…{dim}: a head cannot be wider than the model")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    matrix = near_identity(dim, alpha, beta, noise=noise, generator=generator, device=device)
    fast = _is_fast(dim, rank, method)
    width = min(-(-int(_OVERSAMPLING * rank) // 32) * 32, dim)
    if rank == dim:
        return split_square(matrix)
    if not fast or width >= dim:
        return split(matrix, rank)
    return _split_by_filter(matrix, rank, width, _cut(alpha, beta, min(_CUT_SLACK * width / dim, 1.0)), generator)


def near_identity_heads(
    count: int,
    dim: int,
    rank: int,
    alpha: float,
    beta: float,
    *,
    noise: str = "normal",
    method: Method = "auto",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of ``count`` draws of ``αZ + βI``, one a head, each as ``near_identity_factors`` returns them.

    Where the fast way is taken and the noise is normal, one draw is decomposed and the others are random rotations of
    it, ``O A Oᵀ``: each has the law of a fresh draw, at a tenth of the cost; see Note [Turned copies].

    Args:
        count: how many draws; one d × d matrix at most is held at a time.
        dim, rank, alpha, beta, noise, method, generator, device: as in ``near_identity_factors``.
    """
    left, right = near_identity_factors(
        dim, rank, alpha, beta, noise=noise, method=method, generator=generator, device=device
    )
    yield left, right
    if not (noise == "normal" and _is_fast(dim, rank, method)):
        for _ in range(count - 1):
            yield near_identity_factors(
                dim, rank, alpha, beta, noise=noise, method=method, generator=generator, device=device
            )
        return
    triangle = torch.linalg.qr(torch.cat([left, right], 1)).R
    for _ in range(count - 1):
        turned = random_frame(dim, len(triangle), generator=generator, device=device) @ triangle
        yield turned[:, :rank], turned[:, rank:]


def random_frame(
    dim: int, count: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw ``count`` ≤ d orthonormal columns, uniformly: shape (d, count), float32."""
    q, r = torch.linalg.qr(torch.randn(dim, count, generator=generator, device=device))
    # The signs of R's diagonal are the library's choice; with them taken out Q is uniform.
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _is_fast(dim: int, rank: int, method: Method) -> bool:
    return method == "fast" or (method == "auto" and dim >= 256 and 4 * rank <= dim)


def _split_by_filter(
    matrix_DD: Tensor, rank: int, width: int, cut: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Find the top ``rank`` triplets in a subspace of ``width`` directions; see Note [Only the top triplets]."""
    start = torch.randn(matrix_DD.shape[-1], width, generator=generator, device=matrix_DD.device)
    half = cut**2 / 2
    # T_{m+1}(x) = 2 x T_m(x) − T_{m−1}(x) at x = AᵀA/half − 1, which maps [0, cut²] to [−1, 1].
    before, basis_DB = start, (matrix_DD.mT @ (matrix_DD @ start)) / half - start
    # The gap at the cut narrows as k/d falls; the degree that resolves it grows like the root of d/k.
    degree = max(4, math.ceil(_DEGREE_PER_ROOT_WIDTH * (matrix_DD.shape[-1] / rank) ** 0.5))
    for _ in range(degree - 1):
        product = (matrix_DD.mT @ (matrix_DD @ basis_DB)).mul_(2 / half)
        before, basis_DB = basis_DB, product.sub_(basis_DB, alpha=2).sub_(before)
    basis_DB = torch.linalg.qr(basis_DB).Q
    image_DB = matrix_DD @ basis_DB
    eigenvalues, rotation = torch.linalg.eigh(image_DB.mT @ image_DB)
    root = eigenvalues[-rank:].clamp_min(0) ** 0.25
    rotation = rotation[:, -rank:]
    # image = U S and basis = V, so L = U S^½ = image / S^½ and R = V S^½.
    return (image_DB @ rotation) / root, (basis_DB @ rotation) * root


@lru_cache(maxsize=64)
def _cut(alpha: float, beta: float, fraction: float) -> float:
    """Return the singular value of αZ + βI above which ``fraction`` of the spectrum lies."""
    pilot = near_identity(_PILOT, alpha, beta, generator=torch.Generator().manual_seed(0))
    return float(torch.linalg.svdvals(pilot)[min(int(fraction * _PILOT), _PILOT - 1)])
