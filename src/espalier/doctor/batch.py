"""The batch that the probe runs: a user's, brought into one form, or one made from the model's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.sources import inside
from espalier.doctor.stats import dense
from espalier.errors import EspalierError
from espalier.init.layouts.owners import first_inputs
from espalier.init.layouts.registry import attribute

_BATCH = 4


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward pass, and targets where they are not among them."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    targets: Tensor | None = None

    def run(self, model: nn.Module) -> Any:
        """Return the model's output on copies: a first layer that works in place would change the user's batch."""
        keywords = {name: _copied(value) for name, value in self.keywords.items()}
        return model(*map(_copied, self.arguments), **keywords)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def as_batch(model: nn.Module, example: Any) -> Batch:
    """Return an example as a batch on the model's device.

    Args:
        model: the module that takes it.
        example: a tensor, a mapping of keyword arguments, ``(inputs, targets)`` or a tuple of arguments. What stands
            beside the first one is targets where a model takes no more than one, and integers where it can do with one.

    Raises:
        EspalierError: an example of another kind, or an empty one.
    """
    first = next(model.parameters(), torch.zeros(()))
    device = first.device if first.device.type != "meta" else torch.device("cpu")

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # No gradient is left in a batch of the user's own.
        value = value.detach().requires_grad_(value.requires_grad)
        floating = value.is_floating_point() and first.is_floating_point()
        return value.to(device, first.dtype) if floating else value.to(device)

    if not isinstance(example, Tensor | Mapping | tuple | list):
        raise EspalierError(f"example {type(example).__name__}: pass a tensor, a mapping, a tuple, or 'synthetic'")
    inputs, targets = list(example) if isinstance(example, tuple | list) else [example], None
    start = next((value for value in inputs if isinstance(value, Tensor)), None)
    if start is not None and dense(start) and start.ndim and not start.shape[0]:
        raise EspalierError(f"example of shape {tuple(start.shape)}: pass a batch that is not empty")
    integers = len(inputs) == 2 and isinstance(inputs[1], Tensor) and not inputs[1].is_floating_point()
    # A mapping holds arguments by name: what stands beside it is no second one.
    beside = len(inputs) > 1 and (integers or isinstance(inputs[0], Mapping) or not _takes(model, *inputs))
    paired = beside and _takes(model, inputs[0])
    if paired:
        # Of the targets of a regression nothing is computed.
        targets, inputs = move(inputs[1]) if integers else None, inputs[:1]
    named = inputs[0] if isinstance(example, Mapping) or paired else None
    if isinstance(named, Mapping):
        return Batch((), {key: move(value) for key, value in named.items()}, targets)
    return Batch(tuple(map(move, inputs)), {}, targets)


def _takes(model: nn.Module, *inputs: Any) -> bool:
    """Return whether a forward pass can be called with these inputs; a mapping alone holds them by name."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code does not say
        return True
    try:
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            signature.bind(**inputs[0])
        else:
            signature.bind(*inputs)
    except TypeError:
        return False
    return True


def synthetic(model: nn.Module, generator: torch.Generator) -> list[Any]:
    """Make small batches from what a model says of its inputs: its configuration, timm's, or the first layer it has.

    Returns:
        Batches to try in order; a model that does not state its image size may take the second or third.

    Raises:
        EspalierError: the model says nothing of its inputs.
    """
    while (inner := inside(model)) is not None:
        model = inner
    config = attribute(model, "config")

    def setting(*names: str) -> int | None:
        for source in (config, attribute(config, "text_config"), attribute(config, "vision_config"), model):
            for name in names:
                value = attribute(source, name)
                if isinstance(value, tuple | list) and value:
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    found = _from_timm(model, generator) or _from_settings(model, setting, generator)
    found = found or list(first_inputs(model, _BATCH, generator))
    if not found:
        raise EspalierError(f"example: {type(model).__name__} does not say what it takes: pass a batch")
    return found


def _from_timm(model: nn.Module, generator: torch.Generator) -> list[Any]:
    described = attribute(model, "pretrained_cfg") or attribute(model, "default_cfg") or {}
    size = described.get("input_size") if isinstance(described, Mapping) else None
    size = attribute(model, "input_size") or size
    if isinstance(size, tuple | list) and len(size) == 3 and all(isinstance(part, int) for part in size):
        return [torch.randn(_BATCH, *size, generator=generator)]
    return []


def _from_settings(model: nn.Module, setting: Callable[..., int | None], generator: torch.Generator) -> list[Any]:
    main = attribute(model, "main_input_name", "")
    vocabulary, side = setting("vocab_size"), setting("image_size", "img_size")
    if vocabulary and main in ("", "input_ids"):
        length = min(32, setting("max_position_embeddings", "n_positions", "max_len") or 32)
        ids = torch.randint(vocabulary, (_BATCH, length), generator=generator)
        batch = {"input_ids": ids}
        if attribute(attribute(model, "config"), "is_encoder_decoder"):
            batch["decoder_input_ids"] = ids[:, : max(2, length // 2)]
        return [batch if main else ids]
    if side and main in ("", "pixel_values"):
        images = torch.randn(_BATCH, setting("num_channels", "in_chans") or 3, side, side, generator=generator)
        return [{"pixel_values": images} if main else images]
    if type(model).__module__.startswith("torchvision.models"):
        return [torch.randn(_BATCH, 3, 224, 224, generator=generator)]
    return []
