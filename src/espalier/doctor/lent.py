"""Copies of what modules keep in plain attributes: a pass may write into them."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MODULE_FIELDS = frozenset(vars(nn.Module()))
_TABLES = (dict, OrderedDict, defaultdict, Counter)
_FLAT = (deque, set, bytearray, np.ndarray)
# Of torch's own wrappers: what a pass leaves in them belongs to a state that is not theirs alone.
WRAPPERS = ("torch.distributed", "torch.nn.parallel", "torch._dynamo")


def lend_copies(modules: Iterable[nn.Module]) -> None:
    """Put copies in place of tensors, containers and generators in plain attributes, for whoever puts them back.

    A pass may write into them: a cache of keys and values, a list of every block's output, a generator it draws from.
    """
    # Not at the top: numpy loads its generators when they are first named.
    generators = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    copies: dict[int, Any] = {}  # what several modules share, they share still

    def copied(value: Any) -> Any:
        if id(value) in copies:
            return copies[id(value)]
        if type(value) is Tensor:
            copies[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        elif type(value) is list:
            copies[id(value)] = []
            copies[id(value)] += map(copied, value)
        elif type(value) in _TABLES:
            copies[id(value)] = copy.copy(value)
            for key, part in value.items():
                copies[id(value)][key] = copied(part)
        elif type(value) in _FLAT:
            copies[id(value)] = copy.copy(value)
        elif isinstance(value, generators):
            copies[id(value)] = copy.deepcopy(value)
        else:
            return value
        return copies[id(value)]

    for part in modules:
        if not isinstance(part, torch.jit.ScriptModule) and not type(part).__module__.startswith(WRAPPERS):
            own = [(name, value) for name, value in vars(part).items() if name not in MODULE_FIELDS]
            vars(part).update((name, copied(value)) for name, value in own)
