"""Training: one loop, and run folders that survive a kill."""

from espalier.recipes.validation import load_recipe, save_recipe
from espalier.train.build import build_run_model, environment
from espalier.train.loop import train
from espalier.train.requests import RunInterrupted
from espalier.train.run import Run, load_run

__all__ = [
    "Run",
    "RunInterrupted",
    "build_run_model",
    "environment",
    "load_recipe",
    "load_run",
    "save_recipe",
    "train",
]
