"""Layers that carry structure by construction."""

from espalier.nn.depthwise import DepthwiseConv2d
from espalier.nn.kernels.backend import Backend, backend, use_backend
from espalier.nn.kernels.library import empty_cache
from espalier.nn.lipschitz.activations import Abs, GroupSort, Householder, MaxMin
from espalier.nn.lipschitz.constant import Lipschitz, LipschitzComposite, kernel_norm, spectral_norm
from espalier.nn.lipschitz.normalisation import BatchCentering, Normalize, NormalizedLinear
from espalier.nn.lipschitz.pooling import InvertibleDownsampling, L2Pool2d, ScaledAvgPool2d
from espalier.nn.lipschitz.residual import ConvexSum, LinearResidual
from espalier.nn.orthogonal.conv import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d
from espalier.nn.orthogonal.linear import CayleyLinear
from espalier.nn.orthogonal.original import load_original_state_dict
from espalier.nn.orthogonal.parametrization import parametrize_cayley
from espalier.nn.orthogonal.transform import cayley
from espalier.nn.ssm.causal_conv import causal_conv_silu
from espalier.nn.ssm.gated_norm import GatedRMSNorm
from espalier.nn.ssm.mamba import Mamba1, Mamba2, MambaState
from espalier.nn.ssm.mixing import mixing_matrix
from espalier.nn.ssm.selective_scan import selective_scan
from espalier.nn.ssm.ssd import ssd

__all__ = [
    "Abs",
    "Backend",
    "BatchCentering",
    "CayleyConv1d",
    "CayleyConv2d",
    "CayleyConv3d",
    "CayleyConvTranspose2d",
    "CayleyLinear",
    "ConvexSum",
    "DepthwiseConv2d",
    "GatedRMSNorm",
    "GroupSort",
    "Householder",
    "InvertibleDownsampling",
    "L2Pool2d",
    "LinearResidual",
    "Lipschitz",
    "LipschitzComposite",
    "Mamba1",
    "Mamba2",
    "MambaState",
    "MaxMin",
    "Normalize",
    "NormalizedLinear",
    "ScaledAvgPool2d",
    "backend",
    "causal_conv_silu",
    "cayley",
    "empty_cache",
    "kernel_norm",
    "load_original_state_dict",
    "mixing_matrix",
    "parametrize_cayley",
    "selective_scan",
    "spectral_norm",
    "ssd",
    "use_backend",
]
