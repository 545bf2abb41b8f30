"""Faults of what surrounds the weights: loading, tying, freezing, optimisers; and those that only a batch shows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import espalier
from doctor.corpus.case import case
from doctor.corpus.memory import mlp, vit


class LanguageModel(nn.Module):
    """Embedding, norm and head, with what transformers' models say of themselves."""

    def __init__(self, tie: bool = True, vocabulary: int = 256, width: int = 64) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        settings = {"vocab_size": vocabulary, "tie_word_embeddings": True}
        self.config = SimpleNamespace(**settings, to_dict=lambda: settings)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, (B, L, vocabulary)."""
        return self.lm_head(self.norm(self.embed_tokens(ids)))


@case("huggingface/transformers#46620", "overwritten", "0.weight")
def from_pretrained_redraws_a_custom_class_after_loading(fault: bool) -> dict[str, Any]:
    model = mlp()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fault:
        nn.init.normal_(model[0].weight, std=0.02)
    return {"model": model, "against": stored}


@case("huggingface/transformers#17370", "structure", "blocks.1.attn")
def a_late_init_weights_undoes_what_was_written(fault: bool) -> dict[str, Any]:
    model = vit()
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    if fault:
        nn.init.trunc_normal_(model.blocks[1].attn.qkv.weight, std=0.02)
        nn.init.trunc_normal_(model.blocks[1].attn.proj.weight, std=0.02)
    return {"model": model, "against": report}


@case("huggingface/transformers#43429", "tied", "lm_head.weight")
def a_head_that_the_configuration_ties_has_weights_of_its_own(fault: bool) -> dict[str, Any]:
    return {"model": LanguageModel(tie=not fault)}


@case("huggingface/transformers#3532", "optimizer", "embed_tokens.weight")
def the_embedding_is_resized_after_the_optimizer_was_made(fault: bool) -> dict[str, Any]:
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if fault:
        model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(torch.randn(260, 64) * 0.02)
    return {"model": model, "optimizer": optimizer}


@case("open-mmlab/OpenPCDet#960", "optimizer", "scale")
def a_parameter_outside_leaf_modules_is_in_no_group(fault: bool) -> dict[str, Any]:
    model = mlp()
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    leaves = [p for m in model.modules() if not list(m.children()) for p in m.parameters(recurse=False)]
    return {"model": model, "optimizer": torch.optim.Adam(leaves if fault else model.parameters(), lr=1e-3)}


@case("hpcaitech/ColossalAI#5539", "optimizer", "2.weight")
def the_optimizer_holds_parameters_from_before_sharding(fault: bool) -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if fault:
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    return {"model": model, "optimizer": optimizer}


@case("RUCAIBox/RecBole#2027", "frozen", "")
def everything_is_frozen(fault: bool) -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model.requires_grad_(not fault), "optimizer": optimizer}


@case("syncdoth/RetNet#31", "loss", "")
def an_embedding_of_standard_deviation_one_is_the_head_too(fault: bool) -> dict[str, Any]:
    model = LanguageModel()
    nn.init.normal_(model.embed_tokens.weight, std=1.0 if fault else 0.02)
    return {"model": model, "example": torch.arange(64).reshape(4, 16)}


@case("", "loss", "")
def a_classifier_whose_logits_are_far_too_large(fault: bool) -> dict[str, Any]:
    model = vit()
    nn.init.normal_(model.head.weight, std=20.0 if fault else 0.02)
    return {"model": model, "example": (torch.randn(4, 1, 8, 8), torch.arange(4))}


@case("facebookresearch/dlrm#358", "dead-units", "1")
def large_negative_biases_before_a_rectifier(fault: bool) -> dict[str, Any]:
    model = mlp()
    nn.init.constant_(model[0].bias, -30.0 if fault else 0.0)
    return {"model": model, "example": torch.randn(64, 16)}


@case("", "dead-units", "1", "warning")
def half_the_rectifiers_of_a_layer_are_dead(fault: bool) -> dict[str, Any]:
    model = mlp()
    if fault:
        model[0].bias.data[:20] = -30.0
    return {"model": model, "example": torch.randn(64, 16)}


@case("", "saturated", "1", "warning")
def inputs_in_the_hundreds_saturate_tanh(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    return {"model": model, "example": torch.randn(64, 16) * (300.0 if fault else 1.0)}


@case("", "activations", "5", "warning")
def residual_branches_that_triple_the_signal_at_every_layer(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    for layer in model:
        nn.init.normal_(layer.weight, std=(3.0 if fault else 1.0) / math.sqrt(32))
    return {"model": model, "example": torch.randn(16, 32)}


@case("", "activations", "7")
def a_deep_net_without_gain_loses_the_signal(fault: bool) -> dict[str, Any]:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    for layer in model:
        nn.init.normal_(layer.weight, std=(1e-3 if fault else 1.0) / math.sqrt(32))
    return {"model": model, "example": torch.randn(16, 32)}


@case("", "attention-entropy", "blocks.0.attn", "warning")
def attention_collapses_on_one_key(fault: bool) -> dict[str, Any]:
    model = vit()
    nn.init.normal_(model.blocks[0].attn.qkv.weight, std=3.0 if fault else 0.02)
    return {"model": model, "example": torch.randn(4, 1, 8, 8)}


class Branches(nn.Module):
    """Two layers, of which forward may forget one."""

    def __init__(self, forget: bool) -> None:
        super().__init__()
        self.used, self.spare, self.forget = nn.Linear(16, 4), nn.Linear(16, 4), forget

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4)."""
        return self.used(x) if self.forget else self.used(x) + self.spare(x)


@case("pytorch/pytorch#57776", "no-gradient", "spare.weight", "warning")
def a_layer_that_forward_does_not_use(fault: bool) -> dict[str, Any]:
    return {"model": Branches(fault), "example": (torch.randn(8, 16), torch.arange(8) % 4)}


class Root(nn.Module):
    """A distance that is zero, with a small number under its root or without."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.linear, self.floor = nn.Linear(16, 4), floor

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4)."""
        scores = self.linear(x)
        # The distance of equal points: its derivative is 0/0 without a floor.
        return scores + torch.sqrt((scores - scores).square() + self.floor)


@case("", "gradients", "linear.bias")
def the_gradient_of_a_distance_of_zero_is_nan(fault: bool) -> dict[str, Any]:
    return {"model": Root(0.0 if fault else 1e-3), "example": (torch.randn(8, 16), torch.arange(8) % 4)}


class Difference(nn.Module):
    """The logarithm of a small difference, which bfloat16 rounds to zero."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.linear, self.autocast = nn.Linear(16, 16), autocast
        nn.init.eye_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        with torch.autocast("cpu", enabled=self.autocast and torch.is_autocast_enabled("cpu"), dtype=torch.bfloat16):
            return torch.log((self.linear(x).float() - x).clamp_min(0))


@case("", "bfloat16", "linear_log")
def a_difference_vanishes_under_bfloat16(fault: bool) -> dict[str, Any]:
    model = nn.Module()
    model.linear_log = Difference(autocast=fault)
    model.forward = lambda x: model.linear_log(x)  # type: ignore[method-assign]
    return {"model": model, "example": torch.ones(8, 16)}
