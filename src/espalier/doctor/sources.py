"""Where tensors come from, one at a time: a module, sharded or not, or a checkpoint that is never read whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from espalier.doctor.record import Record, fans, plain_name, role_of
from espalier.errors import EspalierError
from espalier.files import read_object, read_tensors, require_regular


@dataclass(frozen=True)
class Source:
    """Tensors by name, each read when it is asked for.

    Attributes:
        names: of every tensor, in the order in which to read them.
        load: returns one whole tensor; on a sharded model a collective call.
        record: returns one tensor's record, with its values.
        config: the model's configuration; empty where there is none.
        aliases: other names of tied tensors, by the name that is read.
    """

    names: tuple[str, ...]
    load: Callable[[str], Tensor]
    record: Callable[[str], Record]
    config: Mapping[str, Any]
    aliases: Mapping[str, list[str]]


def open_module(model: nn.Module) -> Source:
    """Return a module's parameters and buffers; a shard (DTensor) is gathered when its turn comes, then freed."""
    places: dict[str, tuple[nn.Module, Tensor, bool]] = {}
    aliases: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for prefix, module in model.named_modules():
        parts: list[tuple[dict[str, Any], bool]] = [(module._parameters, False), (module._buffers, True)]
        for tensors, buffer in parts:
            for leaf, tensor in tensors.items():
                if tensor is None:
                    continue
                full = f"{prefix}.{leaf}" if prefix else leaf
                # A part of the user's own may be called as wrappers call theirs.
                name = plain_name(full) if plain_name(full) not in places else full
                owner = first.setdefault(id(tensor), name)
                if owner == name:
                    places[name] = (module, tensor, buffer)
                else:
                    aliases.setdefault(owner, []).append(name)
    return Source(
        tuple(places),
        lambda name: _whole(places[name][1]),
        lambda name: _record(name, places[name][1], places[name][0], buffer=places[name][2]),
        _config_of(model),
        aliases,
    )


def open_weights(path: Path) -> Source:
    """Return a checkpoint's tensors; it is streamed, and no code in it runs.

    Args:
        path: a ``.safetensors`` file, a sharded ``*.index.json``, a folder that holds either (as on the hub), or a file
            that ``torch.save`` wrote (mapped into memory, read with ``weights_only=True``).

    Raises:
        EspalierError: nothing readable is there.
    """
    readers = {name: read for file in weight_files(path) for names, read in [_open_file(file)] for name in names}
    if not readers:
        raise EspalierError(f"checkpoint {path}: holds no tensors by name: name a file of weights")
    folder = path if path.is_dir() else path.parent
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError):
        config = {}
    return Source(
        tuple(readers),
        lambda name: readers[name](name),
        lambda name: _record(name, readers[name](name), None, buffer=False),
        config,
        {},
    )


def _record(name: str, tensor: Tensor, module: nn.Module | None, *, buffer: bool) -> Record:
    lazy = nn.parameter.is_lazy(tensor)  # and has no shape to ask for
    shape, meta = () if lazy else tuple(tensor.shape), lazy or tensor.is_meta
    buffer = buffer or name.endswith(("running_mean", "running_var", "inv_freq", "num_batches_tracked"))
    return Record(
        name,
        role_of(name, shape, module, buffer=buffer),
        shape,
        tensor.dtype,
        buffer=buffer,
        trainable=tensor.requires_grad,
        meta=meta,
        fans=fans(shape, module),
        module=module,
        values=None if meta or not tensor.numel() else _whole(tensor),
    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def _config_of(model: nn.Module) -> Mapping[str, Any]:
    inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module) and not hasattr(model, "config"):
        return _config_of(inner)
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    return to_dict() if callable(to_dict) else {}


def weight_files(path: Path) -> list[Path]:
    """Return the files of weights that a path names: itself, those of a sharded index, or those of a folder."""
    if path.is_dir():
        # The sharded index first: without it a folder of shards would be read as one of them.
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "pytorch_model*.bin"):
            if found := sorted(path.glob(pattern)):
                return weight_files(found[0]) if pattern.endswith(".json") else found
        return []
    if path.suffix == ".json":
        try:
            return sorted({path.parent / file for file in read_object(path)["weight_map"].values()})
        except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise EspalierError(f"index {path}: cannot be read ({error!r}): name a sharded index") from None
    return [path]


def _open_file(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Return the names in a file and a function that reads one of them; the file stays mapped, not loaded."""
    if path.suffix != ".safetensors":
        tensors = read_tensors(path, mapped=True)
        return list(tensors), tensors.__getitem__
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(path)
        file = ExitStack().enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EspalierError(f"checkpoint {path} cannot be read ({reason}): name a file of weights") from None
    return list(file.keys()), file.get_tensor
