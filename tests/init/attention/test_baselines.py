"""Peers of mimetic initialisation: each writes what it says, where it says, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init.attention import baselines as arms
from espalier.models import ConvMixer, VisionTransformer
from reference.attention_reference import head_products


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vit(**changes: int) -> VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 2, "num_heads": 3, **changes}
    model = VisionTransformer(**sizes)
    model.init_weights(seeded(9))
    return model


def changed_by(write: object, model: VisionTransformer, **arguments: object) -> set[str]:
    """Return the parameters that an arm changes in block 0 (it must change the same ones in block 1)."""
    for block in model.blocks:
        for bias in (block.attn.qkv.bias, block.attn.proj.bias):
            nn.init.constant_(bias, 0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    write(model, generator=seeded(), **arguments)
    names = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    blocks = [{n.removeprefix(f"blocks.{i}.") for n in names if n.startswith(f"blocks.{i}.")} for i in range(2)]
    assert blocks[0] == blocks[1]
    assert len(names) == 2 * len(blocks[0])
    return blocks[0]


BIASES = {"attn.qkv.bias", "attn.proj.bias"}


def test_truncated_normal() -> None:
    model = vit()
    assert changed_by(arms.truncated_normal_, model, std=0.05) == {"attn.qkv.weight", "attn.proj.weight", *BIASES}
    weight = model.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= 0.1
    # A normal law cut at ±2 deviations keeps 0.8796 of its deviation.
    assert float(weight.detach().std()) == pytest.approx(0.05 * 0.8796, rel=0.03)


def test_uniform_values_leave_queries_and_keys() -> None:
    model = vit()
    kept = model.blocks[0].attn.qkv.weight[: 2 * 96].clone()
    assert changed_by(arms.uniform_values_, model) == {"attn.qkv.weight", "attn.proj.weight"}
    attention = model.blocks[0].attn
    assert torch.equal(attention.qkv.weight[: 2 * 96], kept)
    for part in (attention.qkv.weight[2 * 96 :], attention.proj.weight):
        assert part.abs().max() <= 96**-0.5
        assert float(part.detach().std()) == pytest.approx((3 * 96) ** -0.5, rel=0.03)


def test_zero_output_starts_every_attention_as_nothing() -> None:
    model = vit()
    assert changed_by(arms.zero_output_, model) == {"attn.proj.weight", *BIASES}
    assert not model.blocks[0].attn(torch.randn(2, 5, 96, generator=seeded())).any()


def test_semi_orthogonal_heads_and_identity_values() -> None:
    model = vit()
    changed_by(arms.semi_orthogonal_, model)
    q, k, v = model.blocks[1].attn.qkv.weight.detach().chunk(3)
    for weight in (q, k):
        for head in weight.reshape(3, 32, 96):
            torch.testing.assert_close(head @ head.T, torch.eye(32), atol=1e-5, rtol=0)
    assert torch.equal(v, torch.eye(96))
    assert not torch.allclose(q[:32], q[32:64], atol=0.05)


@pytest.mark.parametrize("embed_dim", [96, 192])
def test_impulse_maps_look_at_a_shifted_pixel(embed_dim: int) -> None:
    model = vit(embed_dim=embed_dim)
    arms.impulse_(model, window=3, width=0.5, generator=seeded(1))
    draws = seeded(1)
    places = nn.functional.layer_norm(model.pos_embed, (embed_dim,))
    for block in model.blocks:
        for maps in block.attn.maps(places)[0].detach():
            shift = torch.randint(-1, 2, (2,), generator=draws)
            y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
            target_y, target_x = y + shift[0], x + shift[1]
            inside = ((target_y >= 0) & (target_y < 8) & (target_x >= 0) & (target_x < 8)).flatten()
            wanted = (target_y * 8 + target_x).flatten()
            hits = maps.argmax(-1) == wanted
            assert float(hits[inside].float().mean()) > 0.95


def test_impulse_is_the_best_approximation_of_its_logits() -> None:
    # With all rank and positions that span everything, the maps are exactly the Gaussians asked for.
    model = vit(img_size=8, num_heads=1, embed_dim=96)
    model.pos_embed.copy_(torch.randn(1, 16, 96, generator=seeded(3)))
    arms.impulse_(model, window=1, width=0.7, generator=seeded())
    maps = model.blocks[0].attn.maps(nn.functional.layer_norm(model.pos_embed, (96,)))[0, 0]
    pixels = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    gaussian = torch.exp(-torch.cdist(pixels, pixels).square() / (2 * 0.7**2))
    torch.testing.assert_close(maps, gaussian / gaussian.sum(1, keepdim=True), atol=1e-4, rtol=0)


def test_mlp_mean_shift_moves_the_first_layer_alone() -> None:
    model = vit()
    before = model.blocks[0].mlp[0].weight.clone()
    assert changed_by(arms.mlp_mean_shift_, model, mean=0.03) == {"mlp.0.weight"}
    torch.testing.assert_close(model.blocks[0].mlp[0].weight, before + 0.03)


def test_arms_without_a_place_are_refused_in_one_line() -> None:
    mixer = ConvMixer(8, 1, 3, 2)
    for write in (arms.truncated_normal_, arms.zero_output_, arms.semi_orthogonal_):
        with pytest.raises(EspalierError, match="no self-attention"):
            write(mixer, generator=seeded())
    with pytest.raises(EspalierError, match="no MLP"):
        arms.mlp_mean_shift_(mixer, generator=seeded())
    with pytest.raises(EspalierError, match="no pos_embed"):
        arms.impulse_(nn.MultiheadAttention(8, 2), generator=seeded())
    model = vit()
    model.pos_embed = torch.zeros(1, 60, 96)
    with pytest.raises(EspalierError, match="60 tokens is not a square grid"):
        arms.impulse_(model, generator=seeded())


def test_the_generator_decides_everything() -> None:
    state = torch.random.get_rng_state()
    for write in (arms.truncated_normal_, arms.uniform_values_, arms.semi_orthogonal_, arms.impulse_):
        weights: list[Tensor] = []
        for seed in (1, 1, 2):
            model = vit()
            torch.random.set_rng_state(state)
            write(model, generator=seeded(seed))
            assert torch.equal(torch.random.get_rng_state(), state)
            weights.append(model.blocks[1].attn.qkv.weight.detach())
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_products_of_the_impulse_have_the_heads_rank() -> None:
    model = vit()
    arms.impulse_(model, generator=seeded())
    q, k, _ = model.blocks[0].attn.qkv.weight.detach().chunk(3)
    assert all(int(torch.linalg.matrix_rank(product)) <= 32 for product in head_products(q, k, 3))


def test_the_impulse_leaves_no_dimension_of_a_head_dead() -> None:
    model = vit(img_size=16)  # sixteen positions: the heads have 32 dimensions and need 15
    arms.impulse_(model, generator=seeded())
    weight = model.blocks[0].attn.qkv.weight
    model(torch.randn(4, 1, 16, 16, generator=seeded())).square().sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad.norm(dim=1) > 0).all())


def test_doctor_takes_an_identity_beside_drawn_rows_for_no_fault() -> None:
    model = vit()
    arms.semi_orthogonal_(model, generator=seeded())
    assert "pinned" not in {finding.check for finding in espalier.diagnose(model).findings}
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.view(-1)[::1000] = 1.0  # entries at a bound among others
    assert "pinned" in {finding.check for finding in espalier.diagnose(model).findings}
