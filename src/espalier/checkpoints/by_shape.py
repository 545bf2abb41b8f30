"""A checkpoint without its code: modules made from the names and shapes of its tensors, so that layouts can read it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init.layouts.registry import BareCheckpoint

# What a state-space mixer keeps outside its layers.
_BARE = ("A_log", "dt_bias")
# Modules inside each other, which torch walks by recursion; no model is near it.
_DEEPEST = 100


def skeleton(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> nn.Module:
    """Return modules that hold a checkpoint's tensors under its names: enough to ``audit`` and ``fit``, not to run.

    Matrices become linear layers and filters with one input channel become depthwise convolutions; a fused
    ``in_proj_weight`` becomes a layer ``qkv``, and a ``c_attn`` of shape (d, 3d) is taken for GPT-2's transposed one.
    Attention and state-space mixers are then found by their names. Shapes cannot tell a grey-scale patch embedding
    from a depthwise convolution.

    Args:
        tensors: a state dictionary; storage is shared, nothing is copied.
        num_heads: query heads of every attention layer; without it attention is found and skipped. Key heads follow
            from the shapes.

    Raises:
        EspalierError: a name of more than a hundred dots.
    """
    root = BareCheckpoint()
    for name, tensor in tensors.items():
        if name.count(".") > _DEEPEST:
            raise EspalierError(f"tensor {name[:40]}… has {name.count('.')} dots in its name: no checkpoint of a model")
        path, _, leaf = name.rpartition(".")
        if leaf == "in_proj_weight":
            path, leaf = f"{path}.qkv".lstrip("."), "weight"
        if leaf == "weight":
            parent, _, child = path.rpartition(".")
            fused = tensors.get(f"{parent}.c_attn.weight") if child in ("c_attn", "c_proj") else None
            transposed = fused is not None and fused.ndim == 2 and fused.shape[1] == 3 * fused.shape[0]
            siblings = _at(root, parent)._modules
            layer = _layer(tensor, tensors.get(f"{path}.bias"), transposed)
            layer._modules.update(getattr(siblings.get(child), "_modules", {}))
            siblings[child or "weight"] = layer
        elif leaf in _BARE:
            # Not registered: a module may have the same name, and whatever a file says must not raise here.
            _at(root, path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for module in root.modules():
        if num_heads and not isinstance(module, nn.Linear):
            vars(module)["num_heads"] = num_heads  # also where a part has that name
    return root


def _at(root: nn.Module, path: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    return module


def _layer(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    layer: nn.Module = nn.Module()
    if not weight.is_floating_point() or not weight.numel():
        layer.register_buffer("weight", weight)
        return layer
    if weight.ndim in (3, 4, 5) and weight.shape[1] == 1 and len(weight) > 1:
        convolution: type[nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
        channels = len(weight)
        layer = convolution(channels, channels, tuple(weight.shape[2:]), groups=channels, device="meta")
    elif weight.ndim == 2 and not transposed:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    if transposed:
        layer.nf = weight.shape[-1]  # type: ignore[assignment]
    return layer
