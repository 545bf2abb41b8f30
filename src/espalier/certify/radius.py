"""Certified radii: how far every image can move, in ℓ2 over [0, 1] pixels, before the prediction can change.

For a network W·b(x) + v with an L-Lipschitz body b, the score difference f_y − f_j is L·‖w_y − w_j‖-Lipschitz, so

    radius = min over j ≠ y of (f_y − f_j) / (L·‖w_y − w_j‖).

Where the last operation is not linear, the vector of scores is L-Lipschitz and the difference of two of them √2·L.
(Tsuzuku, Sato & Sugiyama, arXiv 1802.04034, sections 3 and 4; Singla, Singla & Feizi, arXiv 2108.04062, section 4.)

Note [Rounding]: a certificate is about the network as it runs, in float64 or in float32. With a running bound, scores
as computed differ from those in real arithmetic by at most a + b·r for every image within r (see
``espalier.certify.bounded``), for a difference of two of them as well. With m the difference as computed at x and G its
growth, it stays positive within r if m − a − G·r − (a + b·r) > 0:

    radius = min over j ≠ y of (m − 2a) / (G + b),

cut off where a number on the way could overflow. Every bound holds for sums in any order, with or without fused
operations, with or without denormal numbers: for any number of threads, batch size and library, as long as products are
summed as products (no TF32, no Winograd). What a network computes of its parameters alone, such as the operator of an
orthogonal layer, is part of the map that is bounded, and taken as this machine computed it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espalier.certify.arithmetic import gamma, image_norms
from espalier.certify.bound import check_numbers, device_of, plain_arithmetic, prepared
from espalier.certify.bounded import Analysis
from espalier.certify.certificate import Certificate
from espalier.certify.digits import refuse_settings
from espalier.certify.plain_passes import IMAGES, compare_plain_passes
from espalier.certify.refusal import UncertifiableError
from espalier.certify.value import Bound
from espalier.errors import EspalierError, unknown_name

ARITHMETIC = {"float64": torch.float64, "float32": torch.float32}

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_UP = 1.0 + 1e-9
"""What bounds are rounded up by at the end: far more than float64 can lose in their own computation."""


class ScoreBound(NamedTuple):
    """How differences of scores can change around some images: see Note [Rounding]."""

    growth_CC: Tensor
    """G, in float64; zero on the diagonal."""
    error_NCC: Tensor
    """a."""
    error_growth_CC: Tensor
    """b."""
    lipschitz: float
    """Of the part below the last layer if ``last_layer``, else of the vector of scores."""
    last_layer: bool
    """Whether the rows of the last linear layer were used pair by pair."""


def certify(
    net: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256, arithmetic: str = "float64"
) -> Certificate:
    """Return the certified radius of every image; see the top of this file for formula and rounding.

    Args:
        net: maps images to scores (B, C); its input normalisation is part of it. It is neither trained nor moved: its
            present weights and mode are certified.
        images: (N, C, H, W) (any shape after N) floating, in [0, 1]: distances are in these units. An image nearby
            need not stay in that range.
        labels: (N,) class indices.
        batch_size: images per forward pass.
        arithmetic: ``"float64"``: the certificate is about ``net.double()``, and rounding costs next to nothing.
            ``"float32"``: about ``net.float()``, with the larger bound that its rounding has. Images are converted; for
            float32 that is a shift, and it is charged.

    Raises:
        EspalierError: images outside [0, 1] or not finite, labels that do not fit them, or an unknown arithmetic.
        UncertifiableError: an operation without a rule, named with the path of its module; a network that is random or
            depends on what it computed before or on the number of images.
    """
    if not isinstance(arithmetic, str) or arithmetic not in ARITHMETIC:
        raise unknown_name("arithmetic", str(arithmetic), ARITHMETIC)
    labels = check_pixels(images, labels, batch_size)
    dtype, analysis = ARITHMETIC[arithmetic], Analysis()
    radii: list[Tensor] = []
    predictions, roundings = [], []
    with prepared(net, dtype, analysis) as twin:
        if dtype == torch.float32:
            refuse_settings(device_of(twin))
        for some, theirs in zip(images.split(batch_size), labels.cpu().split(batch_size), strict=True):
            scores, bound = _bounded_scores(twin, analysis, some.detach(), dtype, first=not radii)
            if theirs.max() >= scores.shape[1]:
                raise EspalierError(f"labels go up to {int(labels.max())}, the network has {scores.shape[1]} scores")
            assert analysis.room is not None
            radii.append(certified_radii(scores, theirs, bound, analysis.room.cpu()))
            predictions.append(scores.argmax(1))
            roundings.append(bound.error_NCC.amax((1, 2)))
    _check_original(net, images[:IMAGES])
    rounding = torch.cat(roundings).max().item()
    return Certificate(
        radii=tuple(torch.cat(radii).tolist()),
        labels=tuple(labels.tolist()),
        predictions=tuple(torch.cat(predictions).tolist()),
        lipschitz=bound.lipschitz,
        last_layer=bound.last_layer,
        rounding=rounding,
        assumptions=_assumptions(bound, arithmetic, rounding, tuple(analysis.wrappers)),
        arithmetic=arithmetic,
        slack=tuple((path, *numbers) for path, numbers in analysis.modules.items()),
    )


def _check_original(net: nn.Module, images: Tensor) -> None:
    """Refuse a network that gives other scores than a copy of it does: only copies were run."""
    dtype = next((tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()), torch.float32)
    if any(module.training for module in net.modules()):  # running it could change it
        return
    try:
        with torch.no_grad(), plain_arithmetic(net):
            mine, theirs = (run(images.to(device_of(net), dtype, copy=True)) for run in (net, copy.deepcopy(net)))
    except (RuntimeError, TypeError):  # it runs in the precision of the certificate alone
        return
    if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().nan_to_num(0, 0, 0).max().item(),
                          equal_nan=True):  # fmt: skip
        raise UncertifiableError("a copy of it gives other scores than it: does it know itself by name?",
                                 type(net).__name__)  # fmt: skip


def certified_radii(scores_NC: Tensor, labels_N: Tensor, bound: ScoreBound, room_N: Tensor | None = None) -> Tensor:
    """Return min over j ≠ y of (f_y − f_j − 2a) / (G + b), 0 where that is not positive.

    A point is certified at ε if its radius is strictly greater. NaN or infinity among the scores of an image gives 0.

    Args:
        scores_NC: as computed, in float64.
        labels_N: class indices y.
        bound: how score differences can change; a pair that cannot is no threat.
        room_N: radius up to which nothing overflows.

    Returns:
        (N,) in float64; infinite where no pair can change.
    """
    own_N1 = scores_NC.gather(1, labels_N[:, None])
    # The difference and the quotient are rounded, too.
    lost_NC = 1e-15 * (own_N1.abs() + scores_NC.abs())
    error_NC = bound.error_NCC.expand(len(labels_N), -1, -1)[torch.arange(len(labels_N)), labels_N]
    margins_NC = own_N1 - scores_NC - 2 * _UP * error_NC - lost_NC
    growth_NC = (bound.growth_CC + bound.error_growth_CC)[labels_N] * _UP
    radii_NC = torch.where(growth_NC > 0, margins_NC / growth_NC, torch.where(margins_NC > 0, math.inf, -math.inf))
    radii_NC.scatter_(1, labels_N[:, None], math.inf)
    radii_N = radii_NC.amin(1)
    if room_N is not None:
        radii_N = torch.minimum(radii_N, room_N)
    # A comparison with NaN is false, so NaN ends at zero together with wrong predictions.
    return torch.where((radii_N > 0) & torch.isfinite(scores_NC).all(1), radii_N, 0.0)


def score_bound(scores: Bound) -> ScoreBound:
    """Return how the differences of scores (N, C) with a bound can change."""
    classes = scores.numbers.shape[1]
    assert scores.error is not None
    if scores.rows is None:
        pairs_CC = math.sqrt(2.0) * (1 + 1e-15) * (1.0 - torch.eye(classes, dtype=torch.float64))
        error_NCC = scores.error.cpu()[:, None, None] * pairs_CC
        return ScoreBound(scores.lipschitz * pairs_CC, error_NCC, scores.growth * pairs_CC, scores.lipschitz, False)
    source, weight, bias = scores.rows
    dtype, weight_CF, terms = scores.numbers.dtype, weight.double().cpu(), weight.shape[1]
    assert source.error is not None
    distances_CC = torch.stack([image_norms(weight_CF - row) for row in weight_CF])
    distances_CC.fill_diagonal_(0.0)
    # Every score is a sum of n products and the bias, rounded by itself.
    u, tiny = gamma(terms + 1, dtype), torch.finfo(dtype).tiny * 1e6
    rows_C = (u + tiny) * image_norms(weight_CF) + tiny
    lifts_C = torch.zeros(classes, dtype=torch.float64) if bias is None else u * bias.double().abs().cpu()
    size_N, slope = source.size
    own_NC = rows_C * size_N.cpu()[:, None] + lifts_C + tiny * terms
    error_NCC = distances_CC * source.error.cpu()[:, None, None] + own_NC[:, :, None] + own_NC[:, None, :]
    off = 1.0 - torch.eye(classes, dtype=torch.float64)
    error_growth_CC = distances_CC * source.growth + (rows_C[:, None] + rows_C) * slope * off
    growth_CC = source.lipschitz * distances_CC
    if source.lipschitz > 0:  # a product that vanishes in float64 is still not 0
        growth_CC = torch.where(distances_CC > 0, growth_CC.clamp_min(1e-300), growth_CC)
    return ScoreBound(growth_CC, error_NCC * off, error_growth_CC, source.lipschitz, True)


def check_pixels(images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Return the labels in int64, of images that are pixels in [0, 1].

    Raises:
        EspalierError: other images, labels that do not fit them, or batches that are no whole number of them.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise EspalierError(f"batch_size is {batch_size!r}: give a whole number from 1")
    check_numbers("images are", images)
    check_numbers("labels are", labels)
    if not images.is_floating_point():
        raise EspalierError(f"images are {images.dtype}: give pixels in [0, 1] (uint8 images divided by 255)")
    if labels.shape != images.shape[:1] or labels.dtype not in _INTEGERS or labels.min() < 0:
        raise EspalierError(
            f"{tuple(images.shape)} images, {tuple(labels.shape)} labels of {labels.dtype}: one class index from 0 per "
            "image"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        raise EspalierError(
            f"images range over [{low:g}, {high:g}]: give pixels in [0, 1] and let the network normalise them "
            "(nn.Sequential(source.normalizer, model))"
        )
    return labels.long()


def _bounded_scores(
    twin: nn.Module, analysis: Analysis, images: Tensor, dtype: torch.dtype, *, first: bool
) -> tuple[Tensor, ScoreBound]:
    """Return the scores of a batch in float64 on the CPU, as a plain run of the network gives them, and their bound."""
    batch = images.to(device_of(twin), dtype)
    # An image in more digits is rounded first: a shift of at most u times its norm.
    shift = torch.finfo(dtype).eps / 2 * (1 + 1e-6) if dtype == torch.float32 else 0.0
    if first:  # the next passes, and those of other batches, must do the same
        analysis.run(twin, analysis.start(batch[:1], shift))
        compare_plain_passes(twin, analysis, batch)
    traced = analysis.run(twin, analysis.start(batch, shift)).bound
    if traced.numbers.ndim != 2 or len(traced.numbers) != len(batch):
        raise EspalierError(f"the network returns {tuple(traced.numbers.shape)} for a batch: scores (B, C) are needed")
    # The same without bounds, as a user runs it, and in batches of other lengths. A network that is random, that keeps
    # count, or that tells a value with a bound from a tensor, gives itself away if it is further off than rounding can
    # take it.
    parts = [batch[:1].clone(), batch[1:].clone()] if len(batch) > 1 else [batch.repeat(2, *[1] * (batch.ndim - 1))]
    try:
        plain = torch.cat([twin(part) for part in parts])
    except (RuntimeError, TypeError):  # it takes this length alone
        plain = twin(batch.clone())
    if not isinstance(plain, Tensor):
        raise UncertifiableError("run again, it does not return a tensor of scores", type(twin).__name__)
    assert traced.error is not None
    gap = (plain.double() - traced.numbers.double()).abs()
    allowed = 2 * _UP * traced.error[:, None] + 1e-300
    alike = (gap <= allowed) | (plain == traced.numbers) | ~torch.isfinite(traced.numbers)
    if plain.shape[1:] != traced.numbers.shape[1:] or not bool(alike.all()):
        raise UncertifiableError(
            f"run again, in batches of another length, it gives scores that differ by {gap.max().item():.3g}, more "
            "than rounding can: is it random, or does it depend on other images or on what it computed before?",
            type(twin).__name__,
        )
    bad = ~torch.isfinite(plain[: len(batch)]).all(1, keepdim=True)
    scores = torch.where(bad, math.nan, traced.numbers.double())
    return scores.cpu(), score_bound(traced)


def _assumptions(bound: ScoreBound, arithmetic: str, rounding: float, wrappers: Sequence[str]) -> tuple[str, ...]:
    how = (
        "the distances between the rows of the last layer, pair by pair, times the constant of what is below it"
        if bound.last_layer
        else "√2 times the constant of the network"
    )
    wrapped = f"The model came wrapped ({', '.join(wrappers)}): it is about the module inside, run by itself."
    return (
        "Distances are ℓ2 over pixels in [0, 1], all channels together; a perturbed image need not stay in that range.",
        f"Score differences grow at most by {how} ({bound.lipschitz:.6g}), over the operations as they ran.",
        "A point counts at ε only if it is classified correctly and its radius is strictly greater than ε.",
        f"It is about the network as evaluated in {arithmetic}: rounding moves a score difference at these images by "
        f"at most {rounding:.3g}, proved step by step for every image within the radius, as is that nothing overflows.",
        "Sums may run in any order and with fused operations, but product by product (no TF32, no Winograd); "
        "elementary functions are right to 4 units in the last place.",
        "The certificate is about these weights, about what the network computes of them (orthogonal operators, "
        "normalised rows, parametrisations) as this machine computed it, and about deterministic evaluation, in which "
        "images do not meet.",
        *([wrapped] if wrappers else []),
    )
