"""A module's two attention products, read out of its own forward pass and never out of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import espalier
from espalier.init.layouts import AttentionWeights, find_layers

# A forward pass that returns the layer's linear output (B, L, d) and its attention maps (B, H, L, L).
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def query_key_products(run: Run, dim: int, scale: float) -> Tensor:
    """Return W_Q W_Kᵀ of every head, (H, d, d).

    The sequence is e₁ … e_d, 0. Its logits are those of the product, and log-ratios of a row's probabilities are
    differences of logits: those to the last, which is zero without biases.
    """
    x = torch.cat([torch.eye(dim), torch.zeros(1, dim)])[None].double()
    logs = run(x)[1][0].double().log()
    return (logs[:, :dim, :dim] - logs[:, :dim, dim:]) / scale


def value_output_product(run: Run, dim: int) -> Tensor:
    """Return W_V W_proj, (d, d): with one token every map is 1, so rows of the identity come out as its rows."""
    return run(torch.eye(dim)[:, None].double())[0][:, 0]


def views_of(module: nn.Module) -> AttentionWeights:
    """Return the one self-attention that the layouts find in a module."""
    found = [weights for _, _, weights in find_layers(module) if isinstance(weights, AttentionWeights)]
    assert len(found) == 1, list(find_layers(module))
    return found[0]


@torch.no_grad()
def check_attention(
    module: nn.Module,
    run: Run,
    dim: int,
    heads: int,
    groups: int | None = None,
    width: int | None = None,
    scale: float | None = None,
) -> None:
    """Assert that a float64 module's views mean what they say, and that ``structure_`` puts the products there.

    First every view gets weights of its own, and the forward pass must show exactly their products: this tells order,
    orientation, heads and groups apart. Then, without noise, ``structure_`` must make x W_V W_proj a multiple of x and
    each head's W_Q W_Kᵀ a multiple of a projection.
    """
    width, groups = width or dim // heads, groups or heads
    scale = scale or width**-0.5
    generator = torch.Generator().manual_seed(0)
    views = views_of(module)
    assert (views.num_heads, views.num_kv_heads) == (heads, groups)
    for bias in views.biases:
        bias.zero_()
    for part in (views.q, views.k, views.v, views.out):
        part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64) / dim**0.5)
    q_HKD = views.q.reshape(heads, width, dim)
    k_HKD = views.k.reshape(groups, width, dim).repeat_interleave(heads // groups, 0)
    v_HKD = views.v.reshape(groups, -1, dim).repeat_interleave(heads // groups, 0)
    # Several libraries take the softmax in float32 whatever the type.
    torch.testing.assert_close(query_key_products(run, dim, scale), q_HKD.mT @ k_HKD, atol=1e-4, rtol=0)
    torch.testing.assert_close(value_output_product(run, dim), v_HKD.flatten(0, 1).T @ views.out.T)

    for bias in views.biases:
        bias.fill_(0.3)
    strengths = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))
    espalier.structure_(module, attention=strengths, depthwise=None, generator=generator)
    # Products of rank k: without noise they are 0.7 and −0.4 times projections, of full rank where values have d rows.
    # Scores get what was asked over √k, whatever the layer itself divides by.
    products = [(0.7, width, head) for head in query_key_products(run, dim, width**-0.5)]
    products.append((-0.4, min(groups * width, dim), value_output_product(run, dim)))
    for strength, rank, product in products:
        projection = product / strength
        torch.testing.assert_close(projection @ projection, projection, atol=1e-4, rtol=0)
        torch.testing.assert_close(projection, projection.T, atol=1e-4, rtol=0)
        assert abs(float(projection.trace()) - rank) < 1e-3
