"""What the names of modules say: whether attention compares two sequences, and whether a module is attention at all."""

from __future__ import annotations

import re
from contextlib import suppress

from torch import nn
from torch.nn.parameter import is_lazy

from espalier.init.layouts.registry import attribute

_ATTENTION = frozenset({"attention", "attentions", "attn", "att", "attend", "mha", "mhsa", "msa", "sdpa", "mqa", "gqa"})
# Words that make an attention module compare two sequences.
_CROSS = frozenset(
    {"cross", "xattn", "xatt", "xattention", "encdec", "src", "source", "memory", "mem", "context", "ctx"}
)
_CROSS |= {"pool", "pooling", "pooler", "attnpool", "crossattn", "crossattention", "resampler", "coattn", "decenc"}
# Words that say nothing of the kind of attention: the name of what holds it is read then.
_PLAIN = _ATTENTION | {"self", "fn", "module", "inner", "layer", "attentionlayer", "mh"}
_SELF = frozenset({"self", "selfattn", "selfattention", "sattn", "intra"})
# What an attribute or a value says of cross-attention, and words that make it say less than that the layer is one.
_SAYS = frozenset({"cross", "xattn", "encdec", "crossattn", "crossattention"})
_SAYS_LESS = frozenset({"add", "has", "use", "supports", "with", "allow", "can", "no", "not", "skip", "disable"})
# Names of maps to queries, keys and values; two kinds of them in one module make attention.
_BEFORE = r"(linear|c|proj|fc|lin|conv)_"
_MAPS = tuple(
    re.compile(rf"^({names}|{_BEFORE}{letter})$", re.IGNORECASE)
    for letter, names in (
        ("q", r"to_?q|w_?qs?|q|query|queries|q_?(proj|lin|conv)\w*|theta|query_\w+|q_(a|b|down|up|layer)\w*"),
        ("k", r"to_?kv?|w_?kv?s?|k|key|keys|k_?(proj|lin|conv)\w*|phi|key_\w+|k_(a|b|down|up|layer)\w*|kv\w*"),
        ("v", r"to_?k?v|w_?k?vs?|v|value|values|v_?(proj|lin|conv)\w*|value_\w+|v_layer\w*|kv\w*"),
    )
)
# The last: a dropout on attention weights, whatever the maps are called.
_FUSED = re.compile(
    r"^(\w*qkv\w*|(to_?)?qk(_?(proj|lin)\w*)?|attn_drop\w*|c_attn|query_key_value|in_proj_weight)$", re.I
)


def reads_cross(name: str) -> bool:
    """Return whether a dotted name says that keys come from another sequence (``src_attn``, ``cross.mha``).

    Only the words that name the attention itself count: ``cross_encoder.layers.0.self_attn`` attends to itself.
    """
    for part in reversed(name.split(".")):
        words = set(split_words(part))
        if words & _SELF and part != "self":  # "self" alone is BERT's name for half a module
            return False
        if words & _CROSS or (words & {"encoder", "enc"} and words & _ATTENTION and len(words) < 4):
            return True
        if not part.isdigit() and not words <= _PLAIN:
            return False
    return False


def reads_self(name: str) -> bool:
    """Return whether a dotted name says that an attention layer attends to its own tokens (``self_attn``)."""
    return any(set(split_words(part)) & _SELF for part in name.split(".")[-2:])


def says_cross(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, says of itself that it is cross-attention.

    By a true attribute of the instance or its class (``is_cross_attention``, ``encoder_decoder_attention``), by a value
    (``kind = "cross"``), or by the name of its class.
    """
    for owner in (module, *module.children()):
        classes = [cls for cls in reversed(type(owner).__mro__) if cls not in nn.Module.__mro__]
        stated = {key: value for holder in (*classes, owner) for key, value in vars(holder).items() if key[:2] != "__"}
        for name, value in stated.items():
            words = set(split_words(name))
            told = (words & _SAYS or {"encoder", "decoder"} <= words) and not words & _SAYS_LESS
            if told and isinstance(value, property):
                with suppress(Exception):  # anyone's code
                    value = getattr(owner, name)
            if (told and value is True) or (isinstance(value, str) and _is_cross(value)):
                return True
    return "cross" in split_words(type(module).__name__) and "self" not in split_words(type(module).__name__)


def _is_cross(value: str) -> bool:
    words = set(split_words(value)) if len(value) < 40 else set()
    return bool(words & _SAYS) and words <= _SAYS | _ATTENTION


def denies_cross(module: nn.Module) -> bool:
    """Return whether a module says of itself that it is not cross-attention."""
    names = ("is_cross_attention", "is_cross_attn", "is_cross")
    return any(attribute(owner, name) is False for owner in (module, *module.children()) for name in names)


def looks_like_attention(module: nn.Module) -> bool:
    """Return whether a module's class or the names of its maps read as attention, and it holds two matrices or more."""
    words = set(split_words(type(module).__name__))
    own = [name for name, _ in module.named_children()] + [name for name, _ in module.named_parameters(recurse=False)]
    kinds = sum(any(pattern.match(name) for name in own) for pattern in _MAPS)
    named = words & _ATTENTION or kinds >= 2 or any(_FUSED.match(name) for name in own)
    return bool(named) and sum(is_lazy(parameter) or parameter.ndim >= 2 for parameter in module.parameters()) >= 2


def split_words(name: str) -> list[str]:
    """Return the lower-case words of a name in snake or camel case: ``TFCrossAttn2D`` is tf, cross, attn, 2, d."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
