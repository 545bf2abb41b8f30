"""Our models on the Hugging Face Hub: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

huggingface_hub is imported at the first call of one of the three, so a model class is a subclass of ours alone; for the
length of the call it is one of ``PyTorchModelHubMixin`` too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import nn

from espalier.errors import EspalierError, require, unknown_name
from espalier.files import read_object, require_regular

CLASS_KEY = "espalier_model"
CLASSES: dict[str, type[HubModel]] = {}
"""Every model that can be shared, by the name of its class."""


class HubModel(nn.Module):
    """A model that knows the arguments it was made with, and can therefore be shared with its weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the class known by its name."""
        super().__init_subclass__(**options)
        CLASSES.setdefault(cls.__name__, cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments; copies and unpickled models are made without and get theirs from the original."""
        model = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(model, *args, **kwargs)
        except TypeError:  # __init__ says it in its own words
            return model
        bound.apply_defaults()
        model.__dict__["_arguments"] = dict(list(bound.arguments.items())[1:])
        return model

    def save_pretrained(self, folder: str | Path, *, card: str = "", **options: Any) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card ``README.md`` into a folder.

        Args:
            folder: it is made if need be; a README.md that it holds stays.
            card: text of the model card, such as ``espalier.integrations.hub.model_card(run)``.
            options: those of huggingface_hub's ``save_pretrained``: ``push_to_hub=True, repo_id="ORG/NAME"`` …

        Raises:
            EspalierError: an argument of the model is no JSON, so that it could not be made again.
            MissingExtraError: huggingface_hub is not installed.
        """
        with self._as_mixin() as model:
            return model.save_pretrained(folder, model_card_kwargs={"text": card}, **options)

    def push_to_hub(self, repo_id: str, *, card: str = "", **options: Any) -> str:
        """Upload what ``save_pretrained`` writes to ``ORG/NAME`` and return the address of the commit.

        Args:
            repo_id: the repository, made if need be.
            card: text of the model card.
            options: those of huggingface_hub's ``push_to_hub``: ``private=True``, ``token``, ``branch`` …
        """
        with self._as_mixin() as model:
            return model.push_to_hub(repo_id, model_card_kwargs={"text": card}, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """Return the model of a folder or of ``ORG/NAME`` on the hub, with its weights, in evaluation mode.

        Args:
            name: what ``save_pretrained`` wrote, or ``push_to_hub`` uploaded.
            options: those of huggingface_hub's ``from_pretrained``: ``revision``, ``local_files_only``, ``cache_dir`` …

        Raises:
            EspalierError: nothing is there, neither on the hub nor in its cache, or it is another model's.
            MissingExtraError: huggingface_hub is not installed.
        """
        mixed = _mixed(cls)
        try:
            for file in ("config.json", "model.safetensors"):
                if Path(name, file).exists():
                    require_regular(Path(name, file))
            model = mixed.from_pretrained(str(name), **{"strict": True, **options})
        except Exception as error:  # of the hub, of its HTTP client, of the constructor, of load_state_dict
            said = str(error).strip() or type(error).__name__
            raise EspalierError(f"{cls.__name__} from {str(name)!r}: {' '.join(said.split())}") from error
        read = model.__dict__.pop("_hub_mixin_config")
        model.__dict__["_arguments"] = {key: value for key, value in read.items() if key != CLASS_KEY}
        model.__class__ = cls
        return model

    @contextmanager
    def _as_mixin(self) -> Iterator[Any]:
        cls, arguments = type(self), self.__dict__["_arguments"]
        for name in ("num_classes", "global_pool", "flip_average"):  # reset_classifier or its user may have changed it
            if name in arguments and name in self.__dict__:
                arguments[name] = self.__dict__[name]
        blocks = self._modules.get("blocks")
        if "depth" in arguments and isinstance(blocks, nn.Sequential | nn.ModuleList):
            arguments["depth"] = len(blocks)  # some may have been pruned
        mixed = _mixed(cls)
        try:
            json.dumps(arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EspalierError(
                f"{cls.__name__}: its arguments are no JSON ({error}): make it from plain values"
            ) from None
        self.__dict__["_hub_mixin_config"] = {**arguments, CLASS_KEY: cls.__name__}
        self.__class__ = mixed
        try:
            yield self
        finally:
            self.__class__ = cls
            del self.__dict__["_hub_mixin_config"]


def open_hub_model(name: str, **options: Any) -> HubModel:
    """Return the model of ``ORG/NAME`` whose class its ``config.json`` names.

    Args:
        name: repository on the hub, or a folder.
        options: of ``from_pretrained``.

    Raises:
        EspalierError: nothing is there, or the configuration names none of our classes.
    """
    hub = require("huggingface_hub", "hub")
    try:
        file = Path(name, "config.json") if Path(name).is_dir() else hub.hf_hub_download(name, "config.json", **options)
        named = read_object(Path(file)).get(CLASS_KEY, "")
    except Exception as error:
        raise EspalierError(f"model {name!r}: {' '.join(str(error).split())}") from error
    if named not in CLASSES:
        raise unknown_name(f"{CLASS_KEY} of {name}", named, CLASSES)
    return CLASSES[named].from_pretrained(name, **options)


_MIXED: dict[type[HubModel], Any] = {}


def _mixed(cls: type[HubModel]) -> Any:
    """Return the class with huggingface_hub's mixin before it, under its own name; always the same."""
    if cls in _MIXED:
        return _MIXED[cls]
    hub = require("huggingface_hub", "hub")

    def generate_model_card(self: Any, text: str = "", **_: Any) -> Any:
        data = hub.ModelCardData(library_name="espalier", tags=["espalier", "pytorch_model_hub_mixin"])
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments.items())
        text = text or f"# {cls.__name__}\n\nMade with `{cls.__name__}({arguments})`.\n"
        usage = f"```python\nmodel = espalier.models.{cls.__name__}.from_pretrained('ORG/NAME')\n```\n"
        return hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n{usage}")

    body = {"generate_model_card": generate_model_card, "__module__": cls.__module__}
    _MIXED[cls] = type(cls.__name__, (hub.PyTorchModelHubMixin, cls), body, library_name="espalier")
    return _MIXED[cls]
