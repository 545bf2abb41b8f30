"""Models from other libraries by name: ``espalier:vit``, ``timm:vit_tiny_patch16_224``, ``transformers:FOLDER``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from espalier.checkpoints.by_shape import skeleton
from espalier.doctor.sources import open_weights, weight_files
from espalier.errors import EspalierError, require, told, unknown_name
from espalier.files import load_weights, read_object, read_regular, read_tensors, require_regular
from espalier.init.layouts.linears import HEADS
from espalier.lookup import is_reference
from espalier.models import MODELS, build_model
from espalier.models.hub import open_hub_model
from espalier.randomness import seeded_globally

T = TypeVar("T")


def open_host_model(spec: str, generator: torch.Generator | None = None) -> nn.Module:
    """Build the model that ``HOST:NAME`` names.

    | spec | weights |
    |---|---|
    | ``espalier:vit`` | initial |
    | ``espalier:ORG/NAME`` | pre-trained, from the hub (``push_to_hub``) |
    | ``timm:vit_tiny_patch16_224`` | timm's initial ones |
    | ``timm:vit_tiny_patch16_224.augreg_in21k``, ``timm:hf-hub:ORG/NAME`` | pre-trained: the tag says which |
    | ``transformers:FOLDER`` | pre-trained if a safetensors file lies in it, else initial |
    | ``transformers:ORG/NAME`` | pre-trained, from the hub |

    What was downloaded before is read from the hub's cache; with ``HF_HUB_OFFLINE=1`` from there alone. No code of a
    repository is run.

    Args:
        spec: see the table.
        generator: source of all initial weights; torch's global state if none is given.

    Raises:
        EspalierError: an unknown host or name, a file that does not exist, a folder without a readable
            ``config.json``, or weights that neither the hub nor its cache gives.
        MissingExtraError: the host library is not installed.
    """
    if generator is not None:  # no constructor takes one: what the libraries draw from is the global state
        with seeded_globally(generator):
            return open_host_model(spec)
    host, _, name = spec.partition(":")
    if host == "espalier":
        if "/" in name:
            return open_hub_model(name)
        if name not in MODELS:
            raise unknown_name("model", name, MODELS)
        return build_model(name)
    if host == "timm":
        return _open_timm(name)
    if host == "transformers":
        return _open_transformers(name)
    libraries = ("espalier", "timm", "transformers")
    if host != spec and get_close_matches(host, libraries):
        raise unknown_name("library", host, libraries)
    # A mistyped path, which may have a colon in it.
    raise EspalierError(
        f"model {spec!r}: no such file or folder: name one that exists, or write espalier:NAME, timm:NAME or "
        "transformers:FOLDER"
    )


def _open_timm(name: str) -> nn.Module:
    timm = require("timm", "timm")
    if name.startswith("hf-hub:"):
        return _fetched(name, lambda: timm.create_model(name, pretrained=True))
    architecture, tagged, _ = name.partition(".")
    if architecture not in timm.list_models():
        raise unknown_name("timm model", architecture, timm.list_models())
    if not tagged:
        return timm.create_model(name, pretrained=False)
    tags = timm.list_pretrained(f"{architecture}.*")
    if name not in tags:
        raise unknown_name("timm weights", name, tags)
    return _fetched(name, lambda: timm.create_model(name, pretrained=True))


def _open_transformers(name: str) -> nn.Module:
    transformers = require("transformers", "transformers")
    folder = Path(name)
    fetch = not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    config_file = folder / "config.json"
    if fetch:
        hub = require("huggingface_hub", "hub")
        config_file = Path(_fetched(name, lambda: hub.hf_hub_download(name, "config.json")))
    try:
        architectures = read_object(config_file).get("architectures") or []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EspalierError(
            f"model {name}: cannot read {config_file} ({reason}): name a folder that has one, or ORG/NAME on the hub"
        ) from None
    # Only classes that the installed library ships: a folder must not bring code of its own.
    known = [getattr(transformers, name) for name in architectures if hasattr(transformers, name)]
    cls = known[0] if known else transformers.AutoModel
    if fetch:
        return _fetched(name, lambda: cls.from_pretrained(name, use_safetensors=True))
    if weights := list(folder.glob("*.safetensors")):
        try:
            for file in weights:
                require_regular(file)
        except OSError as error:
            said = f"cannot read {error.filename} ({error.strerror})"
            raise EspalierError(f"model {name}: {said}: name a folder with whole weights") from None
        return _fetched(
            name, lambda: cls.from_pretrained(folder, use_safetensors=True, local_files_only=True), "its folder"
        )

    def build() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        return cls(config) if known else transformers.AutoModel.from_config(config)

    return _fetched(name, build, "its folder")


def _fetched(name: str, fetch: Callable[[], T], place: str = "the hub or its cache") -> T:
    """Return what ``fetch`` brings from a place; whatever stops it becomes one line."""
    try:
        return fetch()
    except Exception as error:  # the hub's own errors, its HTTP client's, and those of files that are not what they say
        said = " ".join(str(error).split()) or type(error).__name__
        raise EspalierError(f"model {name!r} cannot be had from {place}: {said}") from error


def open_checkpoint(path: Path, num_heads: int | None = None) -> nn.Module:
    """Return the model whose weights a file holds, where something says which; else modules enough to audit and fit.

    A run folder says it in ``model.json`` beside the weights, an exported file in its own metadata. Only models of
    ours are built so, and none that is larger than the file: whoever made it may be a stranger, and a reference to code
    (``package.module:NAME``) would run that.

    Args:
        path: a ``.safetensors`` file, one that ``torch.save`` wrote (read with ``weights_only=True``), a sharded
            ``*.index.json``, or a folder that holds either.
        num_heads: query heads of every attention layer; a ``config.json`` beside the weights says it otherwise.

    Raises:
        EspalierError: the file cannot be read safely, or holds no tensors by name.
    """
    if (files := weight_files(path)) != [path]:
        if len(files) != 1:
            return skeleton(dict(open_weights(path)), num_heads or _stated_heads(_folder_of(path) / "config.json"))
        path = files[0]
    state = read_tensors(path)
    stated = _stated_model(path)
    if stated is not None and not is_reference(stated["name"]):
        with _no_larger_than(state, path):
            model = build_model(stated["name"], **stated["args"])
        if model.state_dict().keys() == state.keys():
            load_weights(model, path)
            return model.eval()
    return skeleton(state, num_heads or _stated_heads(path.with_name("config.json")))


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


@contextmanager
def _no_larger_than(state: Mapping[str, Tensor], path: Path) -> Iterator[None]:
    """Stop the building of a model that goes far beyond the tensors of a file."""
    # A tied weight is registered up to three times: twice while it is made, once when it is tied.
    most, numbers = 3 * len(state) + 8, 3 * sum(tensor.numel() for tensor in state.values()) + 1000

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal most, numbers
        if parameter is not None:
            most, numbers = most - 1, numbers - parameter.numel()
        if most < 0 or numbers < 0:
            raise EspalierError(f"checkpoint {path} states a model larger than itself: see its metadata or model.json")

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _stated_model(path: Path) -> dict[str, Any] | None:
    from safetensors import safe_open

    text: str | None = None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("espalier")
    beside = path.with_name("model.json")
    try:
        text = text if text is not None or not beside.exists() else read_regular(beside).decode()
        content = None if text is None else json.loads(text)
        return None if content is None else {"name": str(content["name"]), "args": dict(content["args"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EspalierError(f"what {path} says of its model is damaged ({told(error)}): see {beside.name}") from None


def _stated_heads(config_file: Path) -> int | None:
    try:
        config = read_object(config_file)
    except (OSError, ValueError):
        return None
    found = [config.get(name) for name in HEADS]
    return next((heads for heads in found if type(heads) is int and heads > 0), None)
