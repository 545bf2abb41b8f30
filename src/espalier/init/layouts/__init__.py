"""Where each library keeps the weights: views that initialisers write to, one small file a host."""

from espalier.init.layouts import depthwise, mamba, own, torch_attention  # each registers its layouts
from espalier.init.layouts.registry import (
    AttentionWeights,
    DepthwiseWeights,
    Skipped,
    SSMWeights,
    find_layers,
    register_layout,
)

__all__ = ["AttentionWeights", "DepthwiseWeights", "SSMWeights", "Skipped", "find_layers", "register_layout"]

del depthwise, mamba, own, torch_attention
