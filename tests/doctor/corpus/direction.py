"""Noise off centre, along one direction or in repeated rows; tables and biases that drown what they are added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor.corpus.case import case
from doctor.corpus.memory import mlp, vit


@case("", "off-centre", "0.weight", "warning")
def a_weight_is_drawn_by_rand_where_randn_was_meant(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        model[0].weight.data = torch.rand_like(model[0].weight) * 0.2
    return {"model": model}


@case("", "one-direction", "blocks.1.mlp.0.weight")
def a_weight_is_the_outer_product_of_two_vectors(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        weight = model.blocks[1].mlp[0].weight
        weight.data = torch.randn(len(weight), 1) * torch.randn(weight.shape[1]) * 0.02
    return {"model": model}


@case("", "one-direction", "blocks.2.attn.qkv.weight", "warning")
def the_noise_drowns_in_one_row_that_all_share(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        weight = model.blocks[2].attn.qkv.weight
        weight.data.add_(torch.randn(weight.shape[1]) * 3 * weight.std())
    return {"model": model}


@case("", "equal-units", "blocks.0.attn.qkv.weight")
def every_head_of_a_group_is_a_copy_of_its_neighbour(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        weight = model.blocks[0].attn.qkv.weight
        weight.data = weight[::2].repeat_interleave(2, 0)
    return {"model": model}


@case("", "scale-of-inputs", "positions", "warning")
def positions_drown_the_patches(fault: bool) -> dict[str, Any]:
    model = vit()
    model.register_parameter("positions", nn.Parameter(torch.randn(1, 64, 48) * (20 if fault else 0.02)))
    return {"model": model}


@case("", "scale-of-inputs", "blocks.1.mlp.0.bias", "warning")
def a_bias_is_drawn_with_a_deviation_of_ten(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        nn.init.normal_(model.blocks[1].mlp[0].bias, std=10.0)
    return {"model": model}
