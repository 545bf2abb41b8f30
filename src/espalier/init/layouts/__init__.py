"""Where each library keeps the weights: views that initialisers write to, one small file a host."""

from espalier.init.layouts import depthwise, own, torch_attention  # each registers its layouts
from espalier.init.layouts.registry import (
    AttentionWeights,
    DepthwiseWeights,
    Skipped,
    find_layers,
    register_layout,
)

__all__ = ["AttentionWeights", "DepthwiseWeights", "Skipped", "find_layers", "register_layout"]

del depthwise, own, torch_attention
