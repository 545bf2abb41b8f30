"""A folded ConvMixer against the model it was made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier.models import ConvMixer
from espalier.models.convmixer_fused import FusedBlock, fuse


def trained(spatial_dims: int = 2, **arguments: object) -> ConvMixer:
    """A float64 model whose norms are far from 1 and 0, in their weights and in their running statistics."""
    g = torch.Generator().manual_seed(0)
    net = ConvMixer(8, 3, kernel_size=5, patch_size=2, num_classes=4, spatial_dims=spatial_dims, **arguments).double()  # type: ignore[arg-type]
    net.init_weights(g)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=g))
            module.running_var.copy_(torch.rand(8, generator=g) + 0.1)
    return net.eval()


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_maps_and_logits_are_equal(spatial_dims: int, activation: str) -> None:
    net = trained(spatial_dims, activation=activation)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fused = fuse(net)
    # Small maps: every pixel is near a border, where folding through the zero padding would show.
    x = torch.randn(2, 3, *(6,) * spatial_dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(fused.forward_features(x), net.forward_features(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-11, atol=1e-11)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()), (
        "the model is left alone"
    )


def test_nothing_is_left_to_normalise_and_inputs_take_gradients() -> None:
    net = trained(drop_rate=0.5)
    fused = fuse(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    grads = []
    for model in (net, fused):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_the_shift_of_the_pointwise_norm_may_not_go_into_the_depthwise_bias() -> None:
    # The counter-example behind the note: the naive folding is exact inside and wrong at the border.
    net = trained()
    scale, shift = (tensor.flatten() for tensor in (fuse(net).stem[2].scale, fuse(net).stem[2].shift))
    conv, block = net.blocks[0][0].fn[0], fuse(net).blocks[0]
    assert isinstance(block, FusedBlock)
    v = torch.randn(1, 8, 11, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = conv(v * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    taps = conv.weight.detach().flatten(1).sum(1)
    naive = nn.functional.conv2d(
        v, conv.weight * scale.view(-1, 1, 1, 1), conv.bias + shift * taps, padding="same", groups=8
    )
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(naive[inner], exact[inner])
    assert (naive - exact).abs().max() > 0.1


def test_pooling_and_layout_are_kept() -> None:
    net = trained()
    net.reset_classifier(0, "")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(fuse(net)(x), net(x))
    last = fuse(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), net(x))
