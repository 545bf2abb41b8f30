"""ConvMixer checkpoints of every origin: the paper's ``nn.Sequential``, timm's class and ours, both ways, bit for bit.

| module | paper | timm and ours |
|---|---|---|
| patch embedding: convolution, norm | ``0``, ``2`` | ``stem.0``, ``stem.2`` |
| block i of d | ``3 + i`` | ``blocks.i`` |
| head | ``3 + d + 2`` | ``head`` |

Inside a block the names are the same. ``"espalier"`` and ``"timm"`` mean one layout under two names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.errors import EspalierError, unknown_name
from espalier.files import read_tensors
from espalier.init.matching import plain_name
from espalier.models.convmixer import ConvMixer

LAYOUTS = ("espalier", "timm", "original")
State = dict[str, Tensor]

_STEM_MODULES = 3
# Between the last block and the head of the original stand the pooling and the flattening.
_MODULES_BEFORE_HEAD = 2
_PLACE = re.compile(r"((?:stem\.|blocks\.)?\d+|head)(?:\.|$)")
_OWN = re.compile(r"(\d+|stem|blocks|head)(\.|$)")  # how a name begins that nothing holds
_SHOWN = 3


def load_checkpoint_file(path: str | Path) -> State:
    """Read a ConvMixer checkpoint and return its weights under our names, checked against the model they belong to.

    Files that end in ``.safetensors`` are read as such, all others by ``torch.load(weights_only=True)``: code in them
    is not run. Weights may lie under ``state_dict``, ``model`` or their averaged counterparts, and under the names
    that DDP (``module.``), torch.compile and other wrappers give them, or one under which another module, such as a
    Lightning one, held the whole net.

    Args:
        path: the file.

    Raises:
        EspalierError: it cannot be read, or is no whole ConvMixer; the message says what is missing or unexpected.
    """
    path = Path(path)
    state = read_tensors(path)
    counter = state.get("n_averaged")
    if counter is not None and counter.ndim == 0:  # of torch's AveragedModel
        del state["n_averaged"]
    plain = {plain_name(name): tensor for name, tensor in state.items()}
    state = plain if len(plain) == len(state) else state
    bare = state
    while not any(map(_OWN.match, bare)) and len({name.partition(".")[0] for name in bare if "." in name}) == 1:
        bare = {name.partition(".")[2] or name: tensor for name, tensor in bare.items()}
    try:
        state = convert_state(bare if any(map(_OWN.match, bare)) else state, "espalier")
        with torch.device("meta"):
            expected = ConvMixer(**model_arguments(state)).state_dict()
        _refuse_misfits(state, expected)
    except EspalierError as error:
        raise EspalierError(f"checkpoint {path}: {error}") from None
    return state


def load_model(path: str | Path, activation: str = "gelu") -> ConvMixer:
    """Build the ConvMixer that a checkpoint file belongs to, with its weights, in evaluation mode.

    Args:
        path: the file, in any of the layouts.
        activation: which the weights do not tell: ``"relu"`` for the published 768/32, ``"gelu"`` for the others.

    Raises:
        EspalierError: see ``load_checkpoint_file``.
    """
    state = load_checkpoint_file(path)
    model = ConvMixer(**model_arguments(state), activation=activation)
    model.load_state_dict(state)
    return model.eval()


def convert_state(state: Mapping[str, Tensor], to: str) -> State:
    """Return the same tensors under the names of another layout, in the same order.

    Args:
        state: weights of a ConvMixer in any layout.
        to: ``"espalier"``, ``"timm"`` or ``"original"``.

    Raises:
        EspalierError: an unknown layout, or names that are no ConvMixer's.
    """
    if to not in LAYOUTS:
        raise unknown_name("layout", to, LAYOUTS)
    original = any(re.match(r"\d+\.", name) for name in state)
    depth = _depth(state, original)
    if original == (to == "original"):
        return dict(state)
    numbers = {f"stem.{index}": str(index) for index in range(_STEM_MODULES)}
    numbers |= {f"blocks.{index}": str(_STEM_MODULES + index) for index in range(depth)}
    numbers["head"] = str(_STEM_MODULES + depth + _MODULES_BEFORE_HEAD)
    places = {number: place for place, number in numbers.items()} if original else numbers
    converted = {}
    for name, tensor in state.items():
        found = _PLACE.match(name)
        place = found[1] if found else ""
        # A number that is not ours keeps its name: whoever loads the weights reports it as unexpected.
        if place not in places and not (original and place.isdigit()):
            raise EspalierError(f"unexpected {name}: a ConvMixer has stem, blocks and head, or numbers throughout")
        converted[places.get(place, place) + name.removeprefix(place)] = tensor
    return converted


def model_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of ``ConvMixer`` that weights under our names give away: all but the activation.

    Raises:
        EspalierError: the names that they are read from are missing.
    """
    depth = _depth(state, original=False)
    try:
        stem, mixer = state["stem.0.weight"], state["blocks.0.0.fn.0.weight"]
        head = state.get("head.weight")
        return {
            "dim": stem.shape[0],
            "depth": depth,
            "kernel_size": mixer.shape[2],
            "patch_size": stem.shape[2],
            "in_chans": stem.shape[1],
            "num_classes": 0 if head is None else head.shape[0],
            "spatial_dims": stem.ndim - 2,
        }
    except KeyError as error:
        raise EspalierError(f"it is no ConvMixer's: {error.args[0]} is missing") from None
    except IndexError:
        raise EspalierError("it is no ConvMixer's: stem.0.weight and blocks.0.0.fn.0.weight are no kernels") from None


def _depth(state: Mapping[str, Tensor], original: bool) -> int:
    pattern = r"(\d{1,9})\.0\.fn\.0\.weight" if original else r"blocks\.(\d{1,9})\.0\.fn\.0\.weight"
    blocks = [int(found[1]) for name in state if (found := re.fullmatch(pattern, name))]
    if not blocks:
        raise EspalierError(f"it is no ConvMixer's: it has no block, only {_some(state) or 'nothing'}")
    depth = max(blocks) + 1 - (_STEM_MODULES if original else 0)
    if depth > len(state):
        raise EspalierError(f"it is no ConvMixer's: its names count {depth} blocks, and it holds {len(state)} tensors")
    return depth


def _refuse_misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    # Files from before torch 0.4.1 lack the counters; nothing but a momentum of None reads them.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    present = [(name, expected[name], state[name]) for name in expected if name in state]
    wrong = [f"{n} {tuple(t.shape)} for {tuple(want.shape)}" for n, want, t in present if t.shape != want.shape]
    unreal = [n for n, want, t in present if t.is_complex() or want.is_floating_point() > t.is_floating_point()]
    found = (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", wrong), ("no real numbers", unreal),
    )  # fmt: skip
    if any(names for _, names in found):
        raise EspalierError("; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in found if names))


def _some(names: Any) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")
