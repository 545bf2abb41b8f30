"""Weights from anywhere: open a model or a file, convert between layouts."""

from espalier.checkpoints.by_shape import skeleton
from espalier.checkpoints.convmixer import convert_state, load_checkpoint_file, load_model
from espalier.checkpoints.loading import open_checkpoint, open_host_model
from espalier.checkpoints.mamba import convert_mamba_state_dict

__all__ = [
    "convert_mamba_state_dict",
    "convert_state",
    "load_checkpoint_file",
    "load_model",
    "open_checkpoint",
    "open_host_model",
    "skeleton",
]
