"""What a forward pass takes, and how the names of its arguments read."""

from __future__ import annotations

import dis
import inspect
import re
from functools import partial
from types import CodeType

from torch import nn

# Why nothing is made up for a forward that takes whatever it is given.
NAMELESS = "its forward names no arguments"
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Arguments by how their names read. An optional sequence decides which keys are seen.
_SEQUENCE = re.compile(
    r"context|memory|encoder|^(kv|keys?|values?|k|v|y|x_kv|x2|cond|src|source|other|states|ctx|mem|enc|enc_outputs?)$|"
    r"key_value|cross|latent"
)
_NO_SEQUENCE = re.compile(r"mask|past|cache|pos|bias|len|ids|idx|index|^output|use_|return|scale|gate|num|size|shape")
_OTHER_IDS = re.compile(r"^(?!.*(pos|type|segment|seq|head|layer)).*ids$")
ROTARY_NAME = re.compile(r"position_embed|rotary|rope|freqs|cos_sin|pos_emb$|^(cos|sin)$")


def arguments(module: nn.Module) -> list[inspect.Parameter]:
    """Return what a module's forward takes, as far as that can be told."""
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def named_arguments(module: nn.Module) -> list[inspect.Parameter]:
    """Return what a forward names."""
    return [p for p in arguments(module) if p.kind not in VARIADIC]


def takes_more(module: nn.Module) -> bool:
    """Return whether a forward takes more than it names and looks at that: it may hand it on to what is inside."""
    more = [p.name for p in arguments(module) if p.kind in VARIADIC]
    code = getattr(inspect.unwrap(module.forward), "__code__", None) if more else None
    return bool(more) and (code is None or any(map(partial(_reads, code), more)))


def _reads(code: CodeType, name: str) -> bool:
    """Return whether a function may look at one of its arguments."""
    if name in code.co_cellvars or {"locals", "vars", "eval", "exec", "dir"} & {*code.co_names}:
        return True
    return any(
        each.argval == name or name in (each.argval if isinstance(each.argval, tuple) else ())
        for each in dis.get_instructions(code)
    )


def sequences(module: nn.Module, *, needed: bool = False, any_name: bool = False) -> list[str]:
    """Return the names of optional arguments, or of needed ones, that read as if they held another sequence's keys.

    With ``any_name`` also those of optional ones that may be a tensor and do not read as something else.
    """
    named = [p for p in arguments(module)[1:] if p.kind not in VARIADIC]
    read = [p for p in named if (p.default is p.empty) == needed and is_sequence(p)]
    return [p.name for p in named if p in read or (any_name and _may_be_tokens(p))]


def is_sequence(parameter: inspect.Parameter) -> bool:
    """Return whether an argument reads as if it held another sequence's keys."""
    return bool(_SEQUENCE.search(parameter.name)) and not _NO_SEQUENCE.search(parameter.name)


def may_be_moved(name: str) -> bool:
    """Return whether an argument's name does not say that it holds positions, masks or settings."""
    return not _NO_SEQUENCE.search(name) and not ROTARY_NAME.search(name)


def _may_be_tokens(parameter: inspect.Parameter) -> bool:
    stated = parameter.annotation is parameter.empty or "Tensor" in str(parameter.annotation)
    may_be = may_be_moved(parameter.name) or _OTHER_IDS.search(parameter.name)
    return parameter.default is None and stated and bool(may_be)
