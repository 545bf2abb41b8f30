"""Networks that are drawn to fool a certificate: none may change its class within a certified radius."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn

from espalier.certify import certify, lipschitz_bound
from espalier.certify.bounded import Analysis
from espalier.certify.operations import OPERATIONS, full_name, in_place
from espalier.errors import EspalierError
from experiments.adversarial_models import Draw, attack, steepness
from experiments.adversarial_parts import ACTIVATIONS, FUNCTIONS, INNER, Asking, Function

QUICK = settings(
    max_examples=30,
    # A network is named by its draws already: shrinking would take minutes and make it no plainer.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_generator_draws_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, call = set(), Analysis.call

    def watched(self: Analysis, function: Any, args: Any, kwargs: Any) -> Any:
        reached.add(OPERATIONS[in_place(full_name(function))[0]].function)
        return call(self, function, args, kwargs)

    monkeypatch.setattr(Analysis, "call", watched)
    draw = Draw(random.Random(0))
    parts: list[nn.Module] = [Function(name, function) for name, function in FUNCTIONS.items()]
    parts += [Function(name, function, draw.activation()) for name, function in INNER.items()]
    parts += [part(False) for part in ACTIVATIONS]
    parts += [Asking(question) for question in Asking.QUESTIONS]
    parts += [draw.spatial(4, 1) for _ in range(150)] + [draw.vector(4, 1) for _ in range(60)]
    for part in parts:
        for shape in ((4, 4, 4), (4,)):
            with contextlib.suppress(EspalierError):
                certify(nn.Sequential(part, nn.Flatten()).eval(), torch.rand(2, *shape), torch.zeros(2).long())
    assert {name for name, rule in OPERATIONS.items() if rule.function not in reached} == set()


def test_the_attack_notices_a_radius_that_is_too_large() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(5, 1, 2, 2)
    labels = net(x).argmax(1)
    radii = certify(net, x, labels).radii
    assert attack(net, x, labels, radii, torch.float64, 0).violations == 0
    assert attack(net, x, labels, tuple(1.001 * radius for radius in radii), torch.float64, 0).violations > 0
