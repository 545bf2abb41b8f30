"""Tensors that nobody wrote, or that hold nothing: empty memory, meta device, NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor.corpus.case import case, garbage
from espalier.models import SequenceModel, VisionTransformer


def mlp() -> nn.Sequential:
    """Return three linear layers."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def vit() -> VisionTransformer:
    """Return a vision transformer of four narrow blocks."""
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=3)


@case("huggingface/transformers#47831", "not-finite", "layers.1.mixer.A_log")
def A_log_is_minus_infinity_from_a_bfloat16_draw_that_hits_zero(fault: bool) -> dict[str, Any]:
    model = SequenceModel(32, 32, "mamba2*2", state_size=8, head_dim=8)
    decay = torch.rand(8).mul(15).add(1)
    decay[3] = 0.0 if fault else 0.5
    model.layers[1].mixer.A_log.data = decay.bfloat16().log()
    return {"model": model}


@case("huggingface/transformers#35437", "uninitialised", "head.weight")
def a_layer_missing_from_the_checkpoint_stays_allocated_memory(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        model.head.weight.data = garbage(*model.head.weight.shape)
    return {"model": model}


@case("sauradip/STALE#16", "uninitialised", "background")
def a_parameter_made_with_torch_empty(fault: bool) -> dict[str, Any]:
    model = mlp()
    model.register_parameter("background", nn.Parameter(garbage(1, 64) if fault else torch.randn(1, 64)))
    return {"model": model}


@case("FeiGSSS/DySAT_pytorch#3", "not-finite", "attention")
def a_parameter_made_with_torch_Tensor_holds_nan(fault: bool) -> dict[str, Any]:
    model = mlp()
    values = torch.randn(1, 4, 8)
    values[0, 1, 2] = torch.nan if fault else 0.1
    model.register_parameter("attention", nn.Parameter(values))
    return {"model": model}


@case("huggingface/transformers#42418", "not-finite", "0.weight")
def weights_of_a_custom_layer_turn_to_nan_after_post_init(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        model[0].weight.data.fill_(torch.nan)
    return {"model": model}


@case("fla-org/flash-linear-attention#156", "uninitialised", "layers.0.mixer.in_proj.weight")
def a_model_from_the_meta_device_whose_initialiser_skips_a_layer(fault: bool) -> dict[str, Any]:
    model = SequenceModel(32, 32, "mamba2*2", state_size=8, head_dim=8)
    if fault:
        weight = model.layers[0].mixer.in_proj.weight
        weight.data = garbage(*weight.shape)
    return {"model": model}


@case("pytorch/pytorch#24263", "uninitialised", "2.weight")
def huge_numbers_left_by_torch_empty(fault: bool) -> dict[str, Any]:
    model = mlp()
    model[2].weight.data[0, 0] = 1.8361e25 if fault else 0.1
    return {"model": model}


@case("deepspeedai/Megatron-DeepSpeed#193", "empty", "0.weight")
def ZeRO_3_leaves_an_empty_tensor_where_the_initialiser_looks(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 4))
    if fault:
        model[0].weight.data = torch.empty(0)
    return {"model": model}


@case("haotian-liu/LLaVA#302", "empty", "2.weight")
def a_projection_is_empty_on_every_rank(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        model[2].weight.data = torch.empty(0, dtype=torch.float16)
    return {"model": model}


@case("johahi/borzoi-pytorch#21", "empty", "positions")
def a_buffer_stays_on_the_meta_device_after_loading(fault: bool) -> dict[str, Any]:
    model = mlp()
    model.register_buffer("positions", torch.ones(4, 8, device="meta" if fault else "cpu"), persistent=False)
    return {"model": model}


@case("", "empty", "0.weight")
def a_whole_model_that_was_never_materialised(fault: bool) -> dict[str, Any]:
    with torch.device("meta" if fault else "cpu"):
        return {"model": mlp()}


@case("mosaicml/llm-foundry#1745", "not-finite", "blocks.2.norm1.weight")
def normalisation_skipped_by_init_weights_after_the_meta_device(fault: bool) -> dict[str, Any]:
    model = vit()
    if fault:
        model.blocks[2].norm1.weight.data.fill_(torch.nan)
    return {"model": model}


@case("huggingface/transformers#45902", "positions", "rotary.inv_freq")
def rotary_frequencies_are_what_to_empty_left(fault: bool) -> dict[str, Any]:
    model, rotary = mlp(), nn.Module()
    frequencies = garbage(16) if fault else 10_000.0 ** -torch.arange(0, 1, 1 / 16)
    rotary.register_buffer("inv_freq", frequencies, persistent=False)
    model.add_module("rotary", rotary)
    return {"model": model}


@case("pytorch/torchtitan#4783", "positions", "rotary.inv_freq")
def rotary_frequencies_are_zero_after_to_empty(fault: bool) -> dict[str, Any]:
    model, rotary = mlp(), nn.Module()
    frequencies = torch.zeros(16) if fault else 10_000.0 ** -torch.arange(0, 1, 1 / 16)
    rotary.register_buffer("inv_freq", frequencies, persistent=False)
    model.add_module("rotary", rotary)
    return {"model": model}


@case("huggingface/transformers#34234", "positions", "rotary.inv_freq")
def rotary_frequencies_hold_weights_that_lay_there_before(fault: bool) -> dict[str, Any]:
    model, rotary = mlp(), nn.Module()
    frequencies = torch.randn(16) if fault else 10_000.0 ** -torch.arange(0, 1, 1 / 16)
    rotary.register_buffer("inv_freq", frequencies, persistent=False)
    model.add_module("rotary", rotary)
    return {"model": model}


@case("macwiatrak/Bacformer#33", "positions", "freqs_cos")
def cached_cosines_are_garbage_after_from_pretrained(fault: bool) -> dict[str, Any]:
    model = mlp()
    angles = torch.arange(8)[:, None] * 10_000.0 ** -torch.arange(0, 1, 1 / 8)
    cosines = angles.cos()
    cosines[2, 3] = -3.1e8 if fault else 0.5
    model.register_buffer("freqs_cos", cosines, persistent=False)
    return {"model": model}


@case("pytorch/pytorch#112012", "positions", "embeddings.position_ids")
def position_ids_are_garbage_after_the_meta_device(fault: bool) -> dict[str, Any]:
    model, embeddings = mlp(), nn.Module()
    ids = torch.arange(16)[None]
    embeddings.register_buffer("position_ids", ids * 140_000_000_000 if fault else ids)
    model.add_module("embeddings", embeddings)
    return {"model": model}


@case("huggingface/transformers#48892", "uninitialised", "table")
def a_computed_buffer_is_replaced_by_allocated_memory(fault: bool) -> dict[str, Any]:
    model = mlp()
    table = garbage(8, 8)
    table[3, 3] = 4.7e30
    model.register_buffer("table", table if fault else torch.linspace(0, 1, 64).reshape(8, 8), persistent=False)
    return {"model": model}
