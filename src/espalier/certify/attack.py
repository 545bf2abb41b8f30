"""Attacks in ℓ2: searches for an image nearby that the network gets wrong, to set beside what is proved.

An attack that finds nothing proves nothing; one that finds a point within a certified radius proves the certificate
wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, require


def pgd_l2(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: Tensor | float,
    *,
    steps: int = 40,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the worst images that projected gradient ascent finds, each within ``radius`` of its own image.

    Ascends max_{j≠y} f_j − f_y along the normalised gradient with step r·½(1 + cos(πt/T)), from a random point of the
    ball, projecting onto the ball and onto [0, 1] after every step, and keeps the worst point of all steps. Every
    restart after the first ascends f_j − f_y for one class j, the next best at the image, so that it is not drawn to
    the class that happens to lead at its start.

    Args:
        net: the network; its parameters gather no gradient.
        images: (B, …) in [0, 1].
        labels: (B,) right classes.
        radius: r, one for all images or (B,).
        steps: T, gradient steps per restart.
        restarts: random starts.
        generator: source of the starts, on the images' device.

    Returns:
        Images (B, …) in [0, 1] at a distance of at most r.

    Raises:
        EspalierError: fewer than one step or restart, or a radius that is negative or not finite.

    Source: Madry et al., arXiv 1706.06083, section 2.1; the margin as objective: Carlini & Wagner, arXiv 1608.04644.
    """
    if steps < 1 or restarts < 1:
        raise EspalierError(f"steps {steps}, restarts {restarts}: choose at least 1 of each")
    limits = torch.as_tensor(radius, dtype=images.dtype, device=images.device).expand(len(images))
    if not bool((limits.isfinite() & (limits >= 0)).all()):  # every comparison below would be false: nothing is tried
        raise EspalierError(f"radius goes from {limits.min():g} to {limits.max():g}: give finite numbers from 0")
    # Adding a perturbation rounds every pixel: a ball smaller by that keeps the sum inside the real one.
    limits = (limits - torch.finfo(images.dtype).eps * math.sqrt(math.prod(images.shape[1:]))).clamp_min(0)
    worst, height = images.clone(), _excess(net, images, labels).detach()
    targets = _runners_up(net, images, labels)
    for restart in range(restarts):
        target = targets[:, (restart - 1) % targets.shape[1]] if restart else None
        noise = torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator)
        share = torch.rand(len(images), dtype=images.dtype, device=images.device, generator=generator)
        point = _project(images + _scaled(noise, limits * share), images, limits)
        for step in range(steps + 1):
            point.requires_grad_(True)
            excess = _excess(net, point, labels, target)
            (gradient,) = torch.autograd.grad(excess.sum(), point)
            point, excess = point.detach(), excess.detach()
            better = excess > height
            worst[better], height[better] = point[better], excess[better]
            size = limits * (0.5 * (1 + math.cos(math.pi * step / steps)))
            point = _project(point + _scaled(gradient, size), images, limits)
    return worst


def autoattack_l2(
    net: nn.Module, images: Tensor, labels: Tensor, eps: float, *, queries: int = 5000, seed: int = 0
) -> Tensor:
    """Return the images that AutoAttack leaves, each within ``eps`` (up to rounding) of its own image.

    The standard ensemble, APGD-CE, APGD-T, FAB-T and Square, of the library torchattacks.

    Args:
        net: the network, with parameters.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) right classes.
        eps: one radius for all of them.
        queries: how often Square may ask, one forward pass each, which is most of the time; 5,000 is the standard.
        seed: of its random starts; torch's global random state is put back afterwards.

    Raises:
        MissingExtraError: torchattacks is not installed.
        EspalierError: fewer than four classes or a side below five pixels, for which parts of it are not defined.

    Source: Croce & Hein, arXiv 2003.01690.
    """
    attacks = require("torchattacks", "attack")
    with torch.no_grad():
        classes = net(images[:1]).shape[1]
    if classes < 4 or min(images.shape[-2:]) < 5:
        raise EspalierError(
            f"AutoAttack needs 4 classes and 5 pixels a side, here are {classes} and {min(images.shape[-2:])}: use PGD"
        )
    # It seeds torch's global generators.
    with torch.random.fork_rng():
        ensemble = attacks.AutoAttack(net, norm="L2", eps=float(eps), n_classes=classes, seed=seed)
        for part in ensemble._autoattack.attacks:
            if hasattr(part, "n_queries"):
                part.n_queries = queries
        found: Tensor = ensemble(images, labels).detach()
    return found


@torch.no_grad()
def fooled(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return (B,) whether the network, as it runs, gives an image another class than its own (or NaN)."""
    scores = net(images)
    return (scores.argmax(1) != labels) | ~torch.isfinite(scores).all(1)


def bisect_to_boundary(net: nn.Module, images: Tensor, found: Tensor, labels: Tensor, halvings: int = 20) -> Tensor:
    """Return wrongly classified images on the segments from ``images`` to ``found``, as near as halving finds.

    Args:
        net: the network.
        images: (B, …) that it gets right.
        found: (B, …) that it gets wrong.
        labels: (B,) right classes.
        halvings: how often the segment is cut in two.
    """
    low, high = images.new_zeros(len(images)), images.new_ones(len(images))
    best = found
    for _ in range(halvings):
        middle = (low + high) / 2
        point = torch.lerp(images, found, _like(middle, images))
        wrong = fooled(net, point, labels)
        best = torch.where(_like(wrong, images), point, best)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return best


def distance(images: Tensor, others: Tensor) -> Tensor:
    """Return the ℓ2 distances (B,) in float64."""
    return torch.linalg.vector_norm((images.double() - others.double()).flatten(1), dim=1)


@torch.no_grad()
def _runners_up(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return (B, C − 1): the other classes, best first."""
    return net(images).scatter(1, labels[:, None], -math.inf).argsort(1, descending=True)[:, :-1]


def _excess(net: nn.Module, images: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Return max_{j≠y} f_j − f_y, positive where the network is wrong, or f_j − f_y of one class j per image."""
    scores = net(images)
    if target is not None:
        return (scores.gather(1, target[:, None]) - scores.gather(1, labels[:, None]))[:, 0]
    others = scores.scatter(1, labels[:, None], -math.inf)
    return others.amax(1) - scores.gather(1, labels[:, None])[:, 0]


def _project(point: Tensor, images: Tensor, limits: Tensor) -> Tensor:
    # Clipping comes last: it moves every pixel towards the image, which lies in [0, 1], so it stays in the ball.
    delta = point - images
    norms = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    scale = torch.where(norms > limits, limits / norms.clamp_min(1e-30), 1.0)
    return (images + delta * _like(scale, images)).clamp_(0, 1)


def _scaled(direction: Tensor, sizes: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_min(1e-30)
    return direction * _like(sizes / norms, direction)


def _like(values_B: Tensor, images: Tensor) -> Tensor:
    return values_B.view(-1, *(1,) * (images.ndim - 1))
