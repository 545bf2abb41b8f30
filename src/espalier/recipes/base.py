"""The recipe: one frozen dataclass that holds everything that shapes a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from espalier.errors import EspalierError, require_known
from espalier.lookup import errors_of, is_reference, load


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes one run, flat, so that any field can be changed by name (`--lr 1e-3`).

    The recipe is saved resolved beside the run and is enough to repeat it.
    """

    name: str
    """The recipe's name."""

    # What is learnt.
    dataset: str = "digits"
    """Name of the data set, as `espalier datasets` lists them, or your own function: `FILE.py:NAME`."""
    data_path: str | None = None
    """File or folder of the data, where it is not bundled or generated; `--data` for short."""
    data_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the source: `train_limit`, or the sizes of a synthetic task."""
    loss: Literal["cross_entropy", "multi_margin", "tempered_cross_entropy", "logit_annealing"] = "cross_entropy"
    """What is minimised."""
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the loss: `margin`, `temperature`, `offset`, `beta`."""
    label_smoothing: float = 0.0
    """Share of the probability spread over all classes."""

    # The network.
    model: str = "vit"
    """Name of the model, as `espalier models` lists them, or your own: `FILE.py:NAME`, `package.module:NAME`."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model; they win over those that the data fixes."""

    # The structure written into it before training.
    init: str = "default"
    """Name of the initialisation, as `espalier inits` lists them, or your own function: `FILE.py:NAME`."""
    init_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the initialisation."""
    freeze: Literal["", "depthwise"] = ""
    """Parameters that stay at their initial values and leave the optimiser."""

    # Optimisation.
    optimizer: Literal["adamw", "adam", "nadam", "muon"] = "adamw"
    """AdamW (weight decay apart from the gradient), Adam or NAdam (weight decay added to the gradient), or Muon for the
    matrices of linear layers inside the network, scaled to AdamW's rates, and AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay, on all parameters but those that the model exempts."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    schedule: Literal["cosine", "piecewise", "constant"] = "cosine"
    """`cosine` to zero after the warm-up, or the papers' 0 → lr at 2E/5 → lr/20 at 4E/5 → 0."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine."""
    epochs: int = 10
    """Passes over the training set, or blocks of generated steps."""
    batch_size: int = 128
    """Examples per optimiser step."""
    accumulate: int = 1
    """Micro-batches per optimiser step; `batch_size` counts all of them."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are then evaluated; 0 keeps none."""
    precision: Literal["32", "bf16"] = "32"
    """Arithmetic of the forward pass; parameters stay in float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep images and convolutions in the channels-last layout."""

    # Augmentation of images, batched on the device.
    crop_padding: int = 0
    """Pixels of padding before a random crop back to size; 0 does not crop."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Area range of a random resized crop; (1, 1) does not resize."""
    flip: bool = False
    """Flip images left to right at random."""
    randaugment: tuple[int, int] | None = None
    """(operations, magnitude), e.g. (2, 12)."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle of an image."""
    mixup: float = 0.0
    """Beta parameter of mixup; 0 does not mix."""
    cutmix: float = 0.0
    """Beta parameter of cutmix; 0 does not paste."""
    normalize: Literal["mean_std", "mean", "none"] = "mean_std"
    """What is done to pixels in [0, 1]: per channel, from the training set."""

    # The run.
    seed: int = 0
    """Seed of the weights, the order of the data and the augmentation."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    eval_batch_size: int = 500
    """Examples per evaluation batch."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    logger: Literal["", "csv", "tensorboard", "wandb"] = ""
    """Where the rows of metrics.jsonl go as well: files in the run folder's `logs`, or Weights & Biases."""
    threads: int = 0
    """CPU threads of this run, 1 in recipes whose steps take milliseconds; 0 leaves torch's choice."""


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
    """Return the recipe called ``name``, or the one that a function of your own returns, ``FILE.py:NAME``.

    Raises:
        EspalierError: no recipe has that name; the message suggests the closest ones. Or the function fails.
    """
    if is_reference(name):
        function = load("recipe", name)
        with errors_of("recipe", name):
            recipe = function()
        if not isinstance(recipe, Recipe):
            raise EspalierError(f"recipe {name} returned {type(recipe).__name__}: return an espalier.recipes.Recipe")
        return recipe
    require_known("recipe", name, _RECIPES)
    return _RECIPES[name]()
