"""The recipe: one frozen dataclass that holds everything that shapes a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from espalier.errors import unknown_name


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes one run, flat, so that any field can be changed by name (``--lr 1e-3``).

    The recipe is saved resolved beside the run and is enough to repeat it.
    """

    name: str

    # What is learnt.
    data: str = "digits"
    """Name of the data source (see ``espalier.data.SOURCES``)."""
    data_path: str | None = None
    """File or folder of the data, for sources that are not bundled."""
    data_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the source: ``train_limit``, or the sizes of a synthetic task."""
    loss: Literal["cross_entropy", "multi_margin", "tempered_cross_entropy"] = "cross_entropy"
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0

    # The network.
    model: str = "vit"
    """Name of the model (see ``espalier.models.MODELS``)."""
    model_args: Mapping[str, Any] = field(default_factory=dict)

    # The structure written into it before training.
    init: str = "default"
    """Name of the initialisation (see ``espalier.recipes.INITS``)."""
    init_args: Mapping[str, Any] = field(default_factory=dict)
    freeze: Literal["", "depthwise"] = ""
    """Parameters that stay at their initial values and leave the optimiser."""

    # Optimisation.
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["cosine", "piecewise", "constant"] = "cosine"
    """``cosine`` to zero after the warm-up, or the papers' 0 → lr at 2E/5 → lr/20 at 4E/5 → 0."""
    warmup_epochs: float = 0.0
    epochs: int = 10
    batch_size: int = 128
    accumulate: int = 1
    """Micro-batches per optimiser step; ``batch_size`` counts all of them."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are then evaluated; 0 keeps none."""
    precision: Literal["32", "bf16"] = "32"
    compile: bool = False
    channels_last: bool = False

    # Augmentation of images, batched on the device.
    crop_padding: int = 0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Area range of a random resized crop; (1, 1) does not resize."""
    flip: bool = False
    randaugment: tuple[int, int] | None = None
    """(operations, magnitude), e.g. (2, 12)."""
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    normalize: Literal["mean_std", "mean", "none"] = "mean_std"

    # The run.
    seed: int = 0
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_batch_size: int = 500
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    threads: int = 0
    """CPU threads of this run; 0 leaves torch's choice."""


_RECIPES: dict[str, Callable[[], Recipe]] = {}


def register_recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Make a recipe function known by its name (decorator).

    Raises:
        ValueError: the name is already taken, or the recipe it returns bears another name.
    """
    name = function.__name__
    if name in _RECIPES:
        raise ValueError(f"recipe {name!r} is already registered: choose another name")
    if function().name != name:
        raise ValueError(f"recipe function {name!r} returns a recipe named {function().name!r}: make them equal")
    _RECIPES[name] = function
    return function


def recipe_functions() -> dict[str, Callable[[], Recipe]]:
    """Return every registered recipe function by name."""
    return dict(_RECIPES)


def get_recipe(name: str) -> Recipe:
    """Return the recipe called ``name``.

    Raises:
        EspalierError: no recipe has that name; the message suggests the closest ones.
    """
    if name not in _RECIPES:
        raise unknown_name("recipe", name, _RECIPES)
    return _RECIPES[name]()
