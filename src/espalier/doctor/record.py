"""One tensor of a model or a checkpoint as the checks see it: its name, its role, its numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from espalier.doctor.stats import TensorStats

Role = Literal["weight", "bias", "norm", "embedding", "position", "gain", "ssm", "adapter", "statistics", "other"]

_NORM = re.compile(
    r"(^|[._])(\w*norm\w*|ln_?\w{0,5}|bn_?\w{0,3}|layer_?norm\w*|gn\d?)(\.|$)|downsample\.1$", re.IGNORECASE
)
_POSITION = re.compile(
    r"pos_?(ition|e?mb|ids)|positional|relative_|rel_pos|rotary|rope|inv_freq|freqs|(^|\.)wpe|(^|\.)pe(\.|$)|_cached|"
    r"time_?embed",
    re.IGNORECASE,
)
# Learned vectors that stand among the inputs, as a class token or a prompt: nothing is summed over their rows.
_TOKEN = re.compile(
    r"(^|_)(tokens?|prompts?|probes?|latents?|registers?|class_embedding|cls)(_\d\w?)?$|_(query|queries)$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(wte|tok\w*emb\w*|embed_tokens|word_embeddings|embeddings?|embed|shared)$", re.IGNORECASE
)
_ADAPTER = re.compile(r"lora_|adapter", re.IGNORECASE)
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module"}
SSM_LEAVES = ("A_log", "A_b_log", "dt_bias", "D")


@dataclass(frozen=True)
class Record:
    """One parameter or buffer.

    Attributes:
        name: its full name, without what wrappers (DDP, torch.compile, FSDP) put into it.
        role: what it is for.
        shape, dtype: of the whole tensor, also when it is sharded.
        buffer: whether it is a buffer.
        trainable: whether it wants a gradient; ``False`` in a bare checkpoint.
        meta: whether it has no storage.
        fans: how many inputs each output sums over, and how many outputs each input goes to; 1 for vectors.
        module: the module that owns it; ``None`` in a bare checkpoint.
        stats: its numbers; ``None`` if it holds none.
        values: the tensor itself, only while the checks of single tensors look at it.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    buffer: bool = False
    trainable: bool = False
    meta: bool = False
    fans: tuple[int, int] = (1, 1)
    module: nn.Module | None = None
    stats: TensorStats | None = None
    values: Tensor | None = None

    @property
    def parameter(self) -> Tensor | None:
        """The parameter in its module; ``None`` for a buffer, and in a bare checkpoint."""
        return None if self.module is None else self.module._parameters.get(self.leaf)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the parameter got, whole; ``None`` where it got none."""
        own = self.parameter
        return None if own is None or own.grad is None else whole(own.grad)

    @property
    def layer(self) -> str:
        """Name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Name of the tensor within its module."""
        return self.name.rpartition(".")[2]

    @property
    def matrix(self) -> bool:
        """Whether it is a weight with at least two dimensions that are not one."""
        return not self.buffer and sum(size > 1 for size in self.shape) >= 2

    @property
    def multiplies(self) -> bool:
        """Whether its name says that a layer multiplies by it: others may be tables, coefficients or learned inputs."""
        return bool(re.search("weight|kernel|^original", self.leaf))

    @property
    def units(self) -> Tensor | None:
        """The values as a matrix, a row for each output; GPT-2's linear layer keeps the transpose."""
        values = self.values
        if values is None:
            return None
        return values.T if type(self.module).__name__ == "Conv1D" else values.reshape(len(values), -1)

    @property
    def filters(self) -> bool:
        """Whether it holds depthwise filters."""
        return len(self.shape) >= 3 and self.shape[1] == 1

    @property
    def pattern(self) -> str:
        """Its name with a star for every number: equal for the same tensor of other layers."""
        return pattern_of(self.name)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, gathered from all ranks where each holds a shard."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def pattern_of(name: str) -> str:
    """Return a name with a star for every part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def plain_name(name: str) -> str:
    """Return a name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def role_of(name: str, shape: tuple[int, ...], module: nn.Module | None, *, buffer: bool = False) -> Role:
    """Return what a tensor is for, from its module's class where there is one, else from its name."""
    layer, _, leaf = name.rpartition(".")
    kind = type(module).__name__ if module is not None else ""
    if leaf in ("running_mean", "running_var"):
        return "statistics"
    if leaf in SSM_LEAVES:
        return "ssm"
    if leaf in ("weight_g", "original0"):
        return "gain"
    if _ADAPTER.search(name):
        return "adapter"
    flat = len(shape) < 2
    named_norm = _NORM.search(layer) if module is None else _NORM.search(kind) or "Norm" in kind
    if named_norm and (flat or isinstance(module, nn.LayerNorm)):
        return "bias" if "bias" in leaf or leaf == "beta" else "norm"
    if module is None and flat and leaf == "weight":  # of what has a weight, only normalisation keeps a vector
        return "norm"
    # A layer that multiplies is one, whatever it is named after.
    if leaf == "weight" and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return "weight"
    # What is broadcast over the batch is added to the inputs or stands beside them.
    broadcast = len(shape) >= 3 and shape[0] == 1 and not re.search("weight|kernel", leaf)
    if _POSITION.search(name) or _TOKEN.search(leaf) or broadcast:
        return "position"
    if isinstance(module, nn.Embedding) or (module is None and _EMBEDDING.search(layer)):
        return "embedding"
    if "bias" in leaf and flat:
        return "bias"
    return "weight" if not buffer and not flat else "other"


def fans(shape: tuple[int, ...], module: nn.Module | None) -> tuple[int, int]:
    """Return how many inputs each output of a weight sums over, and how many outputs each input goes to."""
    if len(shape) < 2:
        return 1, 1
    kernel = math.prod(shape[2:])
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer keeps the transpose
        return shape[0], shape[1]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        window = max(1, kernel // math.prod(module.stride))
        return max(1, shape[0] * window // module.groups), shape[1] * kernel
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return shape[1] * kernel, max(1, shape[0] * kernel // groups)
