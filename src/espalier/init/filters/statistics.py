"""Covariances of trained depthwise filters, measured in one network and carried over to another."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, require_known, unknown_name
from espalier.files import require_regular, write_tensors
from espalier.init.filters.census import read_filters
from espalier.init.filters.closed_form import (
    CENTRES,
    covariance_spectrum,
    filter_covariance,
    is_one_number,
    kernel_sizes,
)
from espalier.init.filters.fit import fit_closed_form, pooled_covariance
from espalier.sizes import whole_number

_FORMAT = "espalier.filter_statistics/1"
# Of layers that state their depth.
_PLACED_FORMAT = "espalier.filter_statistics/2"


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
        centre: the tap that meets the output's own position, ``"middle"`` or ``"last"`` (causal); None where nobody
            knows.
        depth: fractional depth in its network; None where all layers lie evenly from 0 to 1.
    """

    name: str
    kernel_size: tuple[int, ...]
    covariance: Tensor
    filters: int
    sampling_variance: float
    shrinkage: float = 0.0
    centre: str | None = None
    depth: float | None = None

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
            centre = self.centre or "middle"
            fit = fit_closed_form(self.covariance, self.kernel_size, centre=centre)
            if not fit.amplitude > 0:
                return self
            toward = fit.amplitude * filter_covariance(self.kernel_size, fit.sigma, centre=centre)
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

    Layer i of n lies at fractional depth i/(n − 1), unless the layers state theirs: beside layers that cannot be
    measured (several filters a channel, 2 taps) each keeps the depth that it has in its own network. A covariance does
    not depend on the width or the patch size of the network, so these need no conversion. Means are not carried over:
    filters are drawn about zero.

    Attributes:
        layers: in the order of depth.

    Raises:
        EspalierError: there is no layer, something that is none, or depths that do not rise from layer to layer.

    Source: arXiv 2210.03651, section 3; the shrinkage is ours.
    """

    layers: tuple[LayerStatistics, ...]

    def __post_init__(self) -> None:
        given = self.layers
        if not isinstance(given, tuple) or not given or not all(isinstance(part, LayerStatistics) for part in given):
            raise EspalierError(f"layers is {given!r}: give a tuple of at least one LayerStatistics")
        for layer in given:
            if layer.centre is not None:
                require_known(f"centre of layer {layer.name!r}", layer.centre, CENTRES)
        stated = [layer.depth for layer in given if layer.depth is not None]
        for depth in stated:
            check_depth(depth)
        if stated and (len(stated) < len(given) or any(a >= b for a, b in pairwise(stated))):
            raise EspalierError(f"layers state the depths {stated}: give rising ones to all {len(given)}, or to none")

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
        found = [read_filters(net) for net in nets]
        if not found or not found[0]:
            name = type(nets[0]).__name__ if nets else "list without networks"
            raise EspalierError(f"model {name} has no depthwise convolution to measure: one filter a channel, 3 taps")
        shapes = [[(layer.place, layer.kernel_size, layer.centre) for layer in layers] for layers in found]
        for net, shape in zip(nets, shapes, strict=True):
            if shape != shapes[0]:
                raise EspalierError(
                    f"model {type(net).__name__} differs from the first in depth or kernels: pool networks of one shape"
                )
        # Where all are measured they lie evenly, as in every file that states no depths.
        evenly = len(found[0]) == found[0][0].place[1]
        measured = []
        for same in zip(*found, strict=True):
            first, groups = same[0], [layer.filters for layer in same]
            try:
                covariance_KK, variance = pooled_covariance(groups)
            except EspalierError as error:
                raise EspalierError(f"layer {first.name!r}: {error}") from None
            sized = LayerStatistics(first.name, first.kernel_size, covariance_KK, sum(map(len, groups)), variance)
            depth = None if evenly else _even_depth(*first.place)
            measured.append(replace(sized, centre=first.centre, depth=depth))
        return cls(tuple(measured))

    @property
    def depths(self) -> tuple[float, ...]:
        """The fractional depth of every layer."""
        stated = tuple(layer.depth for layer in self.layers if layer.depth is not None)
        return stated or tuple(_even_depth(index, len(self.layers)) for index in range(len(self.layers)))

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
        depths = self.depths
        index = min(bisect_left(depths, depth), len(depths) - 1)
        above = self.layers[index].resize(kernel)
        # Before the first, beyond the last, or a layer's own depth, which others of other axes may surround.
        if index == 0 or depths[index] <= depth:
            return replace(above, depth=None)
        below = self.layers[index - 1].resize(kernel)
        share = (depth - depths[index - 1]) / (depths[index] - depths[index - 1])
        if None not in (below.centre, above.centre) and below.centre != above.centre:
            raise EspalierError(
                f"depth {depth:.3g} lies between {below.name!r} and {above.name!r}, which are about different taps: "
                "measure a network of causal layers alone, or of none"
            )
        return LayerStatistics(
            name=(below if share < 0.5 else above).name,
            kernel_size=kernel,
            covariance=(1 - share) * below.covariance + share * above.covariance,
            filters=min(below.filters, above.filters),
            sampling_variance=(1 - share) ** 2 * below.sampling_variance + share**2 * above.sampling_variance,
            shrinkage=(1 - share) * below.shrinkage + share * above.shrinkage,
            centre=below.centre and above.centre,
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
        depth = whole_number("depth", depth)
        return FilterStatistics(tuple(self.layer_at(_even_depth(index, depth), sizes) for index in range(depth)))

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
        stated = [(layer, _DESCRIBED + _WHERE_STATED) for layer in self.layers]
        described = [
            {name: value for name in names if (value := getattr(layer, name)) is not None} for layer, names in stated
        ]
        # Versions that know no depths would place these layers elsewhere without a word.
        form = _FORMAT if self.layers[0].depth is None else _PLACED_FORMAT
        try:
            return write_tensors(path, tensors, {"format": form, "layers": json.dumps(described)})
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
                if metadata.get("format") not in (_FORMAT, _PLACED_FORMAT):
                    raise EspalierError("it was not written by FilterStatistics.save")
                described = json.loads(metadata["layers"])
                layers = [_checked(entry, file.get_tensor(f"{i:04d}")) for i, entry in enumerate(described)]
                if not layers or len(layers) != len(list(file.keys())):
                    raise EspalierError(f"it names {len(layers)} layers and holds {len(list(file.keys()))}")
                return cls(tuple(layers))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EspalierError(f"statistics {path} cannot be read: {reason}") from error


def check_depth(depth: float) -> None:
    """Refuse what is no fraction of the depthwise layers passed."""
    if not is_one_number(depth):
        raise EspalierError(f"depth {depth!r} is no number: pass the fraction of the depthwise layers passed, in 0…1")
    if not 0 <= depth <= 1:
        raise EspalierError(f"depth {depth} is outside 0…1: pass the fraction of the depthwise layers passed")


_DESCRIBED = ("name", "kernel_size", "filters", "sampling_variance", "shrinkage")
_WHERE_STATED = ("centre", "depth")


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


def _even_depth(index: int, count: int) -> float:
    """Return the fractional depth of layer ``index`` of ``count``."""
    return index / (count - 1) if count > 1 else 0.5


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
        **{name: entry[name] for name in _WHERE_STATED if name in entry},
    )
