"""A certificate put to the test: every certified point is attacked at its own radius, and none may fall."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from espalier.certify.attack import autoattack_l2, bisect_to_boundary, distance, fooled, pgd_l2
from espalier.certify.certificate import EPSILONS, Certificate, in_255, read_result, write_result
from espalier.certify.radius import ARITHMETIC, check_pixels
from espalier.errors import EspalierError
from espalier.tables import plain_table

_GROWTH = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Certified points are attacked at these multiples of their radius: at it, and beyond it for the distance."""

_SPREAD = 0.9
"""AutoAttack takes one radius for many images: groups are formed whose smallest radius is this share of the largest."""


class CertificateBrokenError(Exception):
    """A point was moved to another class within its certified radius: the certificate, and its code, are wrong."""


@dataclass(frozen=True)
class AttackReport:
    """What attacks found, beside what is certified; made by ``challenge``."""

    eps: tuple[float, ...]
    """Radii in [0, 1] pixel units."""
    accuracy: tuple[float, ...]
    """Share of the images that are right at each of them after the attack."""
    certified_accuracy: tuple[float, ...]
    """Share that is certified at each of them."""
    clean_accuracy: float
    """Share that is right without an attack."""
    attacked: int
    """Certified points that were attacked at their own radius."""
    broken: tuple[int, ...]
    """Images that fell within their certified radius: none, if the certificate holds."""
    distances: tuple[float | None, ...] = field(repr=False)
    """Distance of the nearest wrong image that was found, None where none was (0: wrong from the start)."""
    tightness: float | None
    """Median over the certified points that fell of certified radius / distance found."""
    attacks: tuple[str, ...]
    """What was tried."""
    weights: str = field(default="", repr=False)
    """SHA-256 of the file of weights that a run was attacked with; empty where it was no run."""

    def check(self) -> None:
        """Raise if a certified point fell.

        Raises:
            CertificateBrokenError: names the points.
        """
        if self.broken:
            first = ", ".join(map(str, self.broken[:5]))
            raise CertificateBrokenError(
                f"{len(self.broken)} of {self.attacked} certified points fell within their radius (images {first}): "
                "the certificate is wrong, please report it"
            )

    def table(self) -> str:
        """Return accuracy under attack and certified accuracy by ε as plain text."""
        rows = [("ε", "under attack", "certified"), ("0 (clean)", f"{100 * self.clean_accuracy:.2f} %", "")]
        rows += [
            (in_255(eps), f"{100 * attacked:.2f} %", f"{100 * certified:.2f} %")
            for eps, attacked, certified in zip(self.eps, self.accuracy, self.certified_accuracy, strict=True)
        ]
        verdict = "none fell" if not self.broken else f"{len(self.broken)} FELL"
        tight = "" if self.tightness is None else f"; median radius / distance found {self.tightness:.3f}"
        summary = f"{self.attacked} certified points attacked at their own radius: {verdict}{tight}"
        return "\n".join([plain_table(rows), "", summary, *(f"- {text}" for text in self.attacks)])

    def __str__(self) -> str:
        """Return the table."""
        return self.table()

    def save(self, path: Path | str) -> Path:
        """Write the report as JSON, whole or not at all, and return the path."""
        return write_result(path, asdict(self))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a report that ``save`` wrote.

        Raises:
            EspalierError: missing file, damaged, or not an attack report.
        """
        report: Self = read_result(cls, path, "an attack report")
        return report


def challenge(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    certificate: Certificate,
    eps: Sequence[float] = EPSILONS,
    *,
    steps: int = 40,
    restarts: int = 1,
    autoattack: bool = False,
    queries: int = 5000,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> AttackReport:
    """Attack a certified network at every ``eps``, and every certified point at its own radius and beyond.

    Args:
        net: the network that was certified, in evaluation mode; judged in the arithmetic of the certificate.
        images: the (N, …) images that were certified, in [0, 1].
        labels: their classes.
        certificate: what ``certify`` said of them.
        eps: radii at which the accuracy under attack is wanted.
        steps: gradient steps of PGD, from each of its ``restarts`` random starts.
        restarts: see ``steps``.
        autoattack: try AutoAttack where PGD found nothing: on certified points in groups, at the smallest radius of a
            group, at least 90 % of their own; where it finds nothing, it is not tried again at a smaller radius.
        queries: see ``autoattack_l2``.
        batch_size: images per forward pass.
        generator: source of PGD's starts, on the images' device.

    Raises:
        EspalierError: a certificate of other images or of another network, or AutoAttack without torchattacks.
    """
    labels = check_pixels(images, labels, batch_size)
    if tuple(labels.tolist()) != certificate.labels:
        raise EspalierError(f"the certificate is about {len(certificate)} other images: give those it was made for")
    state = _AttackState(net, certificate, images, labels, batch_size)
    clean_N = torch.isinf(state.distances_N)
    radii_N = torch.tensor(certificate.radii, dtype=torch.float64, device=images.device)
    certified_N = (radii_N > 0) & torch.isfinite(radii_N)
    attempts = [(radii_N * growth, certified_N) for growth in _GROWTH]
    for radius_N, chosen_N in [*attempts, *((torch.full_like(radii_N, value), clean_N) for value in eps)]:
        state.pgd(radius_N, chosen_N, steps, restarts, generator)
    if autoattack:
        for indices, value in _groups(radii_N, certified_N, batch_size):
            state.autoattack(indices, value, queries)
        for value in sorted(eps, reverse=True):
            state.autoattack(clean_N.nonzero()[:, 0], value, queries)
    ratios = (radii_N / state.distances_N)[certified_N & state.distances_N.isfinite()]
    return AttackReport(
        eps=tuple(eps),
        accuracy=tuple((state.distances_N > value).double().mean().item() for value in eps),
        certified_accuracy=tuple(certificate.certified_accuracy(value) for value in eps),
        clean_accuracy=clean_N.double().mean().item(),
        attacked=int(certified_N.sum()),
        broken=tuple((state.distances_N < radii_N).nonzero()[:, 0].tolist()),
        distances=tuple(value if math.isfinite(value) else None for value in state.distances_N.tolist()),
        tightness=ratios.median().item() if len(ratios) else None,
        attacks=_describe(steps, restarts, queries if autoattack else None),
    )


class _AttackState:
    """The nearest wrong image found so far for every image, as a distance (0 where the network is wrong anyway).

    Every attack tries the images for which none was found within its radius; what it finds counts for all radii. The
    network is attacked in its own precision; a point counts if the network in the certificate's precision gets it
    wrong.
    """

    def __init__(
        self, net: nn.Module, certificate: Certificate, images: Tensor, labels: Tensor, batch_size: int
    ) -> None:
        self.net, self.images, self.labels, self.batch_size = net, images, labels, batch_size
        known = certificate.arithmetic in ARITHMETIC
        self.certified_net = copy.deepcopy(net).to(ARITHMETIC[certificate.arithmetic]) if known else net
        self.dtype = next(self.certified_net.parameters(), images).dtype
        self.own_dtype = next(net.parameters(), images).dtype
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        wrong_N = torch.cat([fooled(self.certified_net, some.to(self.dtype), theirs) for some, theirs in batches])
        for index in wrong_N.nonzero()[:, 0].tolist():
            if certificate.radii[index] > 0:  # nothing was moved: it says nothing of the certificate
                raise EspalierError(
                    f"images: number {index}, certified as class {certificate.labels[index]}, is wrong before any "
                    "attack: give the images and the network that the certificate was made for"
                )
        self.distances_N = torch.where(wrong_N, 0.0, math.inf).double()
        self.robust_radius_N = torch.zeros_like(self.distances_N)
        """Up to which radius AutoAttack found nothing."""

    def pgd(
        self, radius_N: Tensor, chosen_N: Tensor, steps: int, restarts: int, generator: torch.Generator | None
    ) -> None:
        """Try PGD on the chosen images for which nothing was found within their radius."""
        indices = (chosen_N & (self.distances_N > radius_N)).nonzero()[:, 0]
        for some in indices.split(self.batch_size) if len(indices) else ():
            images, radius = self.images[some].to(self.own_dtype), radius_N[some].to(self.own_dtype)
            found = pgd_l2(
                self.net, images, self.labels[some], radius, steps=steps, restarts=restarts, generator=generator
            )
            self._record(some, found)

    def autoattack(self, indices: Tensor, eps: float, queries: int) -> None:
        """Try AutoAttack on the images for which nothing was found within ``eps``, by itself or before."""
        indices = indices[(self.distances_N[indices] > eps) & (self.robust_radius_N[indices] < eps)]
        for some in indices.split(self.batch_size) if len(indices) else ():
            images = self.images[some].to(self.own_dtype)
            self._record(some, autoattack_l2(self.net, images, self.labels[some], eps, queries=queries))
            self.robust_radius_N[some] = eps

    def _record(self, indices: Tensor, found: Tensor) -> None:
        found = found.to(self.dtype)
        wrong = fooled(self.certified_net, found, self.labels[indices])
        if not wrong.any():
            return
        indices, found = indices[wrong], found[wrong]
        images, labels = self.images[indices].to(self.dtype), self.labels[indices]
        distances = distance(self.images[indices], bisect_to_boundary(self.certified_net, images, found, labels))
        self.distances_N[indices] = torch.minimum(self.distances_N[indices], distances)


def _groups(radii_N: Tensor, certified_N: Tensor, largest: int) -> Iterator[tuple[Tensor, float]]:
    """Yield certified images of nearly one radius, with the smallest of theirs."""
    indices = certified_N.nonzero()[:, 0]
    indices = indices[radii_N[indices].argsort(descending=True)]
    start = 0
    while start < len(indices):
        radii = radii_N[indices[start : start + largest]]
        count = int((radii >= _SPREAD * radii[0]).sum())
        yield indices[start : start + count], radii[count - 1].item()
        start += count


def _describe(steps: int, restarts: int, queries: int | None) -> tuple[str, ...]:
    multiples = ", ".join(f"{growth:g}" for growth in _GROWTH)
    pgd = f"PGD in ℓ2, {steps} steps, {restarts} random start(s), at every ε and at {multiples} times the own radius"
    auto = (
        f"AutoAttack in ℓ2 (APGD-CE, APGD-T, FAB-T, Square with {queries} queries) on what PGD left, at every ε and, "
        f"in groups, at {100 * _SPREAD:g} to 100 % of the own radius"
    )
    return (pgd,) if queries is None else (pgd, auto)
