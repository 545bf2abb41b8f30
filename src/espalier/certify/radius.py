"""Certified radii: how far every image can move, in ℓ2 over [0, 1] pixels, before the network may change its mind.

For a network W·b(x) + v with an L-Lipschitz body b, the score difference f_y − f_j is L·‖w_y − w_j‖-Lipschitz, so

    radius = min over j ≠ y of (f_y − f_j) / (L·‖w_y − w_j‖).

Where the last module is no linear layer, the vector of scores is L-Lipschitz and the difference of two of them √2·L.
(Tsuzuku, Sato & Sugiyama, arXiv 1802.04034, sections 3 and 4; Singla, Singla & Feizi, arXiv 2108.04062, section 4.)

Note [Rounding]: L bounds the exact map of the stored parameters. Margins are taken from a float64 copy of the network,
whose rounding is far below everything else, and lose 2δ, where δ is ``SAFETY`` times the largest difference between
any score in float64 and as the network computes it. So a radius speaks of the network as it runs, not only of the
ideal one, provided its rounding error near an image is at most ``SAFETY`` times the largest that was met.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espalier.certify.bound import chain, module_bound, product_up
from espalier.certify.certificate import Certificate
from espalier.errors import EspalierError
from espalier.nn.lipschitz.normalisation import NormalizedLinear

SAFETY = 4.0
"""How many times the largest rounding error that was measured is taken off every score."""

_UP = 1.0 + 1e-12
"""What every quotient is rounded by: more than float64 can lose in the norms and products of one network."""


class ScoreBound(NamedTuple):
    """How fast differences of scores can grow: pair (y, j) by at most ``pairs[y, j]`` per unit of distance."""

    pairs_CC: Tensor
    """In float64, on the CPU; zero on the diagonal."""
    lipschitz: float
    """Of the part below the last layer if ``last_layer``, else of the vector of scores."""
    last_layer: bool
    """Whether the weights of the last layer were used pair by pair."""


def certify(net: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256) -> Certificate:
    """Return the certified radius of every image; see the top of this file for formula and rounding.

    Args:
        net: maps images to scores (B, C); its input normalisation is part of it. It is neither trained nor moved: its
            present weights and mode are certified.
        images: (N, C, H, W) (any shape after N) floating, in [0, 1]: distances are in these units.
        labels: (N,) class indices.
        batch_size: images per forward pass.

    Raises:
        EspalierError: images outside [0, 1] or not finite, or labels that do not fit them.
        UncertifiableError: a module without a known Lipschitz constant.
    """
    check_pixels(images, labels)
    # The bound is that of the float64 copy: both halves of the quotient speak of one and the same map.
    twin = copy.deepcopy(net).double()
    scores_NC, difference = exact_scores(net, twin, images, batch_size)
    bound = score_bound(twin, scores_NC.shape[1])
    if labels.max() >= scores_NC.shape[1]:
        raise EspalierError(f"labels go up to {int(labels.max())}, the network has {scores_NC.shape[1]} scores")
    predictions_N = scores_NC.argmax(1)
    radii_N = certified_radii(scores_NC, labels.cpu(), bound.pairs_CC, slack=2 * SAFETY * difference)
    return Certificate(
        radii=tuple(radii_N.tolist()),
        labels=tuple(labels.tolist()),
        predictions=tuple(predictions_N.tolist()),
        lipschitz=bound.lipschitz,
        last_layer=bound.last_layer,
        rounding=difference,
        assumptions=_assumptions(bound, difference),
    )


def certified_radii(scores_NC: Tensor, labels_N: Tensor, pairs_CC: Tensor, slack: float = 0.0) -> Tensor:
    """Return min over j ≠ y of (f_y − f_j − slack) / pairs[y, j], 0 where that is not positive.

    A point is certified at ε if its radius is strictly greater. NaN among the scores of an image gives 0.

    Args:
        scores_NC: float64 scores.
        labels_N: class indices y.
        pairs_CC: largest growth of f_y − f_j per unit of distance; a pair that cannot change (0) is no threat.
        slack: what rounding can take from a difference.

    Returns:
        (N,) in float64; infinite where no pair can change.
    """
    margins_NC = scores_NC.gather(1, labels_N[:, None]) - scores_NC - slack
    growth_NC = pairs_CC[labels_N] * _UP
    radii_NC = torch.where(growth_NC > 0, margins_NC / growth_NC, torch.where(margins_NC > 0, math.inf, -math.inf))
    radii_NC.scatter_(1, labels_N[:, None], math.inf)
    radii_N = radii_NC.amin(1)
    # A comparison with NaN is false, so NaN ends at zero together with wrong predictions.
    return torch.where((radii_N > 0) & torch.isfinite(scores_NC).all(1), radii_N, 0.0)


def score_bound(net: nn.Module, classes: int) -> ScoreBound:
    """Return how fast the differences of the scores of ``net`` can grow.

    Args:
        net: the network.
        classes: number of its scores.

    Raises:
        UncertifiableError: a module without a known Lipschitz constant.
    """
    modules = list(chain(net))
    path, last = modules[-1]
    weight_CF = _classifier_weight(last)
    if weight_CF is None or len(weight_CF) != classes:
        total = product_up(module_bound(module, where) for where, module in modules)
        return ScoreBound(total * math.sqrt(2.0) * (1.0 - torch.eye(classes, dtype=torch.float64)), total, False)
    module_bound(last, path)  # refuses hooks and weights that are not finite
    body = product_up(module_bound(module, where) for where, module in modules[:-1])
    distances_CC = torch.stack([torch.linalg.vector_norm(weight_CF - row, dim=1) for row in weight_CF])
    return ScoreBound(body * distances_CC, body, True)


@torch.no_grad()
def exact_scores(net: nn.Module, twin: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """Return the scores of a float64 copy of ``net`` and the largest difference to those that ``net`` computes.

    Args:
        net: the network.
        twin: its copy in float64.
        images: floating; each network sees them in its own precision and on its own device.
        batch_size: images per forward pass.

    Returns:
        (N, C) in float64 on the CPU, and the largest difference over all finite scores.
    """
    like = next(net.parameters(), torch.empty(0))
    scores, difference = [], 0.0
    for batch in images.to(like.dtype).split(batch_size):
        exact = twin(batch.to(like.device).double()).cpu()
        if exact.ndim != 2:
            raise EspalierError(f"the network returns {tuple(exact.shape)} for a batch: scores (B, C) are needed")
        gap = (exact - net(batch.to(like.device)).double().cpu()).abs()
        difference = max(difference, torch.where(torch.isfinite(gap), gap, 0.0).max().item())
        scores.append(exact)
    return torch.cat(scores), difference


def check_pixels(images: Tensor, labels: Tensor) -> None:
    """Refuse images that are not pixels in [0, 1], and labels that do not fit them.

    Raises:
        EspalierError: see above.
    """
    if not images.is_floating_point():
        raise EspalierError(f"images are {images.dtype}: give pixels in [0, 1] (uint8 images divided by 255)")
    if len(images) == 0 or labels.shape != images.shape[:1] or labels.is_floating_point() or labels.min() < 0:
        raise EspalierError(
            f"{tuple(images.shape)} images, {tuple(labels.shape)} labels: one class index from 0 per image"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        raise EspalierError(
            f"images range over [{low:g}, {high:g}]: give pixels in [0, 1] and let the network normalise them "
            "(nn.Sequential(source.normalizer, model))"
        )


def _classifier_weight(module: nn.Module) -> Tensor | None:
    """Return the matrix (C, F) of a last layer that is linear, in float64 on the CPU."""
    if isinstance(module, NormalizedLinear):
        weight = copy.deepcopy(module).double().classifier_weight()
    elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        weight = module.weight
    else:
        return None
    return weight.detach().double().cpu()


def _assumptions(bound: ScoreBound, difference: float) -> tuple[str, ...]:
    how = (
        "the distances between the rows of the last layer, pair by pair, times the product of the constants below it"
        if bound.last_layer
        else "√2 times the product of the constants of all modules"
    )
    return (
        "Distances are ℓ2 over pixels in [0, 1], all channels together; a perturbed image need not stay in that range.",
        f"Score differences grow at most by {how} ({bound.lipschitz:.6g}); every module states its own constant.",
        "A point counts at ε only if it is classified correctly and its radius is strictly greater than ε.",
        f"Margins come from float64 and lose 2 × {SAFETY:g} × {difference:.3g} for rounding: the largest difference to "
        f"the scores as computed, times {SAFETY:g}; no larger rounding error is assumed to occur near these images.",
        "The certificate is about these weights, these images and deterministic evaluation.",
    )
