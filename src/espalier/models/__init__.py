"""Small readable models with timm's contract, by class and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from espalier.annotations import refuse_misfits
from espalier.errors import EspalierError, unknown_name
from espalier.lookup import errors_of, is_reference, load, without_pin
from espalier.models.convmixer import ConvMixer
from espalier.models.convmixer_family import CONVMIXERS, register_with_timm
from espalier.models.from_transformers import TransformersConvNext, TransformersViT
from espalier.models.lipschitz import KWLarge, OrthogonalConvNet
from espalier.models.sequence import SequenceModel
from espalier.models.vit import VisionTransformer

__all__ = [
    "MODELS",
    "ConvMixer",
    "KWLarge",
    "OrthogonalConvNet",
    "SequenceModel",
    "TransformersConvNext",
    "TransformersViT",
    "VisionTransformer",
    "build_model",
    "register_with_timm",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "convmixer": ConvMixer,
    **CONVMIXERS,
    "sequence": SequenceModel,
    "kwlarge": KWLarge,
    "orthogonal_convnet": OrthogonalConvNet,
    "transformers_convnext": TransformersConvNext,
    "transformers_vit": TransformersViT,
    "vit": VisionTransformer,
}


def build_model(name: str, /, **arguments: Any) -> nn.Module:
    """Build the model called ``name``.

    Args:
        name: a key of ``MODELS``, or a class or function of your own, ``FILE.py:NAME`` or ``package.module:NAME``.
        arguments: of its constructor. What the data fixes (``img_size``, ``in_chans``, ``num_classes``,
            ``vocab_size``) is dropped when the constructor has no such argument.

    Raises:
        EspalierError: an unknown model or argument; the message suggests the closest ones. Or a value of another type
            than the constructor states, a model that cannot be built from these arguments, or code of your own that
            returns no ``nn.Module``.
    """
    own = is_reference(name)
    if not own and name not in MODELS:
        raise unknown_name("model", name, MODELS)
    constructor = load("model", name) if own else MODELS[name]
    known = inspect.signature(constructor).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for argument in list(arguments):
        if argument not in known and not takes_any:
            if argument in ("img_size", "in_chans", "num_classes", "vocab_size"):
                del arguments[argument]
            else:
                raise unknown_name(f"argument of model {name!r}", argument, known)
    refuse_misfits(f"model {without_pin(name)!r}", constructor, arguments)
    given = "" if own else f" with {', '.join(f'{key} {value!r}' for key, value in arguments.items())}"
    with errors_of("model", f"{name}{given}"):
        model = constructor(**arguments)
    if not isinstance(model, nn.Module):
        raise EspalierError(f"model {name} returned {type(model).__name__}: return an nn.Module")
    return model
