"""Certified radii against closed forms, and the traps that a certificate must not fall into."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.certify import Certificate, UncertifiableError, certify, lipschitz_bound
from espalier.certify.radius import SAFETY, certified_radii, exact_scores, score_bound
from espalier.errors import EspalierError
from espalier.nn.lipschitz.activations import MaxMin
from espalier.nn.lipschitz.normalisation import Normalize, NormalizedLinear
from espalier.nn.lipschitz.residual import ConvexSum


def pixels(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def exact_linear_radii(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Return the distance to the nearest decision border of a linear classifier, 0 if it is wrong."""
    found = []
    for row, y in zip(x.double(), labels.tolist(), strict=True):
        scores = weight @ row + bias
        others = [j for j in range(len(weight)) if j != y]
        nearest = min(((scores[y] - scores[j]) / (weight[y] - weight[j]).norm()).item() for j in others)
        found.append(max(0.0, nearest))
    return torch.tensor(found, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5))
def test_radii_of_a_linear_classifier_are_its_distances_to_the_border(seed: int, classes: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(6, classes)
    x, labels = pixels(20, 2, 3, seed=seed), torch.arange(20) % classes
    certificate = certify(nn.Sequential(nn.Flatten(), linear), x, labels)
    exact = exact_linear_radii(linear.weight.detach().double(), linear.bias.detach().double(), x.flatten(1), labels)
    found = torch.tensor(certificate.radii, dtype=torch.float64)
    assert (found <= exact).all()
    assert torch.allclose(found, exact, atol=1e-5)


def test_rounding_takes_what_was_measured_from_every_margin() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 64), MaxMin(), nn.Linear(64, 3))
    x, labels = pixels(50, 6), torch.arange(50) % 3
    scores, difference = exact_scores(net, copy.deepcopy(net).double(), x, 16)
    with torch.no_grad():
        in_batches = torch.cat([net(part) for part in x.split(16)])  # a batch of another size may be rounded otherwise
        assert difference == (in_batches.double() - scores).abs().max().item() > 0
    bound = score_bound(net, 3)
    free = certified_radii(scores, labels, bound.pairs_CC)
    taken = certified_radii(scores, labels, bound.pairs_CC, slack=2 * SAFETY * difference)
    assert certify(net, x, labels, batch_size=16).radii == pytest.approx(taken.tolist(), rel=1e-9, abs=1e-12)
    right = taken > 0
    assert right.any()
    least = 2 * SAFETY * difference / bound.pairs_CC.max()
    assert (free - taken)[right].min() >= least * (1 - 1e-9)


def test_the_last_layer_is_used_pair_by_pair_and_is_never_looser() -> None:
    torch.manual_seed(0)
    body = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))
    head = nn.Linear(6, 4)
    x = pixels(40, 6)
    net = nn.Sequential(body, MaxMin(), head)
    labels = net(x).argmax(1)
    by_pair = certify(net, x, labels)
    assert by_pair.last_layer
    # The same function with an identity behind it: now only √2·L of the whole map is known.
    whole = certify(nn.Sequential(net, nn.Identity()), x, labels)
    assert not whole.last_layer
    assert whole.lipschitz == pytest.approx(lipschitz_bound(net))
    assert all(tight >= loose for tight, loose in zip(by_pair.radii, whole.radii, strict=True))
    scores = net(x).detach().double()
    for image, y in enumerate(labels.tolist()):
        others = [j for j in range(4) if j != y]
        margin = min((scores[image, y] - scores[image, j]).item() for j in others)
        assert whole.radii[image] == pytest.approx(margin / (math.sqrt(2) * whole.lipschitz), abs=1e-4)


# -- traps


def test_trap_a_free_last_layer_cannot_buy_radius_by_growing() -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(6, 3, bias=False), pixels(30, 6)
    labels = head(x).argmax(1)
    before = certify(nn.Sequential(head), x, labels)
    with torch.no_grad():
        head.weight.mul_(100.0)
    after = certify(nn.Sequential(head), x, labels)
    assert after.radii == pytest.approx(before.radii, abs=1e-5)


def test_trap_a_normalised_last_layer_counts_row_distances_up_to_two_not_root_two() -> None:
    head = NormalizedLinear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[5.0, 0.0], [-5.0, 0.0]]))
    certificate = certify(nn.Sequential(head), torch.tensor([[0.3, 0.9]]), torch.tensor([0]))
    # Scores ±0.3; the border is x₀ = 0, which is 0.3 away. √2 in place of 2 would claim 0.42.
    assert certificate.radii[0] == pytest.approx(0.3, abs=1e-5)


def test_trap_dividing_by_a_deviation_divides_the_radii() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    x = pixels(30, 3, 1, 1)
    std = (0.2470, 0.2435, 0.2616)
    scaled = nn.Sequential(Normalize(0.0, std), nn.Flatten(), linear)
    assert lipschitz_bound(scaled) == pytest.approx(lipschitz_bound(linear) / 0.2435)
    free = nn.Sequential(Normalize(0.0), nn.Flatten(), linear)
    assert lipschitz_bound(free) == pytest.approx(lipschitz_bound(linear))
    certificate = certify(scaled, x, scaled(x).argmax(1))
    # The true borders of the composed linear map are never nearer than what is certified.
    weight = linear.weight.detach().double() / torch.tensor(std).double()
    exact = exact_linear_radii(weight, linear.bias.detach().double(), x.flatten(1), scaled(x).argmax(1))
    assert (torch.tensor(certificate.radii) <= exact).all()
    assert max(certificate.radii) > 0


@pytest.mark.parametrize("images", [pixels(2, 3) * 255, pixels(2, 3) - 0.5, torch.full((2, 3), 1.0001)])
def test_trap_images_in_other_units_are_refused(images: Tensor) -> None:
    with pytest.raises(EspalierError, match=r"pixels in \[0, 1\]"):
        certify(nn.Linear(3, 2), images.clamp(max=255), torch.zeros(2, dtype=torch.long))


def test_trap_integer_images_are_refused() -> None:
    with pytest.raises(EspalierError, match="uint8"):
        certify(nn.Linear(3, 2), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))


def test_trap_nan_is_never_certified() -> None:
    images = pixels(2, 3)
    images[1, 1] = float("nan")
    with pytest.raises(EspalierError, match="nan"):
        certify(nn.Linear(3, 2), images, torch.zeros(2, dtype=torch.long))
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 0.0, 0.0], [1.0, nan, 0.0], [inf, 0.0, 0.0], [2.0, 1.0, 0.0]]).double()
    pairs = 1.0 - torch.eye(3).double()
    labels = torch.tensor([0, 0, 0, 0])
    assert certified_radii(scores, labels, pairs).tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0])


def test_trap_a_margin_exactly_at_the_threshold_is_not_certified() -> None:
    certificate = Certificate((0.5, 0.0), (1, 1), (1, 1), 1.0, True, 0.0, ())
    assert certificate.certified(0.5) == [False, False]
    assert certificate.certified(0.5 - 1e-12) == [True, False]
    # A tie is classified by position, and moves with the slightest touch: right, but with no radius at all.
    assert certificate.certified(0.0) == [True, False]
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    tied = certify(net, torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    assert tied.clean_accuracy == 1.0
    assert tied.certified_accuracy(0.0) == 0.0


def test_trap_training_mode_is_refused_where_it_is_random() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    images, labels = pixels(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(UncertifiableError, match=r"1 \(Dropout\)"):
        certify(net.train(), images, labels)
    certify(net.eval(), images, labels)


def test_trap_a_steep_residual_is_counted() -> None:
    torch.manual_seed(0)
    inner = nn.Linear(4, 4)
    net = nn.Sequential(ConvexSum(inner, 0.5), nn.Linear(4, 2))
    with torch.no_grad():
        inner.weight.mul_(50.0)
    expected = 0.5 + 0.5 * torch.linalg.matrix_norm(inner.weight.detach().double(), 2).item()
    assert score_bound(net, 2).lipschitz == pytest.approx(expected)


# -- corners


def test_wrong_predictions_have_no_radius_and_equal_rows_an_infinite_one() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.ones(2, 2))
        net.bias.copy_(torch.tensor([1.0, 0.0]))
    certificate = certify(net, pixels(2, 2), torch.tensor([0, 1]))
    assert certificate.radii == (math.inf, 0.0)
    assert certificate.clean_accuracy == 0.5


def test_certifying_changes_nothing_in_the_network() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    certify(net, pixels(5, 3), torch.zeros(5, dtype=torch.long))
    assert not net.training
    assert all(torch.equal(before[name], tensor) and tensor.dtype == torch.float32
               for name, tensor in net.state_dict().items())  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0]), "one class index"),
        (torch.tensor([0.0, 1.0]), "one class index"),
        (torch.tensor([0, -1]), "one class index"),
        (torch.tensor([0, 2]), "labels go up to 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        certify(nn.Linear(3, 2), pixels(2, 3), labels)


def test_a_network_that_gives_no_rows_of_scores_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"scores \(B, C\)"):
        certify(nn.Identity(), pixels(2, 1, 3), torch.zeros(2, dtype=torch.long))
