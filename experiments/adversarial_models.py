"""Networks that are drawn to fool a certificate, and attacks that are sure to notice: see ``certificate_attack.py``.

``Draw`` takes a ``random.Random``, so that a seed names a network and hypothesis can shrink one. The parts are those
that a certificate has rules for, put together in the ways that once went uncounted: modules used twice, branches that
broadcast, operations in place, hooks, patches, functional calls, extreme scales, every dtype.
"""

from __future__ import annotations

import copy
import math
import random
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espalier import nn as enn
from experiments.adversarial_parts import ACTIVATIONS, FUNCTIONS, INNER, Asking, Changing, Function
from experiments.adversarial_settings import PAST, Odd, past_its_input


class Draw:
    """One network, drawn part by part for images of a given shape."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.torch = torch.Generator().manual_seed(rng.randrange(2**31))

    def chance(self, share: float) -> bool:
        """Return True in about ``share`` of the draws."""
        return self.rng.random() < share

    def spatial(self, channels: int, depth: int) -> nn.Module:
        """Return a part for (B, C, H, W)."""
        rng, c = self.rng, channels
        k = rng.choice([1, 2, 3])
        mode = rng.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        parts: list[Callable[[], nn.Module]] = [
            lambda: nn.Conv2d(c, rng.choice([c, 2 * c]), k, padding=k // 2 if mode == "zeros" else (k - 1) // 2,
                              stride=rng.choice([1, 1, 2]), padding_mode=mode),
            lambda: nn.ConvTranspose2d(c, c, k, stride=rng.choice([1, 2]), padding=rng.choice([0, (k - 1) // 2])),
            lambda: enn.CayleyConv2d(c, rng.choice([c, 2 * c]), k, padding_mode=rng.choice(["circular", "zeros"])),
            lambda: enn.CayleyConv2d(c, c, k, groups=c),
            lambda: enn.CayleyConvTranspose2d(c, c, k),
            lambda: nn.AvgPool2d(2, rng.choice([1, 2])),
            lambda: nn.MaxPool2d(2, 1),
            lambda: enn.ScaledAvgPool2d(2),
            lambda: enn.InvertibleDownsampling(1),
            lambda: enn.L2Pool2d(rng.choice([1, 2])),
            lambda: enn.LinearResidual(c, rng.choice([1, 3])),
            lambda: self._centring(c),
            lambda: nn.ReflectionPad2d(1),
            lambda: nn.CircularPad2d(1),
            lambda: nn.ReplicationPad2d((0, 2, 1, 0)),
            lambda: nn.ZeroPad2d(1),
            lambda: nn.ConstantPad2d(1, 0.7),
            lambda: self._norm(c),
            lambda: enn.Normalize([0.2] * c, [rng.choice([0.25, 1.0, 3.0])] * c),
            lambda: self.elementwise(c),
        ]  # fmt: skip
        return self._wrapped(rng.choice(parts)(), lambda: self.spatial_same(c, depth - 1), depth)

    def spatial_same(self, channels: int, depth: int) -> nn.Module:
        """Return a part for (B, C, H, W) that keeps the shape."""
        parts = [
            lambda: nn.Conv2d(channels, channels, 3, padding=1, padding_mode=self.rng.choice(["zeros", "circular"])),
            lambda: enn.CayleyConv2d(channels, channels, 3),
            lambda: self.activation(),
        ]
        return self.rng.choice(parts)()

    def vector(self, features: int, depth: int) -> nn.Module:
        """Return a part for (B, F)."""
        f, wide = features, self.rng.choice([features, 2 * features, max(1, features // 2)])
        parts: list[Callable[[], nn.Module]] = [
            lambda: nn.Linear(f, wide),
            lambda: enn.CayleyLinear(f, wide),
            lambda: nn.utils.parametrizations.orthogonal(nn.Linear(f, f)),
            lambda: self.elementwise(f),
            lambda: nn.Dropout(0.5),
        ]
        same = self.rng.choice([lambda: nn.Linear(f, f), lambda: enn.CayleyLinear(f, f), self.activation])
        return self._wrapped(self.rng.choice(parts)(), same, depth)

    def activation(self) -> nn.Module:
        """Return an activation, often in place."""
        return self.rng.choice(ACTIVATIONS)(self.chance(0.4))

    def elementwise(self, channels: int) -> nn.Module:
        """Return an activation or some plain operations."""
        if channels % 2 == 0 and self.chance(0.4):
            return self.rng.choice([enn.MaxMin(), enn.GroupSort(2), self._reflection(channels)])
        if self.chance(0.5):
            return self.activation()
        if self.chance(0.04):
            return Changing(self.rng.choice(Changing.KINDS))
        if self.chance(0.04):
            return Asking(self.rng.choice([*Asking.QUESTIONS]))
        if self.chance(0.04):
            return past_its_input(self.rng.choice([*PAST]))
        if self.chance(0.04):
            return Odd(self.rng.choice(Odd.KINDS), channels)
        names = [name for name in FUNCTIONS if channels % 2 == 0 or name != "halves"]
        name = self.rng.choice(names)
        return Function(name, FUNCTIONS[name])

    def _norm(self, channels: int) -> nn.Module:
        norm = nn.BatchNorm2d(channels)
        norm.running_var.copy_(torch.rand(channels, generator=self.torch) * 2 + 0.01)
        norm.running_mean.copy_(torch.randn(channels, generator=self.torch))
        return norm

    def _centring(self, channels: int) -> nn.Module:
        centring = enn.BatchCentering(channels)
        centring.running_mean.copy_(torch.randn(channels, generator=self.torch))
        return centring

    def _reflection(self, channels: int) -> nn.Module:
        reflection = enn.Householder(channels)
        with torch.no_grad():
            reflection.theta.copy_(7 * torch.randn(channels // 2, generator=self.torch))
        return reflection

    def _wrapped(self, part: nn.Module, same: Callable[[], nn.Module], depth: int) -> nn.Module:
        """Return the part, or a part with something around it, or something that was done to it."""
        if depth > 0 and self.chance(0.35):
            inner = same()
            if self.chance(0.3):
                return nn.Sequential(part) if self.chance(0.2) else enn.ConvexSum(inner, 0.3)
            name = self.rng.choice(list(INNER))
            return Function(name, INNER[name], inner)
        if self.chance(0.12):
            part.register_forward_hook(self.rng.choice([
                lambda module, args, out: 3.0 * out, lambda module, args, out: out.mul_(2.0),
                lambda module, args, out: out + out.abs(),
            ]))  # fmt: skip
        if self.chance(0.08):
            part.register_forward_pre_hook(self.rng.choice([
                lambda module, args: (2.5 * args[0],), lambda module, args: (args[0].mul_(1.5),),
            ]))  # fmt: skip
        if self.chance(0.08):
            patched = types.MethodType(lambda self, x: 4.0 * type(self).forward(self, x), part)
            part.forward = patched  # type: ignore[method-assign]
        return part

    def scaled(self, net: nn.Module) -> None:
        """Multiply some weights by extreme numbers."""
        for name, parameter in net.named_parameters():
            with torch.no_grad():
                if name.endswith("alpha") and self.chance(0.1):
                    parameter.fill_(self.rng.choice([1e-6, 1e3, 1e6, 1e9]))
                elif name.endswith("bias") and self.chance(0.1):
                    parameter.mul_(self.rng.choice([2.0**23, 2.0**40, 1e-30]))
                elif parameter.ndim > 1 and self.chance(0.1):
                    parameter.mul_(self.rng.choice([1e-12, 1e4, 1e12, 1e-25, 1e25, 30.0]))

    def network(self) -> tuple[nn.Module, tuple[int, ...]]:
        """Return a network in evaluation mode, and the shape of its images."""
        channels, side = self.rng.choice([1, 2, 3, 4]), self.rng.choice([4, 5, 6])
        shape, layers = (channels, side, side), []
        x = torch.rand(2, *shape, generator=self.torch)
        for stage, count in (("spatial", self.rng.randint(0, 4)), ("flatten", 1), ("vector", self.rng.randint(0, 4))):
            for _ in range(count):
                part = nn.Flatten() if stage == "flatten" else getattr(self, stage)(x.shape[1], 1)
                reused = self.rng.choice(layers) if layers and self.chance(0.15) else part
                for candidate in (reused, part):
                    try:
                        y = nn.Sequential(candidate).eval()(x.clone())
                    except Exception:  # does not fit, in one of many ways: not drawn
                        continue
                    if y.ndim == (2 if stage != "spatial" else 4) and 0 < y[0].numel() <= 256 and len(y) == 2:
                        layers.append(candidate)
                        x = y.detach()
                        break
        if x.ndim != 2:
            layers.append(nn.Flatten())
            x = x.flatten(1)
        heads: list[Callable[[int, int], nn.Module]] = [nn.Linear, enn.NormalizedLinear, enn.CayleyLinear]
        layers.append(self.rng.choice(heads)(x.shape[1], self.rng.choice([2, 3])))
        net = nn.Sequential(*layers).eval()
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        if self.chance(0.4):
            self.scaled(net)
        kept = torch.rand(3, *shape, generator=self.torch)
        try:
            copy.deepcopy(net)(kept)
        except RuntimeError:  # an operation in place on what the part before it expanded: torch refuses it, too
            return self.network()
        net = net.to(self.rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]))
        return net, shape


class Attack(NamedTuple):
    """What was tried on one certified network."""

    certified: int
    """Images with a radius above 0."""
    tried: int
    """Images within their radius that were evaluated."""
    violations: int
    """How many of them changed the class, or gave a score that is not finite."""
    tightness: float
    """The largest share of its margin that an attack took from a certified image."""


def attack(
    net: nn.Module, images: Tensor, labels: Tensor, radii: tuple[float, ...], dtype: torch.dtype, seed: int
) -> Attack:
    """Attack every certified image just within its radius: along gradients, singular vectors and random directions.

    The oracle is a plain copy of the network in the certified precision; gradients and Jacobians come from a float64
    copy. Distances are measured in float64, between the images that are evaluated.
    """
    generator = torch.Generator().manual_seed(seed)
    run, smooth = copy.deepcopy(net).to(dtype), copy.deepcopy(net).double()
    some = [i for i, radius in enumerate(radii) if radius > 0]
    if not some:
        return Attack(0, 0, 0, 0.0)
    images, labels = images[some].double(), labels[some]
    limits = torch.tensor(radii, dtype=torch.float64)[some].clamp(max=1e8)
    points_BP = _nearby(smooth, images, labels, limits, generator)
    inside_BP = (points_BP - images[:, None]).flatten(2).norm(dim=2) <= limits[:, None] * (1 - 1e-12)
    with torch.no_grad():
        scores = run(points_BP.flatten(0, 1).to(dtype, copy=True)).double().unflatten(0, inside_BP.shape)
    own = scores.gather(2, labels.view(-1, 1, 1).expand(-1, scores.shape[1], 1))
    margins_BP = (own - scores).scatter(2, labels.view(-1, 1, 1).expand_as(own), math.inf).amin(2)
    fell = inside_BP & ((scores.argmax(2) != labels[:, None]) | ~torch.isfinite(scores).all(2))
    # The first point is the image itself.
    least = torch.where(inside_BP, margins_BP, math.inf).amin(1)
    taken = 1 - least / margins_BP[:, 0]
    return Attack(len(some), int(inside_BP.sum()), int(fell.sum()), taken[torch.isfinite(taken)].max().item())


def _nearby(net: nn.Module, images: Tensor, labels: Tensor, limits: Tensor, generator: torch.Generator) -> Tensor:
    """Return points (B, P, …) within the limits, the likeliest ones to change the class; the image itself first."""
    batch, shape = len(images), images.shape[1:]
    directions = [torch.randn(batch, 4, *shape, generator=generator, dtype=torch.float64)]
    rows = _jacobian(net, images)
    if rows is not None:
        own = rows[torch.arange(batch), labels][:, None]
        largest = rows.flatten(1).abs().amax(1).view(-1, 1, 1).clamp_min(1e-300)
        vectors = torch.linalg.svd((rows.flatten(2) / largest), full_matrices=False).Vh
        directions += [rows - own, vectors.unflatten(2, shape)]
    pointed = torch.cat(directions, 1)
    norms = pointed.flatten(2).norm(dim=2)
    unit = pointed / norms.clamp_min(1e-300).view(batch, -1, *[1] * len(shape))
    steps = unit * (limits * (1 - 1e-9)).view(batch, 1, *[1] * len(shape))
    near = torch.cat((torch.zeros_like(steps[:, :1]), steps, -steps, 0.5 * steps), 1)
    points = images[:, None] + near
    return torch.cat((points, _ascend(net, points[:, ::2], images, labels, limits * (1 - 1e-9))), 1)


def _jacobian(net: nn.Module, images: Tensor) -> Tensor | None:
    """Return the gradients (B, C, …) of all scores, or None where they are not to be had."""
    leaf = images.clone().requires_grad_(True)
    try:
        scores = net(leaf.clone())
        rows = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in scores.unbind(1)]
    except (RuntimeError, NotImplementedError):
        return None
    found = torch.stack(rows, 1)
    return found if torch.isfinite(found).all() else None


def _ascend(net: nn.Module, points_BP: Tensor, images: Tensor, labels: Tensor, limits: Tensor) -> Tensor:
    """Return the points after a few steps of projected gradient ascent on the margin."""
    count, ones = points_BP.shape[1], [1] * (images.ndim - 1)
    points, centres = points_BP.flatten(0, 1), images.repeat_interleave(count, 0)
    classes, reach = labels.repeat_interleave(count)[:, None], limits.repeat_interleave(count).view(-1, *ones)
    for _ in range(3):
        leaf = points.detach().requires_grad_(True)
        try:
            scores = net(leaf.clone())
            others = scores.scatter(1, classes, -math.inf).amax(1)
            (gradient,) = torch.autograd.grad((others - scores.gather(1, classes)[:, 0]).sum(), leaf)
        except (RuntimeError, NotImplementedError):
            return points_BP
        norms = gradient.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, *ones)
        delta = points + reach * torch.nan_to_num(gradient / norms) - centres
        sizes = delta.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, *ones)
        points = (centres + delta * (reach / sizes).clamp(max=1.0)).detach()
    return points.view_as(points_BP)


def steepness(net: nn.Module, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> float:
    """Return the largest slope that is found between random pairs of images, near and far, in float64."""
    run, found = copy.deepcopy(net).to(dtype), 0.0
    for size in (1e-3, 1.0, 1e3):
        a = torch.rand(16, *shape, generator=generator, dtype=torch.float64)
        b = a + size * torch.randn(16, *shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            y = run(a.clone()) - run(b.clone())
        slopes = y.flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
        found = max(found, *slopes[torch.isfinite(slopes)].tolist(), 0.0)
    return found
