"""The covariance of depthwise filters in closed form, and filters drawn from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from numbers import Integral, Real
from typing import Any, TypedDict, TypeGuard, Unpack

import torch
from torch import Tensor, nn

from espalier.contents import without_numbers
from espalier.errors import EspalierError, unknown_name
from espalier.randomness import cpu_generator
from espalier.sizes import whole_number

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

VARIANTS = ("clip", "abs", "psd")
MASKS = ("x", "y")
CENTRES = ("middle", "last")
SCALES = ("raw", "unit", "match_default")

# Below this share of the largest eigenvalue a negative one is rounding; beyond it the matrix is no covariance.
_NEGATIVE_SHARE = 1e-5


class Switches(TypedDict, total=False):
    """The choices that the closed form leaves open, as keyword arguments; ``filter_covariance`` says what each does."""

    sigma_is_std: bool
    wrap: bool | None
    mask: str
    centre: str | int | Sequence[int]
    variant: str
    scale: str


def filter_covariance(
    kernel_size: int | Sequence[int],
    sigma: float,
    *,
    dim: int = 2,
    dtype: torch.dtype = torch.float64,
    **switches: Unpack[Switches],
) -> Tensor:
    """Return the closed-form covariance of depthwise filters: ``Σ(x, y) = ½(z_x + z_y)·g(x − y) − ½·z_x·z_y``.

    ``g(x − y) = exp(−‖x − y‖²/2s)``, ``z_x = g(x − c)``, c = ⌊k/2⌋ along every axis (0-based; for an even kernel the
    tap right of the middle). Pixels are numbered in row-major order, as ``weight.flatten(2)`` lists them. The raw form
    is not positive semi-definite for k ≥ 5, so it is repaired in float64 and then rounded once.

    Args:
        kernel_size: k, or one k per axis. An axis of length 1 adds nothing; every other has at least 3 taps.
        sigma: s in squared taps, or its root if ``sigma_is_std``.
        dim: axes of a kernel that is given as one number.
        dtype: of the result.
        sigma_is_std: read ``sigma`` as a standard deviation (s = σ²) instead of a variance (s = σ, the default).
        wrap: measure x − y around a torus. Default: yes, except for ``"psd"``, which holds only without.
        mask: ``"x"`` damps by z_x (default); ``"y"`` is the transposed mask, ½(z_x + z_y)·g − ¼(z_x² + z_y²), which
            has a largely negative spectrum and is here to be studied.
        centre: ``"middle"`` is ⌊k/2⌋ (default); ``"last"`` is k − 1, the present in a causal convolution. Or a tap: its
            number from 0, or one per axis.
        variant: ``"clip"`` sets negative eigenvalues to 0 (default), ``"abs"`` takes their absolute values, and
            ``"psd"`` is our form that has none: ``√(z_x z_y)·(g(x − y) − ½√(z_x z_y))``, with the same diagonal.
        scale: ``"raw"`` (default); ``"unit"`` makes E‖F‖² = 1; ``"match_default"`` makes it 1/3, as torch's default.

    Returns:
        Σ, shape (K, K), K the product of the kernel's sizes.

    Raises:
        EspalierError: a kernel under 3, a sigma that is not positive and finite, a dtype that is not floating, a centre
            outside the kernel, or an unknown or contradictory switch.

    Source: arXiv 2210.03651, section 4; the repaired and positive variants are ours.
    """
    _check_floating(dtype)
    variant, scale = switches.get("variant", "clip"), switches.get("scale", "raw")
    covariance_KK = unrepaired_covariance(kernel_sizes(kernel_size, dim), sigma, **switches)
    if variant != "psd":
        eigenvalues, basis = torch.linalg.eigh(covariance_KK)
        repaired = eigenvalues.clamp_min(0) if variant == "clip" else eigenvalues.abs()
        covariance_KK = (basis * repaired) @ basis.mT
        covariance_KK = (covariance_KK + covariance_KK.mT) / 2
    if scale != "raw":
        covariance_KK /= covariance_KK.trace() * (1 if scale == "unit" else 3)
    return covariance_KK.to(dtype)


def unrepaired_covariance(sizes: tuple[int, ...], sigma: float, **switches: Unpack[Switches]) -> Tensor:
    """Return the closed form before negative eigenvalues are repaired and before scaling, float64.

    Args:
        sizes: taps along every axis, as ``kernel_sizes`` returns them.
        sigma: as in ``filter_covariance``.
        switches: as in ``filter_covariance``.

    Returns:
        Shape (K, K); symmetric; positive semi-definite for the variant ``"psd"`` only.
    """
    if not (is_one_number(sigma) and math.isfinite(sigma) and sigma > 0):
        raise EspalierError(f"sigma {sigma!r} must be a positive finite number")
    psd = check_switches(switches)
    sigma_is_std, wrap = switches.get("sigma_is_std", False), switches.get("wrap")
    centre = centre_tap(sizes, switches.get("centre", "middle"))

    def gauss(distance: Tensor) -> Tensor:
        # Divided before squaring: a tiny standard deviation must not underflow into 0/0.
        return torch.exp(-((distance / sigma) ** 2) / 2 if sigma_is_std else -(distance**2) / (2 * sigma))

    near, damp = [], []
    for size, tap in zip(sizes, centre, strict=True):
        taps = torch.arange(size, dtype=torch.float64, device="cpu")
        apart = (taps[:, None] - taps).abs()
        if not psd and (wrap is None or wrap):
            apart = torch.minimum(apart, size - apart)
        near.append(gauss(apart))
        damp.append(gauss(taps - tap))
    # A Gaussian of a squared distance factors over the axes.
    g_KK, z_K = reduce(torch.kron, near), reduce(torch.kron, damp)
    if psd:
        root_KK = torch.outer(z_K.sqrt(), z_K.sqrt())
        return root_KK * (g_KK - root_KK / 2)
    mask = z_K[:, None] if switches.get("mask", "x") == "x" else z_K[None, :]
    one_sided_KK = mask * (g_KK - z_K[None, :] / 2)
    return (one_sided_KK + one_sided_KK.mT) / 2


def check_switches(switches: Switches) -> bool:
    """Refuse unknown or contradictory switches; return whether the variant is the positive one."""
    for name in switches:
        if name not in Switches.__annotations__:
            raise unknown_name("argument", name, Switches.__annotations__)
    for name, known in (("variant", VARIANTS), ("mask", MASKS), ("centre", CENTRES), ("scale", SCALES)):
        value = switches.get(name, known[0])
        # A centre may be a tap instead, which the kernel's sizes decide on.
        tap = name == "centre" and not isinstance(value, str)
        if not tap and value not in known:
            raise unknown_name(name, str(value), known)
    psd = switches.get("variant") == "psd"
    if psd and switches.get("wrap"):
        raise EspalierError("wrap True contradicts variant 'psd', which is positive only unwrapped: leave wrap out")
    if psd and switches.get("mask", "x") != "x":
        raise EspalierError("mask 'y' contradicts variant 'psd', which damps both sides alike: leave mask out")
    return psd


def is_one_number(value: object) -> bool:
    """Return whether a value is a real number, or a tensor of one."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def _check_floating(dtype: torch.dtype) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise EspalierError(f"dtype {dtype!r} holds no fractions: give a floating-point one, such as torch.float32")


def centre_tap(sizes: tuple[int, ...], centre: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return the tap about which a kernel's closed form is centred, by its number from 0 on every axis.

    Raises:
        EspalierError: no name of a centre, or a tap that the kernel does not have.
    """
    if isinstance(centre, str):
        if centre not in CENTRES:
            raise unknown_name("centre", centre, CENTRES)
        return tuple(size - 1 if centre == "last" else size // 2 for size in sizes)
    given: Any = centre
    tap = tuple(given) if isinstance(given, Sequence) else (given,) * len(sizes)
    within = len(tap) == len(sizes) and all(isinstance(at, Integral) for at in tap)
    if not within or not all(0 <= at < size for at, size in zip(tap, sizes, strict=True)):
        raise EspalierError(f"centre {centre!r} is no tap of a kernel {sizes}: count from 0, once per axis")
    return tuple(int(at) for at in tap)


def centre_name(sizes: tuple[int, ...], centre: str | int | Sequence[int]) -> str | None:
    """Return ``"middle"`` or ``"last"`` for such a tap (either middle one of an even size), None for any other."""
    tap = centre_tap(sizes, centre)
    if all(size == 1 or at in ((size - 1) // 2, size // 2) for at, size in zip(tap, sizes, strict=True)):
        return "middle"
    return "last" if tap == tuple(size - 1 for size in sizes) else None


def kernel_sizes(kernel_size: int | Sequence[int], dim: int = 2) -> tuple[int, ...]:
    """Return the taps along every axis of a kernel given as one number or as one number per axis.

    Raises:
        EspalierError: no axis, an axis of 2 taps or of fewer than 1, no axis of at least 3, or a dim that is no number
            of axes.
    """
    dim = whole_number("dim", dim)
    given = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,) * dim
    if not all(isinstance(size, Integral) for size in given):
        raise EspalierError(f"kernel_size {kernel_size!r} must be whole numbers of taps: give k, or one k an axis")
    sizes = tuple(int(size) for size in given)
    if not any(size >= 3 for size in sizes) or any(size < 1 or size == 2 for size in sizes):
        raise EspalierError(
            f"kernel_size {kernel_size} is too small: give at least 3 taps an axis (or 1 beside others)"
        )
    return sizes


def sample_filters(
    covariance: Tensor, count: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw Gaussian filters of mean 0 and a given covariance: ``F = Z Σ^½``, computed in float64 and rounded once.

    The symmetric root is unique, so a seed gives the same filters whatever basis the eigensolver picks.

    Args:
        covariance: Σ, shape (K, K).
        count: filters to draw.
        generator: source of the noise; torch's global one if left out. Drawing is on the CPU.
        dtype: of the result; the covariance's if left out.

    Returns:
        Filters, shape (count, K), on the CPU.

    Raises:
        EspalierError: Σ is not square, finite, symmetric and positive semi-definite, a count that is no whole number
            from 0, or a dtype that is not floating.
    """
    count = whole_number("count", count, least=0)
    if dtype is not None:
        _check_floating(dtype)
    eigenvalues, basis = covariance_spectrum(covariance)
    # What rounding left of a zero would weigh its root's 1e-8 in the filters, another one on every library.
    noise_floor = len(basis) * torch.finfo(torch.float64).eps * float(eigenvalues[-1])
    root_KK = (basis * eigenvalues.where(eigenvalues > noise_floor, 0.0).sqrt()) @ basis.mT
    noise = torch.randn(count, len(basis), generator=cpu_generator(generator), dtype=torch.float64, device="cpu")
    return (noise @ root_KK).to(dtype or covariance.dtype)


def covariance_spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (K) and eigenvectors (K, K) of a covariance, float64 on the CPU, ascending.

    Raises:
        EspalierError: it is not square, finite, symmetric and, but for rounding, positive semi-definite.
    """
    if not isinstance(covariance, Tensor):
        raise EspalierError(f"covariance is a {type(covariance).__name__}: give a tensor (K, K)")
    size = covariance.shape[-1] if covariance.ndim else 0
    bare = not covariance.is_floating_point() or without_numbers(covariance)
    if bare or covariance.shape != (size, size) or size == 0:
        raise EspalierError(f"covariance of shape {tuple(covariance.shape)} must be a finite square matrix")
    sigma_KK = covariance.detach().cpu().double()
    if not sigma_KK.isfinite().all():
        raise EspalierError(f"covariance of shape {tuple(covariance.shape)} must be a finite square matrix")
    # Rounding to the covariance's own type moves every eigenvalue by up to its unit times the largest.
    share = max(_NEGATIVE_SHARE, torch.finfo(covariance.dtype).eps)
    if (sigma_KK - sigma_KK.mT).abs().max() > share * sigma_KK.abs().max():
        raise EspalierError("covariance is not symmetric: pass (Σ + Σᵀ)/2")
    eigenvalues, basis = torch.linalg.eigh((sigma_KK + sigma_KK.mT) / 2)
    if eigenvalues[0] < -share * eigenvalues[-1].abs():
        raise EspalierError(f"covariance has the eigenvalue {eigenvalues[0]:.3g} < 0: clip its spectrum first")
    return eigenvalues, basis


def depthwise_covariance_(
    weight: Tensor, sigma: float, *, generator: torch.Generator | None = None, **switches: Unpack[Switches]
) -> Tensor:
    """Fill depthwise filters in place with draws from the closed-form covariance ``Σ(sigma)``.

    Args:
        weight: shape (h, 1, *k) of a 1-, 2- or 3-D depthwise convolution. Left alone on the meta device and if empty.
        sigma: as in ``filter_covariance``.
        generator: source of the filters; torch's global one if left out.
        switches: as in ``filter_covariance``.

    Returns:
        The weight.

    Raises:
        EspalierError: the weight is not depthwise, or an argument that ``filter_covariance`` refuses.

    Source: arXiv 2210.03651.
    """
    return fill_filters_(weight, filter_covariance(depthwise_kernel(weight), sigma, **switches), generator)


def fill_filters_(weight: Tensor, covariance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill depthwise filters (h, 1, *k) in place with draws from a (K, K) covariance; only checks if meta or empty."""
    if without_numbers(weight) or weight.numel() == 0:
        covariance_spectrum(covariance)
        return weight
    filters_HK = sample_filters(covariance, weight.shape[0], generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return weight.copy_(filters_HK.view(weight.shape))


def depthwise_kernel(weight: Tensor) -> tuple[int, ...]:
    """Return the kernel's sizes of a depthwise weight (h, 1, *k).

    Raises:
        EspalierError: the weight has another shape, or holds no real floating-point numbers.
    """
    if not isinstance(weight, Tensor):
        raise EspalierError(f"weight is a {type(weight).__name__}: give a tensor (channels, 1, *kernel)")
    if weight.ndim < 3 or weight.shape[1] != 1 or not weight.is_floating_point():
        raise EspalierError(
            f"weight {tuple(weight.shape)}, {weight.dtype}, is not depthwise: pass (channels, 1, *kernel), floating"
        )
    return tuple(weight.shape[2:])


def is_depthwise(module: nn.Module) -> TypeGuard[Convolution]:
    """Return whether a module is a convolution with groups = input = output channels > 1 and more than one tap."""
    return (
        isinstance(module, Convolution)
        and module.groups == module.in_channels == module.out_channels > 1
        and max(module.kernel_size) > 1
    )
