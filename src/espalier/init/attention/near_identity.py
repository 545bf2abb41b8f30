"""Matrices near a multiple of the identity, and their split into two factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from espalier.errors import EspalierError, unknown_name
from espalier.randomness import cpu_generator

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
# Gaussian noise has no preferred axes: O Z Oᵀ is distributed as Z for every orthogonal O, and O I Oᵀ = I. So for a
# uniformly random O, O A Oᵀ is another draw of αZ + βI, with the same singular values turned to fresh directions; its
# top triplets are those of A times O: no second decomposition. O acts on the 2k columns of [L R] = Q R alone, and O Q
# is a uniformly random orthonormal frame. Each copy has exactly the distribution of a fresh draw; together they share
# one spectrum, which hardly varies from draw to draw at the widths where this is used.
#
# The same serves full rank, above 512 features: (O L)(O R)ᵀ = O A Oᵀ. To turn two factors costs half of an
# eigen-decomposition, so one draw, from a seed of its own and kept, stands for all with its strengths.

# Note [The same draw everywhere]
# Noise is drawn on the CPU, in an order that depends on sizes alone, and copied. torch's normal numbers are the same
# bits under every instruction set in float64, and in float32 the same but for the last digits (1e-6). A factorisation
# adds rounding, and how far rounding turns a singular vector depends on the gap to its neighbour. So:
# - up to 512 features all is computed in float64 on the CPU: on another device, thread count or processor the factors
#   agree within 1e-9 of their largest entry, or 1e-3 where the fast way is taken (its products within 1e-5), and
#   weights of another type within that type's rounding besides.
# - above, float32 on the weights' device, for its speed: products agree within 1e-4 of their largest entry, and the
#   factors, whose columns of nearly equal singular values may turn among themselves, within 0.1 of it.
# The sign of a singular pair is the library's choice; ours makes the sum of the left vector's entries non-negative.
# Without noise (α = 0) all singular values are equal, and nothing determines which of them are kept.
_DOUBLE_UP_TO = 512


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep matrix products in the type of their factors, whatever autocast stands around; also as a decorator."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in ("cpu",) if accelerator is None else ("cpu", accelerator.type):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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
        device: where the matrix is wanted; the noise is drawn on the CPU, see Note [The same draw everywhere].

    Returns:
        A, shape (d, d), float32.

    Raises:
        EspalierError: a dim below 1, or an unknown noise.

    Source: arXiv 2305.09828, section 3.
    """
    if dim < 1:
        raise EspalierError(f"dim is {dim}: give at least 1")
    return near_identity_corner(dim, dim, dim, alpha, beta, noise=noise, generator=generator).float().to(device)


def near_identity_corner(
    rows: int,
    columns: int,
    dim: int,
    alpha: float,
    beta: float,
    *,
    noise: str = "normal",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the first rows and columns of ``αZ + βI`` of width d: what two nested subspaces of it keep.

    Args:
        rows, columns: the corner's shape.
        dim: d.
        alpha, beta, noise, generator, device: as in ``near_identity_factors``.

    Returns:
        Shape (rows, columns): float64 on the CPU up to d = 512, float32 on ``device`` above.

    Raises:
        EspalierError: an unknown noise.
    """
    if noise not in NOISES:
        raise unknown_name("noise", noise, NOISES)
    sampler, spread = (torch.randn, dim**-0.5) if noise == "normal" else (torch.rand, (12 / dim) ** 0.5)
    matrix = sampler(rows, columns, generator=cpu_generator(generator), dtype=compute_type(dim), device="cpu")
    if noise == "uniform":
        matrix.sub_(0.5)
    matrix.mul_(alpha * spread).diagonal().add_(beta)
    return matrix.to(compute_device(dim, device))


def compute_type(dim: int) -> torch.dtype:
    """Return the precision in which matrices of width d are drawn and factorised."""
    return torch.float64 if dim <= _DOUBLE_UP_TO else torch.float32


def compute_device(dim: int, device: torch.device | str) -> torch.device | str:
    """Return where matrices of width d are factorised for weights on ``device``."""
    return "cpu" if dim <= _DOUBLE_UP_TO else device


def split(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Split a matrix into two balanced factors: ``A ≈ L Rᵀ``, L = U S^½, R = V S^½ from its k top singular triplets.

    Args:
        matrix: A, shape (m, n).
        rank: k; all of them when left out, and then the product is exact.

    Returns:
        L of shape (m, k) and R of shape (n, k).
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt() * _signs(u[:, :rank])
    return u[:, :rank] * root, vh[:rank].mT * root


def _signs(columns: Tensor) -> Tensor:
    """Return ±1 for every column, the sign that makes its sum non-negative; see Note [The same draw everywhere]."""
    return torch.where(columns.sum(0) < 0, -1.0, 1.0).to(columns.dtype)


def signed_qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R of a matrix, the diagonal of R not negative: its signs are the library's choice."""
    q, r = torch.linalg.qr(columns)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return q * signs, r * signs[:, None]


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
    u *= _signs(u)
    floor = eigenvalues[-1].clamp_min(torch.finfo(matrix.dtype).tiny) * 1e-6
    root = eigenvalues.clamp_min(floor) ** 0.25
    return u * root, (matrix.mT @ u) / root


@full_precision()
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
        noise: distribution of Z, as in ``near_identity``.
        method: ``"exact"`` by a full decomposition; ``"fast"`` by a Chebyshev-filtered subspace that captures at least
            99.5 % of the energy of the exact one; ``"auto"`` is fast where that pays (d ≥ 256 and k ≤ d/4). At full
            rank all are exact; above d = 512, with normal noise, all but ``"exact"`` turn one decomposition.
        generator: source of the noise.
        device: where to compute when d > 512; below, see Note [The same draw everywhere].

    Returns:
        L and R, both (d, k): float64 on the CPU up to d = 512, float32 on ``device`` above.

    Raises:
        EspalierError: a rank outside 1…d, or an unknown method or noise.

    Source: arXiv 2305.09828, section 3.
    """
    if not 1 <= rank <= dim:
        raise EspalierError(f"rank {rank} is outside 1…{dim}: a head cannot be wider than the model")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    generator = cpu_generator(generator)
    if rank == dim > _DOUBLE_UP_TO and noise == "normal" and method != "exact":
        x, scales, signs = _reflections(dim, dim, generator, device)
        left, right = (torch.ormqr(x, scales, signs[:, None] * part) for part in _decomposed(dim, alpha, beta, device))
        return left, right
    matrix = near_identity_corner(dim, dim, dim, alpha, beta, noise=noise, generator=generator, device=device)
    fast = _is_fast(dim, rank, method)
    width = min(-(-int(_OVERSAMPLING * rank) // 32) * 32, dim)
    if rank == dim:
        return split_square(matrix)
    if not fast or width >= dim:
        return split(matrix, rank)
    return _split_by_filter(matrix, rank, width, _cut(alpha, beta, min(_CUT_SLACK * width / dim, 1.0)), generator)


@lru_cache(maxsize=1)
def _decomposed(dim: int, alpha: float, beta: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the factors of the one draw that stands for all; see Note [Turned copies]."""
    seeded = torch.Generator(device="cpu").manual_seed(0)
    return split_square(near_identity_corner(dim, dim, dim, alpha, beta, generator=seeded, device=device))


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
    it, ``O A Oᵀ``: each has the distribution of a fresh draw, at a tenth of the cost; see Note [Turned copies].

    Args:
        count: how many draws; one d × d matrix at most is held at a time.
        dim, rank, alpha, beta, noise, method, generator, device: as in ``near_identity_factors``.
    """
    generator = cpu_generator(generator)
    turns = noise == "normal" and _is_fast(dim, rank, method)
    for _ in range(1 if turns else count):
        left, right = near_identity_factors(
            dim, rank, alpha, beta, noise=noise, method=method, generator=generator, device=device
        )
        yield left, right
    if not turns:
        return
    triangle = signed_qr(torch.cat([left, right], 1))[1]
    for _ in range(count - 1):
        with full_precision():
            turned = random_frame(dim, len(triangle), generator=generator, device=device) @ triangle
        yield turned[:, :rank], turned[:, rank:]


def random_frame(
    dim: int, count: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw ``count`` ≤ d orthonormal columns, uniformly: shape (d, count), type and place as of factors of width d."""
    x, scales, signs = _reflections(dim, count, cpu_generator(generator), device)
    return torch.linalg.householder_product(x, scales).mul_(signs)


def _reflections(
    dim: int, count: int, generator: torch.Generator | None, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the reflections H_j and signs of a uniformly random frame H₁ H₂ … diag(signs), as LAPACK stores them.

    H_j turns a normal vector x_j over the last d − j coordinates into a multiple of its first axis: what a QR
    decomposition of normal columns would find, without it (Stewart 1980, "The efficient generation of random
    orthogonal matrices").
    """
    x = torch.randn(dim, count, generator=generator, dtype=compute_type(dim), device="cpu")
    x = x.to(compute_device(dim, device)).tril_()
    first, length = x.diagonal().clone(), torch.linalg.vector_norm(x, dim=0)
    # The first column of H_j is −x_j/‖x_j‖ or x_j/‖x_j‖, whichever is negative in front: signs make it uniform.
    signs = torch.where(first < 0, 1.0, -1.0).to(x.dtype)
    x /= first - signs * length
    return x, 1 + first.abs() / length, signs


def _is_fast(dim: int, rank: int, method: Method) -> bool:
    return method == "fast" or (method == "auto" and dim >= 256 and 4 * rank <= dim)


def _split_by_filter(
    matrix_DD: Tensor, rank: int, width: int, cut: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Find the top ``rank`` triplets in a subspace of ``width`` directions; see Note [Only the top triplets]."""
    start = torch.randn(len(matrix_DD), width, generator=generator, dtype=matrix_DD.dtype, device="cpu")
    start = start.to(matrix_DD.device)
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
    rotation = rotation * _signs(image_DB @ rotation)
    # image = U S and basis = V, so L = U S^½ = image / S^½ and R = V S^½.
    return (image_DB @ rotation) / root, (basis_DB @ rotation) * root


@lru_cache(maxsize=64)
def _cut(alpha: float, beta: float, fraction: float) -> float:
    """Return the singular value of αZ + βI above which ``fraction`` of the spectrum lies."""
    pilot = near_identity(_PILOT, alpha, beta, generator=torch.Generator(device="cpu").manual_seed(0))
    return float(torch.linalg.svdvals(pilot)[min(int(fraction * _PILOT), _PILOT - 1)])
