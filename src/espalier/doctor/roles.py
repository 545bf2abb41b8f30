"""What a tensor is for: by its module where there is one, and what that does, else by its name."""

from __future__ import annotations

import math
import re
from typing import Literal

from torch import nn

from espalier.doctor.asked import is_transposed, normalises
from espalier.init.trained import NORMS

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
    r"(^|_)(tokens?|prompts?|probes?|latents?|registers?|class_embedding|cls)(_\d\w?)?$|_(query|queries)$|"
    r"(^|_)(mem|memory|null|persistent)_?(kv?|v|keys?|values?)$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(wte|tok\w*emb\w*|embed_tokens|word_embeddings|embeddings?|embed|shared)$", re.IGNORECASE
)
_ADAPTER = re.compile(r"lora_|adapter", re.IGNORECASE)
# A selective layer's rates, steps and skips, of one direction or of several at once (Vim's, VMamba's).
_SSM = re.compile(r"(^|\.)(A(_b)?_logs?|dt_bias|Ds?|D_b|dt_projs?(_b)?[._]bias)$")


def role_of(name: str, shape: tuple[int, ...], module: nn.Module | None, *, buffer: bool = False) -> Role:
    """Return what a tensor is for, from its module's class where there is one, else from its name."""
    layer, _, leaf = name.rpartition(".")
    kind = type(module).__name__ if module is not None else ""
    if leaf in ("running_mean", "running_var"):
        return "statistics"
    if _SSM.search(name) and not isinstance(module, nn.Embedding):
        return "ssm"
    if leaf in ("weight_g", "original0"):
        return "gain"
    if _ADAPTER.search(name):
        return "adapter"
    flat = len(shape) < 2
    # A class that is not called so may stand under the name of one: of what it may hold there, gains are vectors.
    own = module is not None and flat and not type(module).__module__.startswith("torch.")
    named = layer if module is None else layer.rpartition(".")[2] if own else ""
    named_norm = _NORM.search(named) or _NORM.search(kind) or "Norm" in kind or isinstance(module, NORMS)
    # Spectral norm keeps noise in its buffers; frozen batch norm its gains.
    kept = not buffer or leaf in ("weight", "gamma", "scale", "bias", "beta")
    if named_norm and kept and (flat or isinstance(module, nn.LayerNorm)):
        return "bias" if "bias" in leaf or leaf == "beta" else "norm"
    if module is None and flat and leaf == "weight":  # of what has a weight, only normalisation keeps a vector
        return "norm"
    # A layer that multiplies is one, whatever it is named after.
    if leaf == "weight" and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return "weight"
    # What is learnt and broadcast over the batch is added to the inputs or stands beside them; a buffer may be a mask.
    broadcast = not buffer and len(shape) >= 3 and shape[0] == 1 and not re.search("weight|kernel", leaf)
    if _POSITION.search(name) or _TOKEN.search(leaf) or broadcast:
        return "position"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or (module is None and _EMBEDDING.search(layer)):
        return "embedding"
    if "bias" in leaf and (flat or not re.search("weight|kernel", leaf)):  # one a head, an expert or a direction
        return "bias"
    if own and not buffer and module is not None and normalises(module, leaf):
        return "norm"
    return "weight" if not buffer and not flat else "other"


def fans(shape: tuple[int, ...], module: nn.Module | None) -> tuple[int, int]:
    """Return how many inputs each output of a weight sums over, and how many outputs each input goes to."""
    if len(shape) < 2:
        return 1, 1
    kernel = math.prod(shape[2:])
    if is_transposed(module):
        return shape[0], shape[1]
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        window = max(1, kernel // math.prod(module.stride))
        return max(1, shape[0] * window // module.groups), shape[1] * kernel
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    return shape[1] * kernel, max(1, shape[0] * kernel // groups)
