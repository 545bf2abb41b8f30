"""The vision transformer against a plain one, and timm's model contract."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.errors import EspalierError
from espalier.models import VisionTransformer, build_model
from espalier.models.vit import sincos_positions

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 5), width=st.integers(1, 5), quarter=st.integers(1, 6))
def test_positions_equal_a_plain_loop(height: int, width: int, quarter: int) -> None:
    table = sincos_positions(height, width, 4 * quarter)
    for y in range(height):
        for x in range(width):
            for i in range(quarter):
                w = 10000.0 ** (-i / quarter)
                row = table[y * width + x]
                expected = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                for part, value in enumerate(expected):
                    assert float(row[part * quarter + i]) == pytest.approx(value, abs=1e-6)


def plain_forward(net: VisionTransformer, image: torch.Tensor) -> torch.Tensor:
    """Classify one image (C, H, W) in float64, patch by patch and head by head."""
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    size, dim, heads = SMALL["patch_size"], SMALL["embed_dim"], SMALL["num_heads"]
    grid, k = SMALL["img_size"] // size, dim // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    tokens = []
    for y in range(grid):
        for x in range(grid):
            patch = image[:, y * size : (y + 1) * size, x * size : (x + 1) * size].double()
            weight = state["patch_embed.weight"]
            tokens.append((weight * patch).sum((1, 2, 3)) + state["patch_embed.bias"])
    h = torch.stack(tokens) + net.pos_embed[0].double()
    for i in range(SMALL["depth"]):
        q, key, v = linear(norm(h, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        mixed = []
        for head in range(heads):
            part = slice(head * k, (head + 1) * k)
            mixed.append((q[:, part] @ key[:, part].T / math.sqrt(k)).softmax(-1) @ v[:, part])
        h = h + linear(torch.cat(mixed, -1), f"blocks.{i}.attn.proj")
        hidden = nn.functional.gelu(linear(norm(h, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.0"))
        h = h + linear(hidden, f"blocks.{i}.mlp.2")
    return linear(norm(h, "norm").mean(0), "head")


def test_forward_equals_a_plain_transformer_in_float64() -> None:
    net = VisionTransformer(**SMALL)
    net.init_weights(seeded())
    with torch.no_grad():
        for parameter in net.parameters():  # leave no bias at zero and no gain at one
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    images = torch.randn(3, 1, 8, 8, generator=seeded(1))
    expected = torch.stack([plain_forward(net, image) for image in images])
    torch.testing.assert_close(net(images).double(), expected, atol=1e-4, rtol=0)


def test_attention_maps_explain_the_mixing() -> None:
    net = VisionTransformer(**SMALL)
    images = torch.randn(2, 1, 8, 8, generator=seeded(1))
    maps = net.attention_maps(images)
    assert [tuple(m.shape) for m in maps] == [(2, 3, 16, 16)] * 2
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(2, 3, 16))
    attention = net.blocks[0].attn
    x = torch.randn(2, 16, 24, generator=seeded(2))
    v = attention.split_heads(x)[2]
    by_maps = attention.proj((attention.maps(x) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), by_maps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_contract(pool: str, positions: str) -> None:
    net = VisionTransformer(**SMALL, pool=pool, positions=positions)  # type: ignore[arg-type]
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    features = net.forward_features(x)
    assert features.shape == (2, 16 + (pool == "cls"), net.num_features)
    torch.testing.assert_close(net.forward_head(features), net(x))
    assert net.forward_head(features, pre_logits=True).shape == (2, 24)
    assert net.get_classifier() is net.head
    assert ("pos_embed" in dict(net.named_parameters())) == (positions == "learned")
    torch.testing.assert_close(net.pos_embed.detach()[0], sincos_positions(4, 4, 24))
    assert net.no_weight_decay() <= {"pos_embed", "cls_token"}
    patterns = net.group_matcher()
    for name, _ in net.named_parameters():
        if not name.startswith("head"):
            blocks = [pattern for pattern, _ in patterns["blocks"]]
            assert any(re.match(pattern, name) for pattern in [patterns["stem"], *blocks]), name
    net.reset_classifier(7)
    assert net(x).shape == (2, 7)
    net.reset_classifier(0)
    assert net(x).shape == (2, 24)


def test_checkpointing_gives_equal_gradients() -> None:
    net = VisionTransformer(**SMALL).double()
    x = torch.randn(2, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    grads = []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        net(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_init_weights_is_a_function_of_the_generator() -> None:
    one, two = VisionTransformer(**SMALL), VisionTransformer(**SMALL)
    state = torch.random.get_rng_state()
    one.init_weights(seeded(3))
    two.init_weights(seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert float(one.blocks[0].mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("name", "size"),
    [(n, 0) for n in ("img_size", "patch_size", "in_chans", "embed_dim", "num_heads")]
    + [(n, -1) for n in ("patch_size", "num_classes", "num_heads", "depth", "mlp_ratio")],
)
def test_sizes_that_are_too_small_are_named(name: str, size: int) -> None:
    with pytest.raises(EspalierError, match=f"^{name} is {size}: give a (whole )?number from"):
        VisionTransformer(**{**SMALL, name: size})


def test_bad_input_is_one_line() -> None:
    with pytest.raises(EspalierError, match="embed_dim 24 is not divisible by num_heads 5"):
        VisionTransformer(**{**SMALL, "num_heads": 5})
    with pytest.raises(EspalierError, match="img_size 8 is not divisible by patch_size 3"):
        VisionTransformer(**{**SMALL, "patch_size": 3})
    with pytest.raises(EspalierError, match="embed_dim 18 is no multiple of 4"):
        VisionTransformer(**{**SMALL, "embed_dim": 18})
    with pytest.raises(EspalierError, match="pool 'max' is unknown"):
        VisionTransformer(**SMALL, pool="max")  # type: ignore[arg-type]
    with pytest.raises(EspalierError, match="this model takes 8 × 8"):
        VisionTransformer(**SMALL)(torch.zeros(1, 1, 16, 16))
    with pytest.raises(EspalierError, match="did you mean 'embed_dim'"):
        build_model("vit", embed_dims=3)
    with pytest.raises(EspalierError, match="did you mean 'vit'"):
        build_model("vitt")


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_torch_fx_traces_it(pool: str) -> None:
    """Feature extractors are built on symbolic traces, in which the input is no tensor."""
    net = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, pool=pool).eval()
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
