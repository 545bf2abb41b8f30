"""A loss that is not finite: no update after it, and where in the network it came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.train.parallel import local_part


class LossGuard:
    """Holds the optimiser back from the first step on whose loss is not finite, without waiting for the device.

    The fused optimisers skip their update where ``found_inf`` is 1, as for gradient scaling; from the others the
    gradients are taken away, for which they wait for the device. So the weights stay those that the bad step saw,
    however much later somebody looks.

    Args:
        optimizer: of torch.
        device: where the losses are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)
        self._healthy = torch.zeros((), device=device)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self.found  # type: ignore[attr-defined]
        else:
            optimizer.register_step_pre_hook(self._take_gradients)

    @torch.no_grad()
    def note(self, loss: Tensor) -> None:
        """Take in the loss of a step, the same on all processes, before its update."""
        self.found.copy_(torch.maximum(self.found, (~torch.isfinite(loss)).float()))
        self._healthy += 1 - self.found

    def _take_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.found.item():
            optimizer.zero_grad(set_to_none=True)

    def healthy_steps(self) -> int | None:
        """Return the number of steps before the first bad one, None if there was none; waits for the device."""
        return int(self._healthy.item()) if self.found.item() else None


def find_nonfinite(model: nn.Module, inputs: Tensor) -> tuple[int, str] | None:
    """Return the first tensor of a forward pass that is not finite, None if all are.

    Args:
        model: the bare model.
        inputs: what it is given.

    Returns:
        How many layers ended before, and the tensor in words. A layer's weights come before its output, inner layers
        before those around them.
    """
    if not is_finite(inputs):
        return 0, "the inputs of the batch"
    found: list[tuple[int, str]] = []
    ended = 0
    names = {id(module): name for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal ended
        ended += 1
        if found:
            return
        layer = f"layer {names[id(module)]!r} ({type(module).__name__})" if names[id(module)] else "the model"
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        bad = next((name for name, tensor in own if not is_finite(tensor)), None)
        if bad is not None:
            found.append((ended, f"{bad!r} of {layer}, which the step before had made so"))
        elif not all(map(is_finite, _tensors(output))):
            found.append((ended, f"the output of {layer}"))

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def is_finite(tensor: Tensor) -> bool:
    """Return whether this process's part of a tensor holds only finite numbers; waits for the device."""
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return not numbers or bool(torch.isfinite(local_part(tensor.detach())).all())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []
