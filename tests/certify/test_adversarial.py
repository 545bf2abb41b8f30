"""Networks that are drawn to fool a certificate: none may change its class within a certified radius."""

from __future__ import annotations

import copy
import random

import torch
from adversarial import DRAW, Draw, attack, steepness
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn

from espalier.certify import certify, lipschitz_bound
from espalier.errors import EspalierError

QUICK = settings(
    max_examples=30,
    phases=DRAW,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@QUICK
@given(rng=st.randoms(use_true_random=False), arithmetic=st.sampled_from(["float64", "float32"]))
def test_no_certified_image_falls(rng: random.Random, arithmetic: str) -> None:
    draw = Draw(rng)
    net, shape = draw.network()
    dtype = getattr(torch, arithmetic)
    x = torch.rand(3, *shape, generator=draw.torch)
    with torch.no_grad():
        labels = copy.deepcopy(net).to(dtype)(x.to(dtype, copy=True)).nan_to_num().argmax(1)
    try:
        certificate = certify(net, x, labels, arithmetic=arithmetic)
    except EspalierError:
        return
    note(str(net))
    assert attack(net, x, labels, certificate.radii, dtype, 0).violations == 0


@QUICK
@given(rng=st.randoms(use_true_random=False))
def test_no_slope_exceeds_the_bound(rng: random.Random) -> None:
    draw = Draw(rng)
    draw.scaled = lambda net: None  # type: ignore[method-assign]  # of ordinary sizes, so that slopes are not all rounding
    net, shape = draw.network()
    try:
        claimed = lipschitz_bound(net, torch.rand(1, *shape, generator=draw.torch))
    except EspalierError:
        return
    note(str(net))
    assert steepness(net, shape, draw.torch, torch.float64) <= claimed * (1 + 1e-6) + 1e-6


def test_the_generator_draws_what_can_be_certified_and_the_attack_comes_close() -> None:
    certified, taken = 0, 0.0
    for seed in range(12):
        draw = Draw(random.Random(seed))
        net, shape = draw.network()
        x = torch.rand(3, *shape, generator=draw.torch)
        labels = copy.deepcopy(net).double()(x.double()).argmax(1)
        try:
            found = attack(net, x, labels, certify(net, x, labels).radii, torch.float64, seed)
        except EspalierError:
            continue
        certified += found.certified > 0
        taken = max(taken, found.tightness)
    assert certified >= 8
    assert taken > 0.5


def test_the_attack_notices_a_radius_that_is_too_large() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(5, 1, 2, 2)
    labels = net(x).argmax(1)
    radii = certify(net, x, labels).radii
    assert attack(net, x, labels, radii, torch.float64, 0).violations == 0
    assert attack(net, x, labels, tuple(1.001 * radius for radius in radii), torch.float64, 0).violations > 0
