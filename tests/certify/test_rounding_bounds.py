"""Rounding is proved: the net that runs, in its own arithmetic, does what the certificate says of it."""

from __future__ import annotations

import copy
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.certify import Certificate, UncertifiableError, certify
from espalier.certify.arithmetic import gamma, image_norms, orthogonality_excess
from espalier.certify.bound import prepare
from espalier.certify.bounded import Analysis
from espalier.errors import EspalierError
from espalier.models.lipschitz import KWLarge, OrthogonalConvNet
from espalier.nn import CayleyConv2d, CayleyConvTranspose2d, CayleyLinear, MaxMin, NormalizedLinear
from experiments.adversarial_models import Draw


class Shifted(nn.Module):
    """Adds numbers and takes them off again: nothing in real arithmetic, the last digits in any other."""

    def __init__(self, *shifts: float) -> None:
        super().__init__()
        self.shifts = shifts

    def forward(self, x: Tensor) -> Tensor:
        for shift in self.shifts:
            x = x + shift
        return x


def two_scores(*shifts: float) -> nn.Sequential:
    """Return scores (x, 1/4) with x shifted to and fro on the way."""
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        head.bias.copy_(torch.tensor([0.0, 0.25]))
    return nn.Sequential(nn.Flatten(), Shifted(*shifts), head)


@pytest.mark.parametrize(("arithmetic", "shift"), [("float32", 2.0**23), ("float64", 2.0**52)])
def test_a_chain_of_biases_whose_rounding_is_nowhere_seen_is_charged(arithmetic: str, shift: float) -> None:
    # At 1 nothing is rounded; at 0.6 the sum rounds to a whole number, and the class changes far within 3/4.
    net, x = two_scores(shift, -shift, -0.5, 0.5), torch.tensor([[[[1.0]]]], dtype=torch.float64)
    dtype = getattr(torch, arithmetic)
    certificate = certify(net, x, torch.tensor([0]), arithmetic=arithmetic)
    plain = copy.deepcopy(net).to(dtype)
    nearest = min(
        (d for d in torch.linspace(0, 0.75, 200).tolist() if plain((x - d).to(dtype)).argmax(1).item() != 0),
        default=0.75,
    )
    assert nearest < 0.7
    assert certificate.radii[0] <= nearest
    # Without the shifts the border is where it is.
    assert certify(two_scores(), x, torch.tensor([0])).radii[0] == pytest.approx(0.75)


def test_overflow_in_the_arithmetic_that_runs_is_not_certified() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Hardtanh(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.mul_(1e38)
    x = torch.rand(4, 1, 2, 2)
    labels = copy.deepcopy(net).double()(x.double()).argmax(1)
    assert set(certify(net, x, labels, arithmetic="float32").radii) == {0.0}
    assert torch.isfinite(net(x)).all()  # squashed: the scores do not tell that numbers on the way were infinite
    with torch.no_grad():
        net[1].weight.mul_(1e-38)
    labels = copy.deepcopy(net).double()(x.double()).argmax(1)
    assert max(certify(net, x, labels, arithmetic="float32").radii) > 0


def test_scores_that_are_not_finite_are_not_certified() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.fill_(3e38)
        net[1].bias.copy_(torch.tensor([1e38, 0.0]))
    certificate = certify(net, torch.ones(1, 1, 2, 2), torch.tensor([0]), arithmetic="float32")
    assert certificate.radii == (0.0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_certified_as_what_the_certificate_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), CayleyLinear(16, 8), MaxMin(), nn.Linear(8, 3)).eval().to(dtype)
    x = torch.rand(8, 1, 4, 4)
    double = copy.deepcopy(net).double()
    certificate = certify(net, x, double(x.double()).argmax(1))
    assert certificate.arithmetic == "float64"
    # The radii are those of the float64 net with these weights, not of what images in half precision give.
    assert certificate.radii == certify(double, x, double(x.double()).argmax(1)).radii

    class Inside(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return (y.to(dtype) * 1.5).to(y.dtype)

    with pytest.raises(UncertifiableError, match="only float32 and float64"):
        certify(nn.Sequential(Inside(), net), x, torch.zeros(8, dtype=torch.long))


def test_images_in_more_digits_than_the_arithmetic_are_charged_for_their_conversion() -> None:
    net = two_scores()
    x = torch.full((1, 1, 1, 1), 0.25 + 2.0**-26, dtype=torch.float64)
    # Rounded to float32 this is a tie; what is certified in float64 is not there in float32.
    assert certify(net, x, torch.tensor([0])).radii[0] > 0
    assert certify(net, x, torch.tensor([0]), arithmetic="float32").radii[0] == 0.0


def test_autocast_is_refused_or_without_effect() -> None:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).to(x.dtype)

    net, x, labels = nn.Sequential(nn.Linear(3, 2)), torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = certify(net, x, labels, arithmetic="float32")
    assert inside == certify(net, x, labels, arithmetic="float32")
    with pytest.raises(UncertifiableError, match="autocast"):
        certify(Cast(3, 2), x, labels, arithmetic="float32")


def test_unknown_arithmetic_and_shortcuts_are_refused() -> None:
    net, x, labels = nn.Linear(3, 2), torch.rand(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(EspalierError, match="bfloat16"):
        certify(net, x, labels, arithmetic="bfloat16")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(EspalierError, match="highest"):
            certify(net, x, labels, arithmetic="float32")
        certify(net, x, labels)
    finally:
        torch.set_float32_matmul_precision(before)


# -- the bound against what happens

DERIVED = (CayleyConv2d, CayleyConvTranspose2d, CayleyLinear, NormalizedLinear)


def error_bound(net: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Return scores as computed, and a and b of their bound a + b·r, leaving out images that could overflow."""
    analysis = Analysis()
    twin = prepare(net, dtype, analysis)
    with torch.no_grad():
        bound = analysis.run(twin, analysis.start(x.to(dtype))).bound
    assert analysis.room is not None
    return bound.numbers, torch.where(analysis.room > 0, bound.error, float("inf")), bound.growth


@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(rng=st.randoms(use_true_random=False))
def test_float32_strays_from_float64_by_no_more_than_its_bound(rng: random.Random) -> None:
    draw = Draw(rng)
    net, shape = draw.network()
    # What a net computes of its own parameters is part of the map that is bounded: these differ between precisions.
    if any(isinstance(m, DERIVED) or nn.utils.parametrize.is_parametrized(m) for m in net.modules()):
        return
    x = torch.rand(3, *shape, generator=draw.torch)
    try:
        single, a, b = error_bound(net, x, torch.float32)
        exact, c, d = error_bound(net, x, torch.float64)
    except EspalierError:
        return
    note(f"{net}\n{a} {b} {c} {d} {single} {exact}")
    difference = (single.double() - exact).norm(dim=1)
    judged = torch.isfinite(difference) & torch.isfinite(a) & torch.isfinite(c)
    assert (difference <= a + c)[judged].all()
    # The same at images nearby, with the bound of the first ones.
    step = torch.randn(x.shape, generator=draw.torch)
    near = x + step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    radius = (near.double() - x.double()).flatten(1).norm(dim=1)
    with torch.no_grad():
        gap = copy.deepcopy(net).float()(near.clone()).double() - copy.deepcopy(net).double()(near.double())
    gaps = gap.norm(dim=1)
    assert (gaps <= a + b * radius + c + d * radius)[judged & torch.isfinite(gaps)].all()


def test_a_sum_in_exact_arithmetic_stays_within_gamma() -> None:
    torch.manual_seed(0)
    for n in (3, 50, 700):
        a, b = torch.randn(n), torch.randn(n)
        exact = sum(Fraction(p) * Fraction(q) for p, q in zip(a.tolist(), b.tolist(), strict=True))
        size = sum(abs(Fraction(p) * Fraction(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True))
        assert abs(Fraction((a @ b).item()) - exact) <= Fraction(gamma(n, torch.float32)) * size
    with pytest.raises(UncertifiableError, match="use float64"):
        gamma(2e6, torch.float32)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_norms_neither_overflow_nor_vanish(scale: float) -> None:
    value = scale * torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert image_norms(value).tolist() == pytest.approx([5 * scale, 0.0, scale], rel=1e-12, abs=1e-320)
    assert (image_norms(value)[::2] >= torch.tensor([5 * scale, scale], dtype=torch.float64)).all()


def test_the_excess_bounds_singular_values_of_real_and_complex_matrices() -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 9, 5, dtype=torch.complex128)).Q * torch.tensor([1.0, 1.001, 0.7]).view(3, 1, 1)
    for matrices in (q, q.mT):
        excess = orthogonality_excess(matrices.real, matrices.imag)
        assert torch.linalg.svdvals(matrices).max().item() <= (1 + excess) ** 0.5
        assert orthogonality_excess(matrices[:1].real, matrices[:1].imag) < 1e-12
    assert orthogonality_excess(torch.full((1, 2, 2), float("nan")), None) == float("inf")


def test_rounding_costs_next_to_nothing_in_float64_and_stands_in_the_report() -> None:
    torch.manual_seed(0)
    for net, shape in (
        (KWLarge(16, 128, 8, 1).eval(), (1, 8, 8)),
        (OrthogonalConvNet((32,), img_size=16).eval(), (3, 16, 16)),
    ):
        x = torch.rand(6, *shape)
        labels = copy.deepcopy(net).double()(x.double()).argmax(1)
        double = certify(net, x, labels)
        assert 0 < double.rounding < 1e-10
        single = certify(net, x, labels, arithmetic="float32")
        assert double.rounding < single.rounding < 0.1
        assert all(a >= b for a, b in zip(double.radii, single.radii, strict=True))
        named = {path.split(" ")[0]: (constant, slack) for path, constant, slack in double.slack}
        for name, module in net.named_modules():
            if isinstance(module, CayleyConv2d | CayleyLinear):
                constant, slack = named[name]
                assert constant == pytest.approx(1.0, abs=1e-9)
                assert 0 < slack < 1e-10
        assert "features.0 (" in double.slack_table()
        assert "float64" in str(double)


def test_a_certificate_says_which_arithmetic_and_older_files_still_open(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, x = nn.Linear(3, 2), torch.rand(4, 3)
    for arithmetic in ("float64", "float32"):
        certificate = certify(net, x, torch.zeros(4, dtype=torch.long), arithmetic=arithmetic)
        assert certificate.arithmetic == arithmetic
        assert any(arithmetic in text for text in certificate.assumptions)
        assert Certificate.load(certificate.save(tmp_path / "new.json")) == certificate
    old = tmp_path / "old.json"
    old.write_text('{"radii": [0.5], "labels": [1], "predictions": [1], "lipschitz": 1.0, "last_layer": true, '
                   '"rounding": 1e-6, "assumptions": []}')  # fmt: skip
    assert Certificate.load(old).arithmetic == "unstated"
