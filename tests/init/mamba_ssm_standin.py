"""Stand-ins for mamba_ssm's mixers, which need CUDA to be installed: their published attributes and parameters."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn


class Mamba(nn.Module):
    """Parameters of ``mamba_ssm.modules.mamba_simple.Mamba``."""

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, -(-d_model // 16)
        self.in_proj = nn.Linear(d_model, self.d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + d_state * 2, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)


class Mamba2(nn.Module):
    """Parameters of ``mamba_ssm.modules.mamba2.Mamba2``; with ``d_ssm`` below ``d_inner`` an MLP's rows come first."""

    def __init__(
        self, d_model: int, d_state: int = 128, headdim: int = 64, ngroups: int = 1, d_ssm: int | None = None
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner = 2 * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads = self.d_ssm // headdim
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, 4, groups=conv_dim, padding=3)
        self.dt_bias = nn.Parameter(torch.full((self.nheads,), -4.0))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = nn.RMSNorm(self.d_ssm)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the classes importable, and named, as mamba_ssm's."""
    for path, cls in (("mamba_ssm.modules.mamba_simple", Mamba), ("mamba_ssm.modules.mamba2", Mamba2)):
        module = types.ModuleType(path)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, path, module)
        monkeypatch.setattr(cls, "__module__", path)
