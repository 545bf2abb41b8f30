"""The Lipschitz networks: their bound against their Jacobian, their contract, and peers in the same nets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from espalier.certify import certify, lipschitz_bound
from espalier.errors import EspalierError
from espalier.models import KWLarge, OrthogonalConvNet, build_model
from espalier.models.orthogonal_layers import OrthogoniumConv2d, orthogonal_conv
from espalier.train.build import build_optimizer
from espalier.train.ema import AveragedWeights

SMALL = {
    "kwlarge": {"width": 4, "hidden": 16},
    "orthogonal_convnet": {"widths": (4, 6), "depths": (2, 1), "patch_size": 2, "hidden": 12},
}


def small(name: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, **{"img_size": 8, "in_chans": 1, "num_classes": 10, **SMALL[name], **changes})


def steepest(net: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda one: net(one)[0], x).reshape(-1, x.numel())
    return torch.linalg.svdvals(jacobian).max().item()


def test_kwlarge_has_the_parameters_of_the_paper() -> None:
    assert sum(p.numel() for p in KWLarge().parameters()) == 2_405_418 + 7  # and one scale for each of seven layers


@pytest.mark.parametrize("activation", ["maxmin", "abs", "householder"])
@pytest.mark.parametrize("name", SMALL)
def test_every_model_is_certified_at_one_and_is_no_steeper(name: str, activation: str) -> None:
    net = small(name, activation=activation).double().eval()
    assert lipschitz_bound(net) == 1.0
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 1.0, 100.0):
        x = scale * torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator)
        assert steepest(net, x) <= 1.0 + 1e-12


def test_a_net_that_never_widens_keeps_the_norm_of_every_gradient() -> None:
    # 1·2² = 4 channels, 4·4 → 12 on quarter images, 48 features → 12 → 12 → 10: all transposes are isometries.
    net = small("orthogonal_convnet", widths=(4, 12), depths=(2, 1), patch_size=2).double().eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    for score in (0, 7):
        (gradient,) = torch.autograd.grad(net(x)[:, score].sum(), x)
        torch.testing.assert_close(gradient.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_stages_halve_the_image_and_have_their_depth() -> None:
    net = small("orthogonal_convnet", widths=(4, 6, 8), depths=(2, 0, 1), patch_size=2)
    shapes: list[tuple[int, ...]] = []
    for module in net.features:
        if hasattr(module, "kernel_size"):
            module.register_forward_hook(lambda m, _, y: shapes.append((m.kernel_size[0], *y.shape[1:])))
    net(torch.rand(2, 1, 8, 8))
    assert shapes == [(3, 4, 4, 4), (3, 4, 4, 4), (1, 6, 2, 2), (1, 8, 1, 1), (3, 8, 1, 1)]


@pytest.mark.parametrize("name", SMALL)
def test_the_contract_of_models(name: str) -> None:
    net = small(name)
    x = torch.rand(2, 1, 8, 8)
    features = net.forward_features(x)
    assert features.shape == (2, net.num_features)
    torch.testing.assert_close(net.forward_head(features), net(x))
    assert torch.equal(net.forward_head(features, pre_logits=True), features)
    net.set_grad_checkpointing()
    torch.testing.assert_close(net.forward_features(x), features)
    net.init_weights(torch.Generator().manual_seed(3))
    first = net(x)
    net.init_weights(torch.Generator().manual_seed(3))
    assert torch.equal(net(x), first)
    assert net.no_weight_decay() <= set(dict(net.named_parameters()))
    net.eval().reset_classifier(4)
    assert not any(part.training for part in net.modules())
    assert net(x).shape == (2, 4)
    assert net.get_classifier() is net.head
    net.reset_classifier(0)
    assert net(x).shape == (2, net.num_features)


def test_a_normalised_head_is_certified_pair_by_pair() -> None:
    net = small("kwlarge", head="normalized").eval()
    images = torch.rand(8, 1, 8, 8)
    certificate = certify(net, images, net(images).argmax(1))
    assert certificate.last_layer
    assert certificate.lipschitz == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("head", ["orthogonal", "normalized"])
@pytest.mark.parametrize("name", SMALL)
def test_averaging_over_the_mirror_image_evaluates_both_and_stays_certified_at_one(name: str, head: str) -> None:
    plain = small(name, head=head).double()
    net = small(name, head=head, flip_average=True).double()
    net.load_state_dict(plain.state_dict())
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net.train()(x), plain.train()(x))
    net.eval(), plain.eval()
    mean = (plain(x) + plain(x.flip(3))) / 2
    torch.testing.assert_close(net(x), mean)
    torch.testing.assert_close(net(x.flip(3)), mean)  # and so the class never depends on the side
    assert (net(x) - plain(x)).abs().max() > 1e-3
    labels = mean.argmax(1)
    radii = torch.tensor(certify(net, x, labels).radii)
    assert radii.max() > 0
    if head == "orthogonal":
        assert lipschitz_bound(net, example=x) == pytest.approx(1.0, abs=1e-9)
        assert steepest(net, x[:1]) <= 1.0 + 1e-12
        best = mean.topk(2).values
        torch.testing.assert_close(radii, ((best[:, 0] - best[:, 1]) / 2**0.5).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KWLarge(img_size=30), "multiples of 4"),
        (lambda: KWLarge(img_size=(32, 30)), "multiples of 4"),
        (lambda: KWLarge(head="free"), "unknown head 'free'"),
        (lambda: OrthogonalConvNet(img_size=30), "multiples of 4"),
        (lambda: OrthogonalConvNet(widths=(8, 16), depths=(1,)), "one of each for every stage"),
        (lambda: OrthogonalConvNet(depths=(-1,)), r"depths\[0\] is -1: give a whole number from 0"),
        (lambda: OrthogonalConvNet(patch_size=0), "patch_size is 0"),
        (lambda: KWLarge(activation="relu"), "unknown activation 'relu'"),
        (lambda: KWLarge(layer="cayle"), "did you mean 'cayley'"),
    ],
)
def test_bad_arguments_are_named(call: object, words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("layer", ["aoc", "soc"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 2)])
def test_layers_of_orthogonium_are_bounded_by_their_kernels(layer: str, kernel: int, stride: int) -> None:
    pytest.importorskip("orthogonium")
    torch.manual_seed(0)
    conv = orthogonal_conv(layer, 4, 4, kernel, stride).eval()
    assert isinstance(conv, OrthogoniumConv2d)
    x = torch.rand(1, 4, 6, 6)
    assert conv(x).shape == (1, 4, 6 // stride, 6 // stride)
    jacobian = torch.autograd.functional.jacobian(lambda one: conv(one).flatten(), x).reshape(-1, x.numel())
    exact = torch.linalg.svdvals(jacobian.double()).max().item()
    assert exact <= lipschitz_bound(conv) + 1e-6
    assert lipschitz_bound(conv) < 1.2
    with torch.no_grad():
        theirs = conv.conv(x) if stride == 2 else None
    if theirs is not None:
        torch.testing.assert_close(conv(x), theirs)


@pytest.mark.parametrize("layer", ["aoc", "soc"])
def test_nets_of_orthogonium_are_certified(layer: str) -> None:
    pytest.importorskip("orthogonium")
    torch.manual_seed(1)
    net = OrthogonalConvNet((8,), (1,), hidden=16, img_size=16, layer=layer).eval()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores, double = net(images), copy.deepcopy(net).double()(images.double())
        assert torch.equal(net(images), scores)  # their power iteration does not go on in evaluation
    # Their kernels come from iterations that are run again in float64: they agree to the float32 iteration's rounding.
    torch.testing.assert_close(scores.double(), double, rtol=1e-4, atol=1e-5)
    certificate = certify(net, images, scores.argmax(1))
    top = scores.topk(2, dim=1).values
    margins = (top[:, 0] - top[:, 1]).double()
    radii = torch.tensor(certificate.radii)
    assert (radii > 0).all()
    # No radius is larger than the one of a net whose constant is 1, up to the difference between the two kernels.
    assert (radii <= margins / 2**0.5 + 1e-4).all()


# -- stale caches: what is certified are the present weights


def certificates_agree(net: nn.Module, images: Tensor) -> None:
    """Compare the certificate of a net that has been evaluated before with that of a fresh one of the same weights."""
    labels = net(images).argmax(1)
    fresh = small("kwlarge")
    fresh.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()})
    assert certify(net, images, labels) == certify(fresh.eval(), images, labels)


def test_certificates_follow_steps_loads_and_averages() -> None:
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net = small("kwlarge").eval()
    averages = AveragedWeights(net, 0.5)
    before = certify(net, images, net(images).argmax(1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(images)[:, 0].sum().backward()
    optimizer.step()
    averages.update()
    certificates_agree(net, images)
    assert certify(net, images, torch.tensor(before.predictions)) != before
    with averages.applied():
        certificates_agree(net, images)
        averaged = certify(net, images, torch.tensor(before.predictions))
    certificates_agree(net, images)
    assert certify(net, images, torch.tensor(before.predictions)) != averaged
    net.load_state_dict(small("kwlarge").state_dict())
    assert certify(net, images, torch.tensor(before.predictions)) == before


def test_robust_recipes_train_scales_without_decay() -> None:
    from dataclasses import replace

    from espalier.recipes import get_recipe

    net = small("kwlarge")
    groups = build_optimizer(net, replace(get_recipe("digits_robust"), weight_decay=0.1)).param_groups
    exempt = {id(p) for p in groups[1]["params"]}
    assert exempt == {id(p) for name, p in net.named_parameters() if name.endswith("alpha")}
