"""From the names of a module's linear layers to views of its attention weights: what every host's layout is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from espalier.init.adapters import ADAPTED, is_adapted
from espalier.init.layouts.heads_apart import Group, is_its_own, stacked
from espalier.init.layouts.registry import AttentionWeights, Refused
from espalier.init.layouts.scratch import is_bias

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
# Names that a configuration may mean otherwise, and a module that states a head's width: h is a height, too.
_OWN_HEADS = ("num_head", "nheads", "n_local_heads", "h")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "key_value_proj_dim", "d_k", "d_head")
# Biases of maps that are parameters of the module's own: q_bias, b_Q, _b_K, bo.
_OWN_BIAS = re.compile(r"_?b_?(q|k|v|o|qk|kv|qkv|out)|(q|k|v|o|qk|kv|qkv|out)_bias", re.IGNORECASE)
NO_HEADS = "its number of heads is not stated"
_UNFIT = "its weights' shapes do not fit together: register a layout for its class"


def separate(module: nn.Module, q: str, k: str, v: str, out: str, *, note: str = "") -> AttentionWeights:
    """Return the weights of self-attention with four linear layers.

    Args:
        module: the attention module.
        q, k, v, out: dotted names of the linear layers inside it.
        note: what a reader of the report should know of this host.

    Raises:
        Refused: adapted (LoRA), quantised, missing or cross-attention.
    """
    return assemble(module, matrices(module, (q, k, v, out)), (q, k, v, out), note)


def paired(module: nn.Module, q: str, kv: str, out: str) -> AttentionWeights:
    """Return the weights of self-attention whose keys and values come from one linear layer, keys first."""
    q_RD, kv_RD, out_DR = matrices(module, (q, kv, out))
    return assemble(module, [q_RD, *kv_RD.chunk(2), out_DR], (q, kv, out))


def fused(module: nn.Module, qkv: str, out: str, *, by_head: bool = False, note: str = "") -> AttentionWeights:
    """Return the weights of self-attention whose queries, keys and values come from one linear layer.

    Args:
        module: the attention module.
        qkv, out: dotted names of the linear layers inside it.
        by_head: rows go (q, k, v) within each head, as in GPT-NeoX and BLOOM; otherwise all queries, all keys, all
            values, the latter two fewer with grouped queries.
        note: what a reader of the report should know of this host.
    """
    rows_RD, out_DR = matrices(module, (qkv, out))
    shared, odd = divmod(len(rows_RD) - out_DR.shape[1], 2)
    if odd:
        raise Refused("attention", _UNFIT)
    if not by_head:
        q, k, v = rows_RD.split([out_DR.shape[1], shared, shared])
    elif shared == out_DR.shape[1]:
        # Rows of one head are not evenly spaced over heads, so these views are three-dimensional.
        q, k, v = rows_RD.unflatten(0, (_count_heads(module, shared, 0), 3, -1)).unbind(1)
    else:
        raise Refused("attention", "its fused rows are not three a head: register a layout for its class")
    return assemble(module, [q, k, v, out_DR], (qkv, out), note)


def assemble(
    module: nn.Module, weights: Sequence[Tensor], names: Sequence[str | Group], note: str = "", heads: int = 0
) -> AttentionWeights:
    """Return weights in the order q, k, v, out as those of self-attention, with the biases of the maps of these names.

    Args:
        module: the attention module.
        weights: of its maps.
        names: of its maps; of one that each head has, those of its weights.
        note: what a reader of the report should know of this host.
        heads: query heads, where the module does not state them.

    Raises:
        Refused: they do not fit together.
    """
    q, k, v, out = weights
    dim, rows = q.shape[-1], q.numel() // q.shape[-1]
    heads = _count_heads(module, rows, heads)
    if k.shape[-1] != dim or v.shape[-1] != dim or len(out) != dim:
        raise Refused("attention", "queries, keys and outputs have different widths: this is cross-attention")
    groups, rest = divmod(k.numel() // dim, rows // heads)
    fits = not rest and groups and not heads % groups and not v.numel() // dim % groups
    if not fits or out.shape[1] * groups != heads * (v.numel() // dim):
        raise Refused("attention", _UNFIT)
    apart = tuple(name for name in names if isinstance(name, tuple))
    maps = [name for name in names if isinstance(name, str) and name not in module._parameters]
    maps += [name.rpartition(".")[0] for group in apart for name in group]
    biases = [getattr(module.get_submodule(name), "bias", None) for name in maps]
    of_its_own = {**module._parameters, **module._buffers}.items()
    biases += [own for name, own in of_its_own if _OWN_BIAS.fullmatch(name) and is_bias(module, name)]
    found = tuple(bias.detach() for bias in biases if isinstance(bias, Tensor))
    return AttentionWeights(q, k, v, out, heads, groups, found, note, apart=apart)


def matrices(module: nn.Module, names: Sequence[str | Group]) -> list[Tensor]:
    """Return the weights of linear maps as (out, in), of one a head as (heads, out, in), or raise why one cannot be."""
    return [_matrix(module, name) if isinstance(name, str) else _of_heads(module, name) for name in names]


def _of_heads(module: nn.Module, group: Group) -> Tensor:
    weights, owner = stacked(module, group), module.get_submodule(group[0].rpartition(".")[0])
    if weights is None:
        raise Refused("attention", f"{group[0]} and its like in the other heads are apart")
    return weights.mT if is_its_own(module, group) or hasattr(owner, "nf") else weights.flatten(2)


def _matrix(module: nn.Module, name: str) -> Tensor:
    if (own := module._parameters.get(name)) is not None:
        return own.detach().mT  # x @ W, or a matrix a head (H, in, out)
    layer = module.get_submodule(name)
    if isinstance(layer, nn.Identity):
        raise Refused("attention", f"{name} is missing (an identity): there is no product to set")
    if is_adapted(layer):
        raise Refused("attention", f"{name} {ADAPTED}")
    weight = getattr(layer, "weight", None)
    if weight is None and not any(
        "quant" in part.lower() or part == "qweight" for part in (type(layer).__name__, *vars(layer), *layer._buffers)
    ):
        kind = type(layer).__name__
        raise Refused("attention", f"{name} ({kind}) holds no weight of its own: register a layout for its class")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise Refused("attention", f"{name} is quantised: write the full-precision model, then quantise it")
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1 and weight[0, 0].numel() == 1:
        weight = weight.flatten(1)  # a convolution of one tap is a linear map of every pixel
    if weight.ndim != 2:
        # A linear layer's flat one was made of many by a wrapper; one of more axes is a convolution's.
        wrapped = weight.ndim < 2 and isinstance(layer, nn.Linear)
        remedy = "write before wrapping" if wrapped else "register a layout for its class"
        raise Refused("attention", f"{name} holds no matrix but shape {tuple(weight.shape)}: {remedy}")
    # GPT-2's Conv1D stores (in, out); it is known by its number of features, nf.
    return weight.detach().mT if hasattr(layer, "nf") else weight.detach()


def _count_heads(module: nn.Module, rows: int, supposed: int) -> int:
    """Return the number of query heads that the module states, or what is supposed where it states none.

    Raises:
        Refused: neither is there, or it divides no rows.
    """
    for owner in (module, getattr(module, "self", None), getattr(module, "attention", None)):
        heads, width = _stated(owner, HEADS), _stated(owner, WIDTHS)
        heads = heads if heads or width else _stated(owner, _OWN_HEADS)
        if heads or width:
            break
    else:
        heads, width = _stated(getattr(module, "config", None), HEADS), 0
    if not heads and width and rows % width == 0:
        heads = rows // width
    heads = heads or supposed
    if not heads or rows % heads:
        stated = f"{heads} heads do not divide its rows" if heads else NO_HEADS
        # A module without a class of its own holds a part of a checkpoint.
        remedy = (
            "give the right one (heads, --heads)" if type(module) is nn.Module else "register a layout for its class"
        )
        raise Refused("attention", f"{stated}: {remedy}")
    return heads


def _stated(owner: object, names: Sequence[str]) -> int:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
