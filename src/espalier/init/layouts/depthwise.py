"""Where depthwise filters live: any ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with one group a channel."""

from __future__ import annotations

from torch import nn

from espalier.init.filters.closed_form import is_depthwise
from espalier.init.layouts.registry import DepthwiseWeights, Found, Skipped, register_layout


@register_layout(nn.Conv1d)
@register_layout(nn.Conv2d)
@register_layout(nn.Conv3d)
def depthwise_convolution(module: nn.Module) -> Found | None:
    """Return a view of the filters, (channels, 1, *kernel), of a depthwise convolution; other ones are left alone."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not is_depthwise(module):
        return None
    if max(module.kernel_size) < 3 or 2 in module.kernel_size:
        return Skipped("depthwise", f"kernel {tuple(module.kernel_size)} has fewer than 3 taps along an axis")
    return DepthwiseWeights(module.weight.detach())
