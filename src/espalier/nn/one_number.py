"""Parameters of one number: vectors of length 1, as FSDP2 shards no scalar."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def load_scalars(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the scalars of older checkpoints too; a hook for ``register_load_state_dict_pre_hook``."""
    for name, parameter in module._parameters.items():
        given = state_dict.get(prefix + name)
        if parameter is not None and parameter.shape == (1,) and isinstance(given, Tensor) and given.ndim == 0:
            state_dict[prefix + name] = given.view(1)
