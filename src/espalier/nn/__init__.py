from espalier.nn.backend import Backend, backend, use_backend
from espalier.nn.causal_conv import causal_conv_silu
from espalier.nn.gated_norm import GatedRMSNorm
from espalier.nn.mamba import Mamba1, Mamba2, MambaState
from espalier.nn.selective_scan import selective_scan
from espalier.nn.ssd import ssd

__all__ = [
    "Backend",
    "GatedRMSNorm",
    "Mamba1",
    "Mamba2",
    "MambaState",
    "backend",
    "causal_conv_silu",
    "selective_scan",
    "ssd",
    "use_backend",
]
