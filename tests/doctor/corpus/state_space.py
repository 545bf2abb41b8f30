"""State-space layers whose decay or step size was overwritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor.corpus.case import case
from espalier.models import SequenceModel


def mamba(pattern: str = "mamba2*2") -> SequenceModel:
    """Return two narrow state-space blocks."""
    return SequenceModel(32, 32, pattern, state_size=8, head_dim=8)


@case("fla-org/flash-linear-attention#753", "state-space", "layers.0.mixer.dt_bias", "warning")
def dt_bias_stays_zero_when_sharded_tensors_are_skipped(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        nn.init.zeros_(model.layers[0].mixer.dt_bias)
    return {"model": model}


@case("", "state-space", "layers.1.mixer.A_log")
def A_log_is_all_zero_on_several_GPUs(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        nn.init.zeros_(model.layers[1].mixer.A_log)
    return {"model": model}


@case("", "state-space", "layers.0.mixer.A_log")
def A_log_is_1e30_on_several_GPUs(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        model.layers[0].mixer.A_log.data[::2] = 1e30
    return {"model": model}


@case("", "state-space", "layers.0.mixer.dt_bias")
def dt_bias_is_minus_1e30_on_several_GPUs(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        model.layers[0].mixer.dt_bias.data.fill_(-1e30)
    return {"model": model}


@case("fla-org/flash-linear-attention#739", "state-space", "layers.0.mixer.dt_bias", "warning")
def a_Mamba_2_start_without_its_draw_of_step_sizes(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        nn.init.ones_(model.layers[0].mixer.dt_bias)
    return {"model": model}


@case("huggingface/transformers#43717", "state-space", "mixer.dt_bias", "warning")
def a_mixer_used_alone_keeps_step_biases_of_one(fault: bool) -> dict[str, Any]:
    model = nn.Module()
    model.mixer = mamba().layers[0].mixer
    if fault:
        nn.init.ones_(model.mixer.dt_bias)
    return {"model": model}


@case("athms/mad-lab#3", "state-space", "layers.0.mixer.dt_proj.bias", "warning")
def a_wrapper_zeroes_the_bias_of_every_linear_layer(fault: bool) -> dict[str, Any]:
    model = mamba("mamba1*2")
    for module in model.modules():
        if fault and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return {"model": model}


@case("hustvl/Vim#19", "state-space", "layers.1.mixer.dt_proj.bias", "warning")
def a_vision_backbone_redraws_the_mixers_it_was_given(fault: bool) -> dict[str, Any]:
    model = mamba("mamba1*2")

    def init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0)

    return {"model": model.apply(init_weights) if fault else model}


@case("", "state-space", "layers.0.mixer.conv1d.weight")
def the_convolution_before_the_state_is_zero(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        nn.init.zeros_(model.layers[0].mixer.conv1d.weight)
    return {"model": model}


@case("huggingface/transformers#45591", "overwritten", "layers.0.mixer.dt_bias")
def dt_bias_is_redrawn_after_the_checkpoint_was_loaded(fault: bool) -> dict[str, Any]:
    model = mamba()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fault:
        nn.init.uniform_(model.layers[0].mixer.dt_bias, -6, -2)
    return {"model": model, "against": stored}


@case("", "state-space", "layers.1.mixer.A_log", "warning")
def a_decay_that_underflows_to_never_forgetting(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        model.layers[1].mixer.A_log.data[0] = torch.tensor(1e-5).log()
    return {"model": model}


@case("", "state-space", "layers.0.mixer.D", "warning")
def the_skip_is_zeroed_with_everything_that_is_no_matrix(fault: bool) -> dict[str, Any]:
    model = mamba()
    if fault:
        nn.init.zeros_(model.layers[0].mixer.D)
    return {"model": model}


@case("", "state-space", "layers.1.mixer.D")
def the_skip_holds_what_the_memory_held(fault: bool) -> dict[str, Any]:
    model = mamba("mamba1*2")
    if fault:
        model.layers[1].mixer.D.data[::3] = 4e9
    return {"model": model}
