"""Where each library keeps the weights: views that initialisers write to, one small file a library."""

# Each registers its layouts.
from espalier.init.layouts import by_name, latent, mamba, projections, torch_layers, transformers
from espalier.init.layouts.find import Layer, find_layers, locate_layers
from espalier.init.layouts.registry import (
    AttentionWeights,
    DepthwiseWeights,
    LatentAttentionWeights,
    Skipped,
    SSMWeights,
    register_guess,
    register_layout,
)

__all__ = [
    "AttentionWeights",
    "DepthwiseWeights",
    "LatentAttentionWeights",
    "Layer",
    "SSMWeights",
    "Skipped",
    "find_layers",
    "locate_layers",
    "register_guess",
    "register_layout",
]

del by_name, latent, mamba, projections, torch_layers, transformers
