"""Where Mamba mixers keep B, C, Δ, A and the convolution: every library kept the reference implementation's names."""

from __future__ import annotations

import re
from math import inf

from torch import Tensor, nn

from espalier.init.adapters import ADAPTED, is_adapted
from espalier.init.layouts.names import looks_like_attention
from espalier.init.layouts.registry import Found, Refused, Skipped, SSMWeights, register_guess, register_layout

_TRANSFORMERS = "transformers.models."
# What libraries call the number of groups of B and C.
_GROUPS = ("groups", "n_groups", "ngroups")


# What the libraries' own mixers hold, by its first name: all that one scan needs, norms, and a learned first state.
_OF_ONE_SCAN = re.compile(
    r"A_log|D|dt_bias|init_states|conv1d|in_proj|x_proj|dt_proj|out_proj|\w*norm|gate_norm_weight"
)


def beside_the_scan(module: nn.Module) -> list[str]:
    """Return the parameters that no registered mixer has: a fork under its name may run another scan with them."""
    names = dict.fromkeys(name.partition(".")[0] for name, _ in module.named_parameters())
    return [name for name in names if not _OF_ONE_SCAN.fullmatch(name)]


@register_layout("espalier.nn.ssm.mamba.Mamba1")
@register_layout("mamba_ssm.modules.mamba_simple.Mamba")
@register_layout(_TRANSFORMERS + "mamba.modeling_mamba.MambaMixer")
@register_layout(_TRANSFORMERS + "falcon_mamba.modeling_falcon_mamba.FalconMambaMixer")
@register_layout(_TRANSFORMERS + "jamba.modeling_jamba.JambaMambaMixer")
def mamba1(module: nn.Module) -> Found:
    """Return views into ``x_proj`` (rows Δ-rank, B, C), ``dt_proj``, ``A_log`` and ``conv1d``."""
    rates, taps, conv_bias = _common(module)
    maps, steps = _linear(module, "x_proj"), _linear(module, "dt_proj")
    bias = module.get_parameter("dt_bias") if steps.bias is None else steps.bias
    size, rank = rates.shape[1], steps.in_features
    _, w_b, w_c = maps.weight.detach().split([rank, size, size])
    return SSMWeights(
        "mamba1", w_b, w_c, steps.weight.detach(), bias.detach(), rates, taps, conv_bias,
        map_biases=() if maps.bias is None else (maps.bias.detach()[rank:],),
        note="B, C and the step are normalised after their maps" if hasattr(module, "b_layernorm") else "",
    )  # fmt: skip


@register_layout("espalier.nn.ssm.mamba.Mamba2")
@register_layout("mamba_ssm.modules.mamba2.Mamba2")
@register_layout("fla.layers.mamba2.Mamba2")
@register_layout(_TRANSFORMERS + "mamba2.modeling_mamba2.Mamba2Mixer")
@register_layout(_TRANSFORMERS + "bamba.modeling_bamba.BambaMixer")
@register_layout(_TRANSFORMERS + "falcon_h1.modeling_falcon_h1.FalconH1Mixer")
@register_layout(_TRANSFORMERS + "zamba2.modeling_zamba2.Zamba2MambaMixer")
@register_layout(_TRANSFORMERS + "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer")
@register_layout(_TRANSFORMERS + "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer")
def mamba2(module: nn.Module) -> Found:
    """Return views into ``in_proj``, whose last rows are B, C and Δ, and ``dt_bias``, ``A_log`` and ``conv1d``."""
    groups = _first_of(module, *_GROUPS)
    return _mamba2(module, groups, groups * _first_of(module, "state_size", "ssm_state_size", "d_state"))


_UNKNOWN = "it has an A_log, in a form of state-space layer that no layout knows: register one"
# Rates of several scans, or of one backwards.
_RATES = re.compile(r"A(_\w)?_logs?")


@register_guess
def guess_mamba(module: nn.Module) -> Found | None:
    """Return the mixer that a module's names look like, saying that it is a guess, or ``None``.

    Mamba-2's B and C are what its convolution sees beside the value path, in one group unless the module states more.
    A module with an ``A_log`` in another form keeps its row, and its convolution, unless there is attention in it.
    """
    names = {name for name, _ in module.named_children()}
    bare = {name for name, _ in module.named_parameters(recurse=False)}
    if "A_log" not in bare:
        if any(map(_RATES.fullmatch, bare)):
            raise Refused("ssm", _UNKNOWN)
        return None
    usual = {"conv1d", "in_proj", "out_proj"} <= names
    if usual and {"x_proj", "dt_proj"} <= names:
        return mamba1(module)
    if usual and "dt_bias" in bare:
        groups = next((n for name in _GROUPS if isinstance(n := getattr(module, name, None), int) and n > 0), 1)
        share = (len(_common(module)[1]) - _linear(module, "out_proj").in_features) // 2
        if share < 1:
            raise Refused("ssm", "its convolution sees no B and no C: register a layout for its class")
        return _mamba2(module, groups, share)
    if any(map(looks_like_attention, module.modules())):
        return None
    raise Refused("ssm", _UNKNOWN)


def _mamba2(module: nn.Module, groups: int, share: int) -> Found:
    """Return a Mamba-2's views; ``share`` are the rows of B, all groups of it."""
    rates, taps, conv_bias = _common(module)
    maps, heads = _linear(module, "in_proj"), len(rates)
    # From the end: a mamba_ssm mixer may have an MLP's rows before z.
    parts = [maps.out_features - 2 * share - heads, share, share, heads]
    _, w_b, w_c, w_delta = maps.weight.detach().split(parts)
    biases: list[Tensor] = [] if maps.bias is None else list(maps.bias.detach().split(parts))
    return SSMWeights(
        "mamba2", w_b, w_c, w_delta, module.get_parameter("dt_bias").detach(), rates, taps, conv_bias, groups,
        map_biases=tuple(biases[1:3]), delta_shifts=tuple(biases[3:]),
        note="B, C and the step are multiplied by fixed factors" if hasattr(module, "mup_vector") else "",
        step_limits=tuple(getattr(module, "time_step_limit", None) or getattr(module, "dt_limit", None) or (0.0, inf)),
    )  # fmt: skip


@register_layout(_TRANSFORMERS + "zamba.modeling_zamba.ZambaMambaMixer")
def zamba(module: nn.Module) -> Found:
    """Leave it alone: it keeps one set of maps a head in bare tensors."""
    return Skipped("ssm", "Zamba keeps a set of maps a head: no layout yet")


def _common(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``A_log`` and the convolution's taps and bias."""
    conv = module.get_submodule("conv1d")
    if not isinstance(conv, nn.Conv1d):
        raise Refused("ssm", f"conv1d is a {type(conv).__name__}: write before it is replaced")
    bias = None if conv.bias is None else conv.bias.detach()
    return module.get_parameter("A_log").detach(), conv.weight.detach(), bias


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    if is_adapted(layer):
        raise Refused("ssm", f"{name} {ADAPTED}")
    if not isinstance(layer, nn.Linear):
        raise Refused("ssm", f"{name} is a {type(layer).__name__} and no linear layer: write before it is replaced")
    return layer


def _first_of(module: nn.Module, *names: str) -> int:
    """Return the number that libraries call by different names."""
    for name in names:
        if hasattr(module, name):
            return int(getattr(module, name))
    raise AttributeError(f"it has none of {', '.join(names)}")
