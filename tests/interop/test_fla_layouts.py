"""Layouts of flash-linear-attention on its real classes; their kernels need a GPU, so the maps are run one by one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.init import Mimetic, MimeticSSM
from espalier.init.layouts import AttentionWeights, SSMWeights, find_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    fla = pytest.importorskip("fla.layers")

DIM = 64


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def product(first: nn.Linear, second: nn.Linear, heads: int) -> Tensor:
    """Return every head's ``(x W_Q)·(y W_K)`` for all pairs of unit tokens, out of the layers' forward passes."""
    unit = torch.eye(DIM)
    q, k = (layer(unit).unflatten(-1, (heads, -1)).transpose(0, 1) for layer in (first, second))
    return q @ k.mT


@pytest.mark.parametrize(
    ("name", "arguments", "heads", "note"),
    [
        ("GatedLinearAttention", {"num_heads": 4}, 4, "forgets by a gate"),
        ("GatedDeltaNet", {"num_heads": 2, "head_dim": 16}, 2, "short convolutions"),
        ("LinearAttention", {"num_heads": 4}, 4, ""),
    ],
)
def test_linear_attention_gets_both_products(name: str, arguments: dict[str, int], heads: int, note: str) -> None:
    module = getattr(fla, name)(hidden_size=DIM, **arguments)
    [row] = espalier.structure_(module, attention=Mimetic(qk=(0.0, 0.9), vo=(0.0, -0.5)), generator=seeded()).layers
    assert row.status == "written"
    assert note in row.note
    assert "guessed" not in row.note
    [(_, _, found)] = list(find_layers(module))
    assert isinstance(found, AttentionWeights)
    rank = module.q_proj.out_features // heads
    for head in product(module.q_proj, module.k_proj, heads):
        # The best approximation of 0.9·I in that rank is 0.9 times a projection.
        values = torch.linalg.svdvals(head)
        assert torch.allclose(values[:rank], torch.full((rank,), 0.9), atol=1e-4)
        assert torch.allclose(head, head.mT, atol=1e-4)
    through = module.o_proj(module.v_proj(torch.eye(DIM)))
    assert torch.allclose(through, -0.5 * torch.eye(DIM), atol=1e-4)


def test_grouped_queries_of_gated_linear_attention() -> None:
    module = fla.GatedLinearAttention(hidden_size=DIM, num_heads=4, num_kv_heads=2)
    [row] = espalier.structure_(module, generator=seeded()).layers
    assert row.status == "written"
    assert row.measured["qk_diagonal"] > 0.1


def test_mamba2_has_the_references_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = fla.Mamba2(hidden_size=DIM, num_heads=4, head_dim=32, state_size=16, n_groups=2)
    [row] = espalier.structure_(module, ssm=MimeticSSM(convolution=True), generator=seeded()).layers
    assert (row.kind, row.status) == ("ssm", "written")
    [(_, _, found)] = list(find_layers(module))
    assert isinstance(found, SSMWeights)
    assert found.groups == 2
    # Rows of in_proj, in the order that the class's forward pass splits them: z, x, B, C, Δ.
    _, _, b, c, _ = module.in_proj(torch.eye(DIM)).split([128, 128, 32, 32, 4], dim=-1)
    assert torch.allclose(b, c)
    assert torch.allclose(module.A_log, torch.full((4,), -8.0))
    x = torch.randn(1, len(module.conv1d.weight), 7, generator=seeded())
    assert torch.allclose(module.conv1d(x)[..., :7], x, atol=1e-6)
