"""From a recipe to a model with its structure in it, and a record of where that happened."""

from __future__ import annotations

import inspect
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from espalier import data, models, recipes
from espalier.annotations import refuse_misfits
from espalier.data.source import Source
from espalier.errors import EspalierError
from espalier.lookup import errors_of, held_files, is_reference, without_pin
from espalier.memory import free_memory
from espalier.randomness import derive_generator, seeded_globally
from espalier.recipes.base import Recipe
from espalier.train.losses import build_loss
from espalier.train.muon import MuonAdamW, hidden_matrices

if TYPE_CHECKING:
    from espalier.init import StructureReport

_PACKAGES = ("espalier", "torch", "numpy", "safetensors", "lightning-fabric", "kornia", "scikit-learn", "transformers")


def build_run_source(recipe: Recipe) -> Source:
    """Return the data of a run.

    Raises:
        EspalierError: data that cannot be read, or fewer training examples than a batch has.
    """
    source = data.build_source(recipe)
    if source.steps_per_epoch(recipe.batch_size) < 1:
        raise EspalierError(f"batch_size {recipe.batch_size} is larger than the training set: choose a smaller one")
    return source


def build_run_model(recipe: Recipe, source: Source) -> tuple[nn.Module, StructureReport | None]:
    """Build the model of a run, on the CPU, with its structure written into it and its frozen parameters frozen.

    The weights come from the stream (seed, "weights") and the structure from (seed, "structure"), so that the arms of
    one seed share every weight that their structure does not touch.

    Args:
        recipe: the run.
        source: its data, which fixes some of the model's arguments; the recipe's own win.

    Returns:
        The model, and the report of what was written (None for the default initialisation).

    Raises:
        EspalierError: unknown model, initialisation or argument; a model that does not fit its data, tried on one
            example; or one that has nothing to freeze, or that the optimiser refuses. Or a file that is not the one
            that it was planned with.
    """
    initialise, arguments = recipes.get_init(recipe.init), held_files("init_args", recipe.init_args)
    model = build_bare_model(recipe, resolved_model_args(recipe, source))
    structure = derive_generator(recipe.seed, "structure")
    try:
        inspect.signature(initialise).bind(model, generator=structure, **arguments)
    except TypeError as error:
        raise EspalierError(f"init_args {arguments} do not fit init {recipe.init!r}: {error}") from error
    refuse_misfits(f"init {without_pin(recipe.init)!r}", initialise, arguments)
    given, before = f" with {arguments}" if arguments else "", _shapes(model)
    with seeded_globally(structure):  # code of the user's own may draw from the global stream
        with errors_of("init", f"{recipe.init}{given}"):
            report = initialise(model, generator=structure, **arguments)
        # A run is read back by the model's own function, which knows nothing of parts that came later.
        if changed := sorted(name for name, _ in before.items() ^ _shapes(model).items() if before.get(name) != ""):
            raise EspalierError(
                f"init {without_pin(recipe.init)} adds, removes or replaces {changed[0]}: let it write into what "
                "is there, and change the model's parts in a function for --model"
            )
        _refuse_unsavable(model, recipe)
        _try_on_one_example(model, source, recipe)
    freeze_(model, recipe)
    build_optimizer(model, recipe)  # it may refuse the model, and nothing is written or trained yet
    return model, report


def _shapes(model: nn.Module) -> dict[str, str]:
    """Return type and shape of every tensor of a model's state that has one, by name."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: "" if is_lazy(tensor) else f"{tensor.dtype} {tensor.shape}" for name, tensor in state.items()}


def _refuse_unsavable(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a model with parts that no file of the run would hold: a resumed run would go on without them."""
    from safetensors.torch import save

    named = f"model {without_pin(recipe.model)}"
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            where = f"layer {name!r}" if name else "it"
            raise EspalierError(
                f"{named}: {where} has a get_extra_state, which no run keeps: keep its state in buffers"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        try:
            save({name: torch.empty(0, dtype=tensor.dtype)})
        except KeyError:
            raise EspalierError(
                f"{named}: {name} is of {tensor.dtype}, which no file of weights holds: use another"
            ) from None


@torch.no_grad()
def _try_on_one_example(model: nn.Module, source: Source, recipe: Recipe) -> None:
    _try(model, next(iter(source.eval_batches(source.eval_splits[0], 1))), source, recipe)
    # Training data of the user's own may be of another kind than what they evaluate on.
    if is_reference(recipe.dataset) and source.steps_per_epoch(recipe.batch_size):
        inputs, targets = source.train_batch(recipe.seed, 0, 0, recipe.batch_size)
        _try(model, (inputs[:1], targets[:1]), source, recipe, " (training)")


def _try(model: nn.Module, example: tuple[Tensor, Tensor], source: Source, recipe: Recipe, part: str = "") -> None:
    inputs, targets = example
    name = without_pin(recipe.model)
    with errors_of("model", f"{name} on dataset {without_pin(recipe.dataset)}{part}"):
        outputs = model.eval()(inputs)
        model.train()
    wanted = targets.shape[: -1 if targets.is_floating_point() else None]
    if not isinstance(outputs, Tensor) or outputs.shape[:-1] != wanted:
        shown = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise EspalierError(
            f"model {name} returns {shown} for targets of shape {tuple(targets.shape)}{part}: return logits, one score "
            "a class for every target"
        )
    known = source.model_args.get("num_classes") or source.model_args.get("vocab_size")
    classes = targets.shape[-1] if targets.is_floating_point() else known or int(targets.max()) + 1
    if outputs.shape[-1] < classes or (targets.is_floating_point() and outputs.shape[-1] != classes):
        raise EspalierError(
            f"model {name} returns {outputs.shape[-1]} scores, and there are {classes} classes: give it as many "
            "classes as the data have"
        )
    with errors_of("loss", f"{recipe.loss} with {dict(recipe.loss_args)}{part}"):
        build_loss(recipe)(outputs, targets)


def resolved_model_args(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return the model's arguments: those that the data fixes, overridden by the recipe's."""
    return {**source.model_args, **recipe.model_args}


def build_bare_model(recipe: Recipe, model_args: Mapping[str, Any]) -> nn.Module:
    """Build the recipe's model with weights from the stream (seed, "weights") and no structure."""
    generator, model_args = derive_generator(recipe.seed, "weights"), held_files("model_args", model_args)
    if recipe.model in models.MODELS:
        _check_memory(recipe, model_args)
    # Constructors and foreign init methods draw from the global stream: they get one of their own for a while.
    with seeded_globally(generator):
        model: nn.Module = models.build_model(recipe.model, **model_args)
    init_weights = getattr(model, "init_weights", None)
    if init_weights is not None and "generator" in inspect.signature(init_weights).parameters:
        init_weights(generator=generator)
    return model


def _check_memory(recipe: Recipe, model_args: Mapping[str, Any]) -> None:
    """Refuse a model of ours that would fill the memory, before it does: its shapes are known without its numbers."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            parameters = list(models.build_model(recipe.model, **model_args).parameters())
    except EspalierError:  # a layer of another library that cannot do without numbers, or what building it will tell
        return
    # On a CPU the gradients and the optimiser's two averages lie in the same memory.
    needed = sum(p.numel() * p.element_size() for p in parameters) * (1 if torch.cuda.is_available() else 4)
    if needed > (free := free_memory()):
        raise EspalierError(
            f"model {recipe.model} with {dict(recipe.model_args)} has {sum(p.numel() for p in parameters):,} "
            f"parameters, {needed / 1e9:.3g} GB to train, and {free / 1e9:.3g} GB of memory are free: choose a "
            "smaller one"
        )


def freeze_(model: nn.Module, recipe: Recipe) -> None:
    """Take the recipe's frozen parameters out of training, in place.

    Raises:
        EspalierError: the model has nothing of that kind.
    """
    if not recipe.freeze:
        return
    from espalier.init.filters.census import depthwise_census
    from espalier.init.ties import memory_of, overlap, spans_of

    layers = depthwise_census(model)
    if not layers:
        raise EspalierError(f"freeze {recipe.freeze!r}: model {recipe.model!r} has no depthwise convolution")
    for layer in layers:
        filters = memory_of(layer)
        for name, parameter in layer.part.named_parameters():
            if name != "bias" and overlap(filters, spans_of([parameter])):
                parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over the parameters that are trained.

    Weight decay acts on every parameter, as in the papers' recipes, but for those whose names the model itself
    exempts in ``no_weight_decay()``. Frozen parameters are left out, so that decay cannot shrink them.

    Raises:
        EspalierError: a model with nothing to train, or Muon for one without matrices.
    """
    no_weight_decay = getattr(model, "no_weight_decay", None)
    exempt = set(no_weight_decay()) if no_weight_decay is not None else set()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise EspalierError(f"model {recipe.model!r} has no parameter that is trained: choose another")
    matrices = hidden_matrices(model) & trained.keys() - exempt if recipe.optimizer == "muon" else set()
    if recipe.optimizer == "muon" and not matrices:
        raise EspalierError(f"optimizer 'muon': model {recipe.model!r} has no linear layer inside: choose 'adamw'")
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained.items() if name not in exempt | matrices]},
        {"params": [p for name, p in trained.items() if name in exempt], "weight_decay": 0.0},
        {"params": [p for name, p in trained.items() if name in matrices], "muon": True},
    ]
    fused = not any(p.is_complex() for p in trained.values())  # which the fused kernels do not take
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, fused=fused),
        "adam": partial(torch.optim.Adam, fused=fused),
        "nadam": torch.optim.NAdam,  # has no fused kernel
        "muon": MuonAdamW,
    }
    return kinds[recipe.optimizer](
        [group for group in groups if group["params"]],
        lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay,
    )  # fmt: skip


def environment() -> dict[str, Any]:
    """Return what a run ran on: versions, git commit, machine."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "machine": platform.node(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """Return the processor's model as Linux names it, elsewhere what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version("torch-espalier" if package == "espalier" else package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
