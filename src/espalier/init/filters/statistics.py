"""Covariances of trained depthwise filters, measured in one network and carried over to another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, unknown_name
from espalier.files import require_regular, write_tensors
from espalier.init.filters.closed_form import (
    Convolution,
    covariance_spectrum,
    depthwise_layers,
    filter_covariance,
    is_count,
    is_one_number,
    kernel_sizes,
)
from espalier.init.filters.fit import fit_closed_form, pooled_covariance
from espalier.init.layouts.find import as_in_evaluation

_FORMAT = "espalier.filter_statistics/1"


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The covariance of one depthwise layer's filters.

    Attributes:
        name: the layer it was measured in, or the one nearest to it in depth.
        kernel_size: taps along every axis.
        covariance: shape (K, K), float64; taps in row-major order.
        filters: how many filters stand behind it.
        sampling_variance: expected squared Frobenius error of the covariance; carried through a resize as if the
            filters were Gaussian.
        shrinkage: share of the target that ``shrink`` mixed in.
    """

    name: str
    kernel_size: tuple[int, ...]
    covariance: Tensor
    filters: int
    sampling_variance: float
    shrinkage: float = 0.0

    def resize(self, kernel_size: tuple[int, ...]) -> LayerStatistics:
        """Return the covariance of these filters resized bilinearly: ``R Σ Rᵀ``, trace restored.

        Raises:
            EspalierError: the kernels have different numbers of axes.
        """
        if kernel_size == self.kernel_size:
            return self
        resize = resize_matrix(self.kernel_size, kernel_size)
        resized_KK = resize @ self.covariance @ resize.mT
        trace = resized_KK.trace()
        # Filters that vanish on every sampled tap have no energy to restore.
        resized_KK *= self.covariance.trace() / trace if trace > 0 else 0.0
        before, after = _gaussian_error(self.covariance), _gaussian_error(resized_KK)
        variance = self.sampling_variance * after / before if before > 0 else 0.0
        return replace(self, kernel_size=kernel_size, covariance=resized_KK, sampling_variance=variance)

    def shrink(self, toward: Tensor | None, strength: float | None) -> LayerStatistics:
        """Return the mixture with a target; see ``FilterStatistics.shrink``."""
        if toward is None:
            fit = fit_closed_form(self.covariance, self.kernel_size)
            if not fit.amplitude > 0:
                return self
            toward = fit.amplitude * filter_covariance(self.kernel_size, fit.sigma)
        if toward.shape != self.covariance.shape:
            raise EspalierError(
                f"toward has shape {tuple(toward.shape)}, layer {self.name!r} needs {tuple(self.covariance.shape)}"
            )
        covariance_spectrum(toward)
        if strength is None:
            apart = float((self.covariance - toward).square().sum())
            strength = min(self.sampling_variance / apart, 1.0) if apart > 0 else 0.0
        mixed_KK = (1 - strength) * self.covariance + strength * toward
        variance = (1 - strength) ** 2 * self.sampling_variance
        kept = (1 - self.shrinkage) * (1 - strength)
        return replace(self, covariance=mixed_KK, sampling_variance=variance, shrinkage=1 - kept)


@dataclass(frozen=True, eq=False)
class FilterStatistics:
    """The covariances of a network's depthwise filters, layer by layer, ready for a network of another size.

    Layer i of n lies at fractional depth i/(n − 1). A covariance does not depend on the width or the patch size of the
    network, so these need no conversion. Means are not carried over: filters are drawn about zero.

    Attributes:
        layers: in the order of depth.

    Raises:
        EspalierError: there is no layer, or something that is none.

    Source: arXiv 2210.03651, section 3; the shrinkage is ours.
    """

    layers: tuple[LayerStatistics, ...]

    def __post_init__(self) -> None:
        given = self.layers
        if not isinstance(given, tuple) or not given or not all(isinstance(part, LayerStatistics) for part in given):
            raise EspalierError(f"layers is {given!r}: give a tuple of at least one LayerStatistics")

    @classmethod
    def from_model(cls, models: nn.Module | Sequence[nn.Module]) -> FilterStatistics:
        """Measure a trained network, or several of one shape (other seeds, other widths) pooled layer by layer.

        Every network's filters are taken about their own mean.

        Raises:
            EspalierError: no network, no depthwise convolution, networks of different depths or kernel sizes, or
                weights that are not finite.
        """
        if not isinstance(models, nn.Module | Iterable):
            raise EspalierError(f"models is {models!r}: give a module, or a list of modules")
        nets = [models] if isinstance(models, nn.Module) else list(models)
        if odd := [net for net in nets if not isinstance(net, nn.Module)]:
            raise EspalierError(f"models holds a {type(odd[0]).__name__}: give a module, or a list of modules")
        found = [depthwise_layers(net) for net in nets]
        if not found or not found[0]:
            name = type(nets[0]).__name__ if nets else "list without networks"
            raise EspalierError(f"model {name} has no depthwise convolution: nothing to measure")
        shapes = [[module.kernel_size for _, module in layers] for layers in found]
        for net, shape in zip(nets, shapes, strict=True):
            if shape != shapes[0]:
                raise EspalierError(
                    f"model {type(net).__name__} differs from the first in depth or kernels: pool networks of one shape"
                )
        measured = []
        for same in zip(*found, strict=True):
            name, first = same[0]
            groups = [_filters(module) for _, module in same]
            try:
                covariance_KK, variance = pooled_covariance(groups)
            except EspalierError as error:
                raise EspalierError(f"layer {name!r}: {error}") from None
            count = sum(map(len, groups))
            measured.append(LayerStatistics(name, tuple(first.kernel_size), covariance_KK, count, variance))
        return cls(tuple(measured))

    def layer_at(self, depth: float, kernel_size: int | Sequence[int] | None = None) -> LayerStatistics:
        """Return the statistics at a fractional depth, between the two nearest layers in proportion.

        Args:
            depth: in [0, 1].
            kernel_size: kernel to resize to, k or one k per axis; left out, the one that all layers share.

        Raises:
            EspalierError: a depth that is no number in 0…1, a kernel under 3 or of another number of axes, or layers of
                different kernels and no ``kernel_size``.
        """
        check_depth(depth)
        sizes = {layer.kernel_size for layer in self.layers}
        if kernel_size is not None:
            kernel = kernel_sizes(kernel_size, len(self.layers[0].kernel_size))
        elif len(sizes) == 1:
            kernel = sizes.pop()
        else:
            raise EspalierError(f"layers have the kernels {sorted(sizes)}: pass kernel_size to resize them to one")
        position = depth * (len(self.layers) - 1)
        index = min(int(position), max(len(self.layers) - 2, 0))
        share = position - index
        below = self.layers[index].resize(kernel)
        if share == 0:
            return below
        above = self.layers[index + 1].resize(kernel)
        return LayerStatistics(
            name=(below if share < 0.5 else above).name,
            kernel_size=kernel,
            covariance=(1 - share) * below.covariance + share * above.covariance,
            filters=min(below.filters, above.filters),
            sampling_variance=(1 - share) ** 2 * below.sampling_variance + share**2 * above.sampling_variance,
            shrinkage=(1 - share) * below.shrinkage + share * above.shrinkage,
        )

    def covariance_at(self, depth: float, kernel_size: int | Sequence[int] | None = None) -> Tensor:
        """Return the covariance (K, K) at a fractional depth; see ``layer_at``."""
        return self.layer_at(depth, kernel_size).covariance

    def resample(self, kernel_size: int | Sequence[int] | None = None, depth: int | None = None) -> FilterStatistics:
        """Return the statistics for another kernel size and another number of layers.

        Args:
            kernel_size: k, or one k per axis; left out, kernels stay as they are.
            depth: number of depthwise layers; left out, it stays as it is.

        Raises:
            EspalierError: a kernel under 3, another number of axes, fewer than 1 layer, or a new depth for layers of
                different kernels without a ``kernel_size``.
        """
        sizes = None
        if kernel_size is not None:
            sizes = kernel_sizes(kernel_size, len(self.layers[0].kernel_size))
        if depth is None:
            return FilterStatistics(tuple(layer.resize(sizes or layer.kernel_size) for layer in self.layers))
        if not is_count(depth, 1):
            raise EspalierError(f"depth {depth!r} is no number of layers: give a whole number from 1")
        depths = [index / (depth - 1) for index in range(depth)] if depth > 1 else [0.5]
        return FilterStatistics(tuple(self.layer_at(at, sizes) for at in depths))

    def shrink(self, toward: str | Tensor = "closed-form", strength: str | float = "auto") -> FilterStatistics:
        """Mix every covariance with a target that has no sampling error: ``(1 − ρ)·S + ρ·T``.

        The strength that minimises the expected squared error is ``ρ = E‖S − Σ‖² / E‖S − T‖²``; both are estimated
        from the filters themselves.

        Args:
            toward: ``"closed-form"``, whose σ and factor are fitted to each layer, or a covariance (K, K) for all.
            strength: ``"auto"``, or ρ in [0, 1].

        Raises:
            EspalierError: an unknown target or strength, or a target of another shape.

        Source: Ledoit and Wolf (2004), theorem 2.1, with the closed form of arXiv 2210.03651 as the target.
        """
        if isinstance(toward, str) and toward != "closed-form":
            raise unknown_name("shrinkage target", toward, ["closed-form"])
        if not isinstance(toward, str | Tensor):
            raise EspalierError(f"toward is {toward!r}: give 'closed-form', or a covariance as a tensor (K, K)")
        if isinstance(strength, str) and strength != "auto":
            raise unknown_name("strength", strength, ["auto"])
        if not isinstance(strength, str) and not is_one_number(strength):
            raise EspalierError(f"strength {strength!r} is no number: give the target's share in 0…1, or 'auto'")
        if not isinstance(strength, str) and not 0 <= strength <= 1:
            raise EspalierError(f"strength {strength} is outside 0…1: it is the target's share")
        target = None if isinstance(toward, str) else toward.detach().double().cpu()
        share = None if isinstance(strength, str) else float(strength)
        return FilterStatistics(tuple(layer.shrink(target, share) for layer in self.layers))

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, complete or not at all, and return its path.

        Raises:
            EspalierError: the file cannot be written.
        """
        path = Path(path)
        tensors = {f"{index:04d}": layer.covariance for index, layer in enumerate(self.layers)}
        described = [{name: getattr(layer, name) for name in _DESCRIBED} for layer in self.layers]
        try:
            return write_tensors(path, tensors, {"format": _FORMAT, "layers": json.dumps(described)})
        except OSError as error:
            raise EspalierError(f"statistics {path} cannot be written ({error.strerror}): name another path") from error

    @classmethod
    def load(cls, path: str | Path) -> FilterStatistics:
        """Read what ``save`` wrote; every covariance is checked.

        Raises:
            EspalierError: the file is missing, is no such file, or holds something that is not a covariance.
        """
        from safetensors import SafetensorError, safe_open

        try:
            require_regular(Path(path))
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise EspalierError("it was not written by FilterStatistics.save")
                described = json.loads(metadata["layers"])
                layers = [_checked(entry, file.get_tensor(f"{i:04d}")) for i, entry in enumerate(described)]
                if not layers or len(layers) != len(list(file.keys())):
                    raise EspalierError(f"it names {len(layers)} layers and holds {len(list(file.keys()))}")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EspalierError(f"statistics {path} cannot be read: {reason}") from error
        return cls(tuple(layers))


def check_depth(depth: float) -> None:
    """Refuse what is no fraction of the depthwise layers passed."""
    if not is_one_number(depth):
        raise EspalierError(f"depth {depth!r} is no number: pass the fraction of the depthwise layers passed, in 0…1")
    if not 0 <= depth <= 1:
        raise EspalierError(f"depth {depth} is outside 0…1: pass the fraction of the depthwise layers passed")


_DESCRIBED = ("name", "kernel_size", "filters", "sampling_variance", "shrinkage")


def resize_matrix(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Return R (K_new, K_old), float64, with ``R @ f.flatten()`` the filter f resized linearly along every axis.

    The convention is that of ``torch.nn.functional.interpolate(align_corners=False)``: the kernels' outer edges fall
    together. Between two odd sizes, centre goes to centre.

    Raises:
        EspalierError: different numbers of axes.
    """
    if len(old) != len(new):
        raise EspalierError(f"kernel {new} cannot be made from kernel {old}: they differ in the number of axes")
    factors = []
    for before, after in zip(old, new, strict=True):
        taps = torch.arange(after, device="cpu")
        source = ((taps.double() + 0.5) * before / after - 0.5).clamp(0, before - 1)
        lower = source.floor().long().clamp_max(max(before - 2, 0))
        share = source - lower
        factor = torch.zeros(after, before, dtype=torch.float64, device="cpu")
        factor[taps, lower] += 1 - share
        factor[taps, (lower + 1).clamp_max(before - 1)] += share
        factors.append(factor)
    return reduce(torch.kron, factors)


@torch.no_grad()
def _filters(module: Convolution) -> Tensor:
    """Return a layer's filters (h, K), with what computes them kept still: in training, spectral norm moves."""
    with as_in_evaluation(module):
        return module.weight.flatten(1)


def _gaussian_error(covariance_KK: Tensor) -> float:
    """Return E‖S − Σ‖² for Gaussian filters, but for the factor 1/n."""
    return float(covariance_KK.trace() ** 2 + covariance_KK.square().sum())


def _checked(entry: dict[str, Any], covariance_KK: Tensor) -> LayerStatistics:
    """Return one layer of a file, or raise if it is no covariance of such a kernel."""
    numbers = [entry[name] for name in ("filters", "sampling_variance", "shrinkage")]
    whole = [*entry["kernel_size"], numbers[0]]
    if not all(type(size) is int and size >= 1 for size in whole):
        raise EspalierError(f"layer {entry['name']!r} states {whole} as its kernel and filters: not counts from 1")
    if not all(type(value) in (int, float) and 0 <= value < math.inf for value in numbers) or numbers[2] > 1:
        raise EspalierError(f"layer {entry['name']!r} states {numbers[1:]} as its sampling variance and shrinkage")
    sizes = tuple(entry["kernel_size"])
    expected = torch.Size(sizes).numel()
    if covariance_KK.shape != (expected, expected) or covariance_KK.dtype != torch.float64:
        raise EspalierError(f"layer {entry['name']!r} has no float64 covariance of its kernel {sizes}")
    covariance_spectrum(covariance_KK)
    return LayerStatistics(
        name=str(entry["name"]),
        kernel_size=sizes,
        covariance=covariance_KK,
        filters=entry["filters"],
        sampling_variance=float(entry["sampling_variance"]),
        shrinkage=float(entry["shrinkage"]),
    )
