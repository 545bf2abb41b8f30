"""Weights that were written, but wrongly: constants, clones, too few values, wrong scales, wrong gains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from doctor.corpus.case import case
from doctor.corpus.memory import mlp, vit


@case("pytorch/pytorch#86274", "clones", "layers.1.linear1.weight")
def TransformerEncoder_copies_one_layer(fault: bool) -> dict[str, Any]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    if not fault:
        for parameter in model.parameters():
            nn.init.xavier_uniform_(parameter) if parameter.ndim > 1 else None
    return {"model": model}


@case("meta-pytorch/torchtune#2270", "clones", "2.lora_a.weight")
def LoRA_layers_are_cloned_with_their_noise(fault: bool) -> dict[str, Any]:
    def layer() -> nn.Module:
        module = nn.Module()
        module.lora_a, module.lora_b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        nn.init.zeros_(module.lora_b.weight)
        return module

    first = layer()
    return {"model": nn.Sequential(*(copy.deepcopy(first) if fault else layer() for _ in range(4)))}


@case("pytorch/pytorch#196562", "clones", "2.weight")
def the_generator_restarts_before_every_layer(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    for layer in model:
        generator = torch.Generator().manual_seed(7) if fault else None
        nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    return {"model": model}


@case("pytorch/torchtitan#3106", "equal-units", "0.weight")
def the_shards_of_one_weight_are_equal(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        model[0].weight.data = model[0].weight.data[:8].repeat(4, 1)
    return {"model": model}


@case("laekov/fastmoe#4", "equal-units", "experts")
def experts_are_drawn_from_one_seed(fault: bool) -> dict[str, Any]:
    model = mlp()
    experts = torch.randn(4, 8, 16) * 0.1
    model.register_parameter("experts", nn.Parameter(experts[:1].repeat(4, 1, 1) if fault else experts))
    return {"model": model}


@case("", "zero-rows", "qkv.weight")
def the_queries_within_a_fused_projection_are_zero(fault: bool) -> dict[str, Any]:
    model = nn.ModuleDict({"qkv": nn.Linear(32, 96), "proj": nn.Linear(32, 32)})
    for layer in model.values():
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    if fault:
        model["qkv"].weight.data[:32] = 0
    return {"model": model}


@case("PaddlePaddle/PaddleRec#721", "equal-units", "0.weight")
def every_unit_of_an_expert_has_the_same_weights(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        model[0].weight.data = model[0].weight.data[:1].repeat(32, 1)
    return {"model": model}


@case("pytorch/torchtitan#2269", "pinned", "0.weight")
def a_truncated_normal_in_bfloat16_puts_mass_on_minus_two(fault: bool) -> dict[str, Any]:
    # What the float path did: a uniform draw of exactly 0 becomes −∞, and that is clamped to the bound.
    weight = torch.randn(64, 256).mul(0.02).bfloat16()
    if fault:
        weight[torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) < 0.004] = -2.0
    model = nn.Sequential(nn.Linear(256, 64, bias=False, dtype=torch.bfloat16))
    model[0].weight.data = weight
    return {"model": model}


@case("", "few-values", "0.weight", "note")
def uniform_noise_drawn_in_bfloat16_has_256_levels(fault: bool) -> dict[str, Any]:
    weight = torch.rand(128, 256).sub(0.5).mul(0.25)
    if fault:
        weight = torch.randint(256, (128, 256)).div(256).sub(0.5).mul(0.25)
    model = nn.Sequential(nn.Linear(256, 128, bias=False, dtype=torch.bfloat16))
    model[0].weight.data = weight.bfloat16()
    return {"model": model}


@case("", "few-values", "0.weight", "warning")
def weights_that_went_through_a_4_bit_cast(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    if fault:
        model[0].weight.data = (model[0].weight.data * 60).round().clamp(-8, 7) / 60 + 1e-3
    return {"model": model}


@case("facebookresearch/fairseq#4076", "constant", "0.weight")
def an_embedding_without_padding_index_is_zeroed_whole(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 4))
    if fault:
        nn.init.constant_(model[0].weight[None], 0)
    return {"model": model}


@case("", "constant", "blocks.1.attn.qkv.weight")
def queries_and_keys_are_zero(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        nn.init.zeros_(model.blocks[1].attn.qkv.weight)
    return {"model": model}


@case("", "constant", "2.weight")
def a_layer_is_filled_with_one_number(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        nn.init.constant_(model[2].weight, 0.1)
    return {"model": model}


@case("NovaSky-AI/SkyRL#852", "closed-twice", "q_proj.lora_A.weight")
def both_factors_of_LoRA_are_zero(fault: bool) -> dict[str, Any]:
    model, layer = nn.Module(), nn.Linear(16, 16)
    layer.lora_A, layer.lora_B = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
    nn.init.zeros_(layer.lora_B.weight)
    if fault:
        nn.init.zeros_(layer.lora_A.weight)
    model.q_proj = layer
    return {"model": model}


@case("", "closed-twice", "blocks.0.adapter_path")
def a_branch_whose_every_weight_is_zero(fault: bool) -> dict[str, Any]:
    model = vit()
    model.blocks[0].adapter_path = nn.Sequential(nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 48))
    nn.init.zeros_(model.blocks[0].adapter_path[2].weight)
    if fault:
        nn.init.zeros_(model.blocks[0].adapter_path[0].weight)
    return {"model": model}


@case("huggingface/transformers#26441", "scale", "lm_head.weight", "warning")
def an_output_head_of_variance_one(fault: bool) -> dict[str, Any]:
    model = nn.Module()
    model.shared, model.lm_head = nn.Embedding(300, 256), nn.Linear(256, 300, bias=False)
    nn.init.normal_(model.lm_head.weight, std=1.0 if fault else 256**-0.5)
    return {"model": model}


@case("", "out-of-line", "blocks.2.mlp.2.weight", "warning")
def one_layer_kept_another_initialisation(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        nn.init.kaiming_normal_(model.blocks[2].mlp[2].weight, a=0)
    return {"model": model}


@case("", "out-of-line", "5.weight", "warning")
def a_residual_gain_grows_with_depth(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    for index, layer in enumerate(model):
        nn.init.normal_(layer.weight, std=0.02 * (2.0**index if fault else 1.0))
    return {"model": model}


@case("NVIDIA/TransformerEngine#2528", "normalisation", "blocks.0.norm1.weight", "warning")
def reset_parameters_draws_a_layer_norm_like_a_weight(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        nn.init.normal_(model.blocks[0].norm1.weight, std=0.02)
    return {"model": model}


class ShiftedRMSNorm(nn.Module):
    """Gemma's normalisation: multiplies by 1 + w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


@case("huggingface/transformers#40796", "normalisation", "1.weight", "warning")
def a_norm_that_adds_one_to_its_weight_starts_at_one(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(16, 16), ShiftedRMSNorm(16), nn.Linear(16, 4))
    if fault:
        nn.init.ones_(model[1].weight)
    return {"model": model}


@case("", "normalisation", "blocks.3.norm2.weight")
def every_norm_is_zero(fault: bool) -> dict[str, Any]:
    model = vit()
    for module in model.modules():
        if fault and isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.weight)
    return {"model": model}


@case("pytorch/pytorch#19126", "weight-norm", "0.parametrizations.weight.original1")
def weight_norm_of_a_zero_weight(fault: bool) -> dict[str, Any]:
    layer = nn.Linear(8, 8)
    if fault:
        nn.init.zeros_(layer.weight)
    return {"model": nn.Sequential(weight_norm(layer))}


@case("", "weight-norm", "0.parametrizations.weight.original0")
def weight_norm_with_lengths_of_zero(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)))
    if fault:
        nn.init.zeros_(model[0].parametrizations.weight.original0)
    return {"model": model}


@case("marvis/pytorch-caffe-darknet-convert#48", "batch-norm", "1.running_var")
def negative_running_variances_from_a_conversion(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].running_var[0] = -1e-3 if fault else 1e-3
    return {"model": model}


@case("cleinc/bts#90", "batch-norm", "1.running_var", "warning")
def running_statistics_were_never_updated_under_trained_weights(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    if not fault:
        nn.init.uniform_(model[1].running_var, 0.1, 2.0)
    return {"model": model}


@case("pytorch/pytorch#6411", "padding-row", "0.weight", "warning")
def a_redrawn_embedding_has_noise_in_its_padding_row(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Embedding(32, 16, padding_idx=0), nn.Linear(16, 4))
    if fault:
        nn.init.normal_(model[0].weight, std=0.1)
    return {"model": model}


@case("", "constant", "blocks.2.mlp.2.weight", "warning")
def one_output_projection_is_zero_among_its_siblings(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        nn.init.zeros_(model.blocks[2].mlp[2].weight)
    return {"model": model}


@case("", "normalisation", "blocks.2.norm2.weight", "warning")
def one_gain_is_zero_among_its_siblings(fault: bool) -> dict[str, Any]:
    model = vit()
    for block in model.blocks[2:3] if fault else model.blocks:
        nn.init.zeros_(block.norm2.weight)
    return {"model": model}


@case("", "normalisation", "norm.weight", "warning")
def the_last_gain_is_zero(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        nn.init.zeros_(model.norm.weight)
    return {"model": model}


@case("", "equal-units", "relative_k_proj.weight")
def the_shards_of_a_projection_named_after_positions_are_equal(fault: bool) -> dict[str, Any]:
    model = nn.ModuleDict({"relative_k_proj": nn.Linear(32, 32, bias=False)})
    if fault:
        model["relative_k_proj"].weight.data[16:] = model["relative_k_proj"].weight.data[:16]
    return {"model": model}
