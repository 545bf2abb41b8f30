"""Weights of the original repository's Cayley layers, read into ours as the same function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nn.orthogonal.conv import CayleyConv2d
from espalier.nn.orthogonal.spectrum.dft import counts, tap_angles


def load_original_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], images: Tensor) -> None:
    """Load ``weight``, ``bias`` and ``alpha`` of the original repository's layers into a model of ours.

    The original divides a kernel's spectrum by its norm over the half spectrum of *one* image size; ours divides a
    kernel by its own norm. ``α = α_original·‖w‖/‖ŵ‖`` makes both the same function at the size the net was trained at,
    which is all that the original can run at. (They train differently: the two α move at different relative speeds.)

    Args:
        model: ours, with the original's parameter names; its original stride-2 layers have half the kernel size.
        state_dict: the original's.
        images: (B, C, H, W) of the size that the net was trained at; they go through the model once, in evaluation.

    Raises:
        EspalierError: a convolution that the images do not reach, or an α or a weight that is missing or of another
            shape; images of an odd size or smaller than a kernel at some layer, where the original computes something
            else.

    Source: github.com/locuslab/orthogonal-convolutions.
    """
    sizes = _torus_sizes(model, images)
    converted = dict(state_dict)
    for name, size in sizes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, CayleyConv2d)
        prefix = f"{name}." if name else ""
        for key in (f"{prefix}weight", f"{prefix}alpha"):
            if key not in state_dict:
                raise EspalierError(f"state_dict has no {key!r}: name the model's layers as the original does")
            if not state_dict[key].is_floating_point():
                raise EspalierError(
                    f"{key} is {state_dict[key].dtype} there: the original's parameters are real numbers"
                )
        weight, alpha = state_dict[f"{prefix}weight"], state_dict[f"{prefix}alpha"]
        if weight.shape != layer.weight.shape:
            raise EspalierError(
                f"{prefix}weight is {tuple(weight.shape)} there and {tuple(layer.weight.shape)} here: give the layer "
                "its channels and kernel (the original halves the kernel of stride-2 layers)"
            )
        if alpha.numel() != 1:
            raise EspalierError(f"{prefix}alpha is {tuple(alpha.shape)} there: the original has one number a layer")
        _refuse_other_functions(name or "model", layer, size)
        converted[prefix + "alpha"] = (alpha.double() / _half_norm_ratio(weight, layer.dilation, size)).reshape(1)
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise EspalierError(f"state_dict does not fit the model: {' '.join(str(error).split())}") from error


def _refuse_other_functions(name: str, layer: CayleyConv2d, size: tuple[int, ...]) -> None:
    """Refuse sizes at which the original's layer is no orthogonal convolution of this kernel.

    Its FFT cuts a kernel off that exceeds the image, where ours wraps it around the torus; and its inverse transform
    returns an image of even width whatever came in.
    """
    if set(layer.dilation) != {1} or layer.padding_mode != "circular" or layer.stride not in ((1, 1), (2, 2)):
        raise EspalierError(f"{name} has a dilation, padding or stride that the original ignores: build it without")
    if any(k > n for k, n in zip(layer.kernel_size, size, strict=True)) or any(n % 2 for n in size):
        raise EspalierError(
            f"{name} sees images of {size} with a kernel of {layer.kernel_size}: the original is the same "
            "function only on even sizes that its kernel fits into; give images of the size it was trained at"
        )


@torch.no_grad()
def _torus_sizes(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the coarse image size that every convolution sees."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CayleyConv2d)}
    sizes: dict[str, tuple[int, ...]] = {}

    def note(name: str, layer: CayleyConv2d, inputs: tuple[Tensor, ...]) -> None:
        sizes[name] = tuple(n // s for n, s in zip(inputs[0].shape[2:], layer.stride, strict=True))

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if unseen := layers.keys() - sizes.keys():
        raise EspalierError(f"images do not pass through {sorted(unseen)[0]!r}: give images that reach every layer")
    return sizes


def _half_norm_ratio(weight: Tensor, dilation: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Return ‖ŵ‖/‖w‖ over the half spectrum, from the Gram matrix of the taps alone."""
    taps = weight.double().flatten(2).permute(2, 0, 1).flatten(1)
    offsets = [tuple(d * t for t in range(k)) for k, d in zip(weight.shape[2:], dilation, strict=True)]
    cos, sin, _ = tap_angles(size, offsets, torch.float64, weight.device)
    times = torch.tensor([n for n in counts(size) if n], dtype=torch.float64, device=weight.device)
    return ((taps @ taps.mT) * (cos.mT * times @ cos + sin.mT * times @ sin)).sum().sqrt() / taps.norm()
