"""ConvMixer against the paper's own definition, its parameter counts and timm's model contract."""

from __future__ import annotations

import pytest
import torch

from espalier.errors import EspalierError
from espalier.models import ConvMixer
from reference.convmixer_original import original_convmixer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"dim": 1536, "depth": 20, "kernel_size": 9, "patch_size": 7}, 51_625_960),
        ({"dim": 768, "depth": 32, "kernel_size": 7, "patch_size": 7, "activation": "relu"}, 21_110_248),
        ({"dim": 1024, "depth": 20, "kernel_size": 9, "patch_size": 14}, 24_383_464),
        ({"dim": 512, "depth": 16, "kernel_size": 8, "patch_size": 7}, 5_357_544),
        ({"dim": 1024, "depth": 12, "kernel_size": 8, "patch_size": 7}, 14_621_672),
        ({"dim": 256, "depth": 8, "kernel_size": 9, "patch_size": 1, "num_classes": 10}, 706_570),
        ({"dim": 256, "depth": 8, "kernel_size": 5, "patch_size": 2, "num_classes": 10}, 594_186),
    ],
)
def test_published_parameter_counts(arguments: dict, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ConvMixer(**arguments).parameters()) == count


# torch warns once that "same" padding of an even kernel may copy its input; that is what the paper's definition does.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel", "patch"), [(3, 1), (5, 2), (4, 2)])
def test_logits_and_gradients_equal_the_original(kernel: int, patch: int) -> None:
    ours = ConvMixer(12, 2, kernel_size=kernel, patch_size=patch, num_classes=4)
    original = original_convmixer(12, 2, kernel, patch, 4)
    # Same modules in the same order, so the tensors pair up by position.
    for mine, theirs in zip(original.state_dict().values(), ours.state_dict().values(), strict=True):
        mine.copy_(theirs)
    x = torch.randn(3, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(ours(x), original(x))
    ours(x).square().sum().backward()
    original(x).square().sum().backward()
    for a, b in zip(ours.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_contract_in_every_dimension(spatial_dims: int) -> None:
    net = ConvMixer(8, 2, kernel_size=3, patch_size=2, in_chans=2, num_classes=5, spatial_dims=spatial_dims).eval()
    x = torch.randn(2, 2, *(6,) * spatial_dims, generator=seeded())
    features = net.forward_features(x)
    assert features.shape == (2, 8, *(3,) * spatial_dims)
    torch.testing.assert_close(net.forward_head(features), net(x))
    assert net.forward_head(features, pre_logits=True).shape == (2, 8)
    net.reset_classifier(3)
    assert net(x).shape == (2, 3)
    net.reset_classifier(0)
    assert net(x).shape == (2, 8)


def test_checkpointing_gives_equal_gradients() -> None:
    net = ConvMixer(8, 2, kernel_size=3, patch_size=1, num_classes=3).double().eval()
    x = torch.randn(2, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    grads = []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        net(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_checkpointing_counts_a_batch_once() -> None:
    nets = [ConvMixer(8, 2, kernel_size=3, patch_size=1, num_classes=3).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].set_grad_checkpointing()
    x = torch.randn(4, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    for net in nets:
        net(x).square().sum().backward()
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_init_weights_restores_everything_under_the_generator() -> None:
    one, two = (ConvMixer(8, 2, kernel_size=3, patch_size=1, num_classes=3) for _ in range(2))
    one(torch.randn(4, 3, 5, 5, generator=seeded()))  # moves the running statistics
    state = torch.random.get_rng_state()
    for net in (one, two):
        net.init_weights(seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    # torch's default: uniform on ±1/√fan_in, so variance 1/(3 fan_in) and never beyond the bound.
    wide = ConvMixer(64, 1, kernel_size=5, patch_size=1)
    wide.init_weights(seeded(4))
    weight = wide.blocks[0][0].fn[0].weight.detach()
    assert float(weight.abs().max()) <= 0.2
    assert float(weight.var()) == pytest.approx(1 / 75, rel=0.2)


@pytest.mark.parametrize("name", ["dim", "depth", "patch_size", "in_chans", "num_classes"])
def test_sizes_that_are_too_small_are_named(name: str) -> None:
    sizes: dict[str, int] = {"dim": 8, "depth": 1, name: -1 if name == "num_classes" else 0}
    with pytest.raises(EspalierError, match=f"^{name} is {sizes[name]}: give a whole number from"):
        ConvMixer(**sizes)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(EspalierError, match="kernel_size 1 mixes no pixels"):
        ConvMixer(8, 1, kernel_size=1)
    with pytest.raises(EspalierError, match="did you mean 'gelu'"):
        ConvMixer(8, 1, activation="gelo")
    with pytest.raises(EspalierError, match="spatial_dims 4"):
        ConvMixer(8, 1, spatial_dims=4)


@pytest.mark.parametrize("training", [True, False])
def test_torch_fx_traces_it(training: bool) -> None:
    """Feature extractors are built on symbolic traces, in which the input is no tensor."""
    net = ConvMixer(8, 2, 3, 2, num_classes=3).train(training)
    net.init_weights(torch.Generator().manual_seed(0))
    traced = torch.fx.symbolic_trace(net)
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)
