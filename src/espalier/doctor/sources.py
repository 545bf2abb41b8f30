"""Where tensors come from, one at a time: a module, sharded or not, or a checkpoint that is never read whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.patient import Record, whole
from espalier.doctor.roles import fans, role_of
from espalier.doctor.stats import measure
from espalier.errors import EspalierError, told
from espalier.files import read_object, read_tensors, refuse_odd_names, require_regular
from espalier.init.layouts.registry import attribute
from espalier.init.matching import plain_name


@dataclass(frozen=True)
class Source(Mapping[str, Tensor]):
    """Tensors by name, each read, whole, when it is asked for; on a sharded model that is a collective call.

    Attributes:
        names: of every tensor, in the order in which to read them.
        read: returns a tensor as it lies, shard or not.
        config: the model's configuration; empty where there is none.
        owners: the module that holds each tensor; empty for a checkpoint.
        aliases: other names of tied tensors, by the name that is read.
    """

    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any]
    owners: Mapping[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """Return one whole tensor."""
        return whole(self.read(name))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.names)

    def record(self, name: str) -> Record:
        """Return one tensor's record, with its values and their numbers."""
        tensor, module = self.read(name), self.owners.get(name)
        lazy = nn.parameter.is_lazy(tensor)  # and has no shape to ask for
        shape, meta = () if lazy else tuple(tensor.shape), lazy or tensor.is_meta
        values = None if meta or not tensor.numel() else whole(tensor)
        buffer = name.endswith(("running_mean", "running_var", "inv_freq", "num_batches_tracked"))
        buffer = buffer or (module is not None and name.rpartition(".")[2] in module._buffers)
        # Numbers can be read as they lie: no quantised subclass, no sparse layout.
        plain = type(values) is Tensor and values.is_floating_point() and values.layout == torch.strided
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
            stats=measure(values) if plain and values is not None else None,
            values=values,
        )


def open_module(model: nn.Module) -> Source:
    """Return a module's parameters and buffers; a shard (DTensor) is gathered when its turn comes, then freed."""
    tensors: dict[str, Tensor] = {}
    owners: dict[str, nn.Module] = {}
    aliases: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{prefix}.{leaf}" if prefix else leaf
            # A part of the user's own may be called as wrappers call theirs.
            name = plain_name(full) if plain_name(full) not in tensors else full
            owner = first.setdefault(id(tensor), name)
            if owner == name:
                tensors[name], owners[name] = tensor, module
            else:
                aliases.setdefault(owner, []).append(name)
    return Source(tuple(tensors), tensors.__getitem__, _config_of(model), owners, aliases)


def open_weights(path: Path) -> Source:
    """Return a checkpoint's tensors; it is streamed, and no code in it runs.

    Args:
        path: a ``.safetensors`` file, a sharded ``*.index.json``, a folder that holds either (as on the hub), or a file
            that ``torch.save`` wrote (mapped into memory, read with ``weights_only=True``).

    Raises:
        EspalierError: nothing readable is there, two files hold a tensor of one name, or none holds one that the index
            names.
    """
    readers: dict[str, Callable[[str], Tensor]] = {}
    held: dict[str, Path] = {}
    files, stated = _find_weights(path)
    for file in files:
        found = _open_file(file)
        if twice := sorted(held.keys() & found.keys()):
            raise EspalierError(f"checkpoint {path}: {held[twice[0]]} and {file} both hold {twice[0]}: name one file")
        held |= dict.fromkeys(found, file)
        readers |= found
    if lost := sorted(stated - readers.keys()):
        raise EspalierError(f"checkpoint {path}: no file of its index holds {lost[0]}: fetch or save it again")
    if not readers:
        raise EspalierError(f"checkpoint {path}: holds no tensors by name: name a file of weights")
    try:
        config = read_object((path if path.is_dir() else path.parent) / "config.json")
    except (OSError, ValueError):
        config = {}
    return Source(tuple(readers), lambda name: readers[name](name), config)


def inside(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper (DDP, ``torch.compile``), or ``None`` where there is none."""
    parts = (attribute(model, name) for name in ("module", "_orig_mod"))
    # Not by its truth: a compiled module asks what it holds for its length.
    return next((part for part in parts if isinstance(part, nn.Module) and part is not model), None)


def _config_of(model: nn.Module) -> Mapping[str, Any]:
    inner = inside(model)
    if inner is not None and attribute(model, "config") is None:
        return _config_of(inner)
    config = attribute(model, "config")
    to_dict = getattr(config, "to_dict", None)
    stated = to_dict() if callable(to_dict) and not isinstance(config, Mapping) else config
    return stated if isinstance(stated, Mapping) else {}


def weight_files(path: Path) -> list[Path]:
    """Return the files of weights that a path names: itself, those of a sharded index, or those of a folder."""
    return _find_weights(path)[0]


def _find_weights(path: Path) -> tuple[list[Path], set[str]]:
    """Return files of weights, and the tensors that they must hold because an index says so."""
    if path.is_dir():
        # The sharded index first: without it a folder of shards would be read as one of them.
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "pytorch_model*.bin"):
            if found := sorted(path.glob(pattern)):
                if not pattern.endswith(".json"):
                    return found, set()
                if len(found) > 1:
                    raise EspalierError(f"checkpoint {path} has {len(found)} indexes, {found[0].name}, …: name one")
                return _find_weights(found[0])
        return [], set()
    if path.suffix == ".json":
        try:
            shards = dict(read_object(path)["weight_map"])
            files = sorted(set(shards.values()))
            odd = [file for file in files if file in ("", "..") or Path(file).name != file or "\\" in file]
        except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise EspalierError(f"index {path}: cannot be read ({told(error)}): name a sharded index") from None
        if odd:  # an index of a stranger's must not lead to other files of this machine
            raise EspalierError(f"index {path}: {odd[0]!r:.100} is no file beside it: name its shards without folders")
        return [path.parent / file for file in files], set(shards)
    return [path], set()


def _open_file(path: Path) -> dict[str, Callable[[str], Tensor]]:
    """Return what reads each tensor of a file; the file stays mapped, not loaded."""
    if path.suffix != ".safetensors":
        tensors = read_tensors(path, mapped=True)
        return dict.fromkeys(tensors, tensors.__getitem__)
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(path)
        file = ExitStack().enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EspalierError(f"checkpoint {path} cannot be read ({reason}): name a file of weights") from None
    refuse_odd_names(path, file.keys())
    return dict.fromkeys(file.keys(), file.get_tensor)
