"""Attacks against closed forms: they must find what exists and nothing that does not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from espalier.certify import Certificate, CertificateBrokenError, autoattack_l2, certify, challenge, pgd_l2
from espalier.certify.attack import distance, fooled
from espalier.certify.attack_report import AttackReport
from espalier.errors import EspalierError
from espalier.nn.lipschitz.activations import MaxMin


def linear_net(classes: int = 4, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """Return a linear classifier, images near grey that it gets right, their labels and their exact radii."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(75, classes))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(classes, 75, generator=generator))
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    images = 0.5 + 0.02 * torch.randn(40, 3, 5, 5, generator=generator)
    labels = net(images).argmax(1)
    return net, images, labels, torch.tensor(certify(net, images, labels).radii)


def test_pgd_crosses_a_border_just_inside_its_reach_and_not_one_just_outside() -> None:
    net, images, labels, radii = linear_net()
    generator = torch.Generator().manual_seed(0)
    inside = pgd_l2(net, images, labels, 0.999 * radii, restarts=4, generator=generator)
    assert not fooled(net, inside, labels).any()
    reach = 1.01 * radii + 1e-4  # the radius gives a little away to rounding
    outside = pgd_l2(net, images, labels, reach, restarts=4, generator=generator)
    assert fooled(net, outside, labels).all()
    assert (distance(images, outside) <= reach).all()
    assert (distance(images, outside) >= radii * 0.9999).all()


def test_pgd_stays_among_pixels_and_is_repeatable() -> None:
    net, images, labels, _ = linear_net()
    images = (images - 0.5).sign() * 0.5 + 0.5
    first, second = (
        pgd_l2(net, images, labels, 0.7, steps=5, restarts=2, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    assert (distance(images, first) <= 0.7).all()
    assert not any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("radius", [math.nan, math.inf, -0.1, torch.tensor([0.1] * 39 + [math.nan])])
def test_pgd_refuses_a_radius_within_which_it_would_try_nothing(radius: float | Tensor) -> None:
    net, images, labels, _ = linear_net()
    with pytest.raises(EspalierError, match="radius goes from"):
        pgd_l2(net, images, labels, radius)


def test_autoattack_finds_what_exists_within_eps_and_leaves_the_random_state_alone() -> None:
    net, images, labels, radii = linear_net()
    # No radius within a twentieth of eps: whether an image falls at its very radius, rounding decides.
    low, high = radii[:10].sort().values[5:7].tolist()
    eps = (low + high) / 2
    assert low < 0.95 * eps
    before = torch.random.get_rng_state()
    found = autoattack_l2(net, images[:10], labels[:10], eps, queries=20)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)  # another state of torch's own generator: only ``seed`` counts
    assert torch.equal(autoattack_l2(net, images[:10], labels[:10], eps, queries=20), found)
    fell = fooled(net, found, labels[:10])
    assert torch.equal(fell, radii[:10] < eps)
    assert (distance(images[:10], found) <= eps * 1.001).all()
    with pytest.raises(EspalierError, match="here are 3"):
        autoattack_l2(nn.Sequential(nn.Flatten(), nn.Linear(75, 3)), images, labels, 0.1)


def test_a_sound_certificate_survives_and_its_distances_are_no_smaller() -> None:
    net, images, labels, radii = linear_net()
    certificate = certify(net, images, labels)
    eps = (radii.min().item() / 2, radii.sort().values[19:21].mean().item())  # between two points
    report = challenge(net, images, labels, certificate, eps, restarts=4, generator=torch.Generator().manual_seed(0))
    report.check()
    assert report.broken == ()
    assert report.attacked == 40
    assert report.accuracy[0] == 1.0
    assert report.accuracy[1] == pytest.approx((radii > eps[1]).double().mean().item())
    assert all(
        found is not None and found >= radius for found, radius in zip(report.distances, certificate.radii, strict=True)
    )
    assert 0.99 < report.tightness <= 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_in_another_precision_than_the_network_are_attacked_as_they_are_certified(dtype: torch.dtype) -> None:
    net, images, labels, _ = linear_net()
    images = images.to(dtype)
    labels = net.double()(images.double()).argmax(1)
    certificate = certify(net.float(), images, labels)
    report = challenge(net, images, labels, certificate, generator=torch.Generator().manual_seed(0))
    assert report.broken == ()
    assert report.attacked == 40
    assert report.tightness > 0.98


@pytest.mark.parametrize("autoattack", [False, True])
def test_a_false_certificate_is_broken(autoattack: bool) -> None:
    net, images, labels, radii = linear_net()
    images, labels, radii = images[:8], labels[:8], radii[:8]
    honest = certify(net, images, labels)
    # Two radii that claim too much: one by a factor, one by little.
    claimed = list(honest.radii)
    claimed[2], claimed[5] = 2 * claimed[2], 1.1 * claimed[5]
    false = dataclasses.replace(honest, radii=tuple(claimed))
    report = challenge(
        net, images, labels, false, (0.1,), steps=1 if autoattack else 40, restarts=4, autoattack=autoattack, queries=20
    )
    assert report.broken == (2, 5)
    with pytest.raises(CertificateBrokenError, match="2 of 8"):
        report.check()
    assert "2 FELL" in report.table()


def test_the_report_counts_wrong_predictions_and_saves_itself(tmp_path: Path) -> None:
    net, images, labels, _ = linear_net()
    labels = labels.clone()
    labels[:10] = (labels[:10] + 1) % 4
    certificate = certify(net, images, labels)
    report = challenge(net, images, labels, certificate, (1e-6,), steps=2)
    assert report.clean_accuracy == report.accuracy[0] == 0.75
    assert report.attacked == 30
    assert report.distances[:10] == (0.0,) * 10
    path = report.save(tmp_path / "attack.json")
    assert AttackReport.load(path) == report
    values = json.loads(path.read_text())
    assert values["broken"] == []
    assert values["clean_accuracy"] == 0.75
    del values["digest"]  # as in the oldest reports
    for changes in ({"eps": "0.1"}, {"accuracy": [-1.0]}, {"attacked": 1.5}, {"distances": [True]}, {"broken": None}):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(EspalierError, match="is not an attack report"):
            AttackReport.load(path)
    assert "75.00 %" in str(report)


def test_a_certificate_of_other_images_is_refused() -> None:
    net, images, labels, _ = linear_net()
    other = Certificate((0.1,), (0,), (0,), 1.0, True, 0.0, ())
    with pytest.raises(EspalierError, match="1 other images"):
        challenge(net, images, labels, other)
    with pytest.raises(EspalierError, match="wrong before any attack"):  # of images that have these labels by chance
        challenge(net, 1 - images, labels, certify(net, images, labels))
    with pytest.raises(EspalierError, match="steps 0"):
        pgd_l2(net, images, labels, 0.1, steps=0)


def test_a_net_trained_here_has_no_certified_point_that_falls() -> None:
    # Two noisy half-planes and an orthogonal net with a free last layer: non-linear, trained, certified, attacked.
    torch.manual_seed(0)
    orthogonal = nn.utils.parametrizations.orthogonal
    net = nn.Sequential(
        nn.Flatten(), orthogonal(nn.Linear(16, 16)), MaxMin(), orthogonal(nn.Linear(16, 16)), MaxMin(), nn.Linear(16, 4)
    )
    images = torch.rand(400, 1, 4, 4)
    labels = 2 * (images[:, 0, :2].sum((1, 2)) > 4).long() + (images[:, 0, :, :2].prod(2).sum(1) > 1).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.multi_margin_loss(net(images), labels, margin=0.3).backward()
        optimizer.step()
    certificate = certify(net.eval(), images, labels)
    report = challenge(net, images, labels, certificate, (0.05, 0.1), generator=torch.Generator().manual_seed(0))
    report.check()
    assert report.clean_accuracy > 0.8
    assert report.attacked > 300
    assert certificate.certified_accuracy(0.05) > 0.4
    for attacked, certified in zip(report.accuracy, report.certified_accuracy, strict=True):
        assert attacked >= certified
    assert all(d is None or d >= r for d, r in zip(report.distances, certificate.radii, strict=True))
