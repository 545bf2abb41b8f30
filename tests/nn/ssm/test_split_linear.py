"""A linear layer in parts against the layer itself, and what stands in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from espalier.nn import Mamba1, Mamba2
from espalier.nn.ssm.split_linear import split_linear


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_split_of_the_whole_with_its_gradients(bias: bool) -> None:
    layer = nn.Linear(5, 9, bias=bias).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = split_linear(layer, x, (2, 4, 3)), layer(x).split([2, 4, 3], dim=-1)
    weights = [torch.randn_like(part) for part in theirs]
    gradients = [torch.autograd.grad(parts, [x, *layer.parameters()], weights) for parts in (ours, theirs)]
    for mine, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, other)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Adapter(nn.Module):
    """What adapters do: a module in the layer's place that calls it and adds to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.base(x)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_adapters_hooks_and_parametrizations_of_a_mixer_take_effect(family: str) -> None:
    mixer = Mamba1(8, 4) if family == "mamba1" else Mamba2(8, 4, head_dim=8)
    x = torch.randn(2, 5, 8)
    plain = mixer(x)
    seen: list[Tensor] = []
    handle = mixer.in_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(mixer(x), plain)
    handle.remove()
    assert seen[0].shape == (2, 5, mixer.in_proj.out_features)

    base = mixer.in_proj
    mixer.in_proj = Adapter(base)  # type: ignore[assignment]
    adapted = mixer(x)
    mixer.in_proj = base
    parametrize.register_parametrization(base, "weight", Doubled())
    doubled = mixer(x)
    parametrize.remove_parametrizations(base, "weight", leave_parametrized=False)
    with torch.no_grad():
        base.weight.mul_(3)
        torch.testing.assert_close(adapted, mixer(x))
        base.weight.mul_(2 / 3)
        torch.testing.assert_close(doubled, mixer(x))


def patched(conv: nn.Conv1d, name: str) -> nn.Conv1d:
    """Return the layer with a method on the instance that makes its output three times as large."""
    inner = getattr(conv, name)
    setattr(conv, name, lambda *args: 3 * inner(*args))
    return conv


WAYS: dict[str, Callable[[nn.Conv1d], nn.Module]] = {
    "adapter": Adapter,
    "forward": lambda conv: patched(conv, "forward"),
    "_conv_forward": lambda conv: patched(conv, "_conv_forward"),
    "hook": lambda conv: (conv.register_forward_hook(lambda module, args, output: 3 * output), conv)[1],
}


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("way", WAYS)
def test_a_changed_convolution_of_a_mixer_takes_effect(family: str, way: str) -> None:
    mixer = Mamba1(8, 4) if family == "mamba1" else Mamba2(8, 4, head_dim=8)
    x = torch.randn(2, 7, 8)
    changed, tripled = copy.deepcopy(mixer), copy.deepcopy(mixer)
    changed.conv1d = WAYS[way](changed.conv1d)  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in tripled.conv1d.parameters():
            parameter.mul_(3)
    torch.testing.assert_close(changed(x), tripled(x))
    # In two parts, and token by token.
    first, state = changed(x[:, :4], return_state=True)
    rest, _ = changed(x[:, 4:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), tripled(x), rtol=1e-4, atol=1e-5)
    state, outputs = changed.empty_state(2), []
    for token in x.unbind(1):
        y, state = changed.step(token, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), tripled(x), rtol=1e-4, atol=1e-5)


def test_a_replaced_step_projection_of_mamba1_takes_effect_in_float32() -> None:
    mixer = Mamba1(8, 4)
    u = torch.randn(2, 5, mixer.inner)
    logits = mixer.dt_proj(mixer.x_proj(u)[..., : mixer.dt_rank])
    mixer.dt_proj = Adapter(mixer.dt_proj)  # type: ignore[assignment]
    torch.testing.assert_close(mixer.coefficients(u)[0], nn.functional.softplus(3 * logits))
    steps = mixer.bfloat16().coefficients(u.bfloat16())[0]
    assert steps.dtype == torch.float32


class Halved(Tensor):
    """A weight as quantisers make them: linear maps and convolutions read it as twice the numbers in its memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in (nn.functional.linear, nn.functional.conv1d):
                args = [2 * a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
            made = func(*args, **(kwargs or {}))
            return made.as_subclass(cls) if func in (Tensor.detach, Tensor.requires_grad_) else made


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@torch.no_grad()
def test_weights_that_are_no_plain_numbers_are_left_to_torch(family: str) -> None:
    mixer = Mamba1(8, 4) if family == "mamba1" else Mamba2(8, 4, head_dim=8)
    x, halved = torch.randn(2, 7, 8), copy.deepcopy(mixer)
    for layer in halved.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d):
            layer.weight = nn.Parameter((layer.weight.detach() / 2).as_subclass(Halved), requires_grad=False)
    torch.testing.assert_close(halved(x), mixer(x))
    ours, theirs = (net.step(x[:, 0], net.empty_state(2))[0] for net in (halved, mixer))
    torch.testing.assert_close(ours, theirs)
