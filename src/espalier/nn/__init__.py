"""Layers that carry structure by construction."""

from espalier.nn.backend import Backend, backend, use_backend
from espalier.nn.causal_conv import causal_conv_silu
from espalier.nn.cayley import cayley
from espalier.nn.cayley_checkpoint import load_original_state_dict
from espalier.nn.cayley_conv import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d
from espalier.nn.cayley_linear import CayleyLinear
from espalier.nn.cayley_parametrization import parametrize_cayley
from espalier.nn.gated_norm import GatedRMSNorm
from espalier.nn.mamba import Mamba1, Mamba2, MambaState
from espalier.nn.mixing import mixing_matrix
from espalier.nn.selective_scan import selective_scan
from espalier.nn.ssd import ssd

__all__ = [
    "Backend",
    "CayleyConv1d",
    "CayleyConv2d",
    "CayleyConv3d",
    "CayleyConvTranspose2d",
    "CayleyLinear",
    "GatedRMSNorm",
    "Mamba1",
    "Mamba2",
    "MambaState",
    "backend",
    "causal_conv_silu",
    "cayley",
    "load_original_state_dict",
    "mixing_matrix",
    "parametrize_cayley",
    "selective_scan",
    "ssd",
    "use_backend",
]
