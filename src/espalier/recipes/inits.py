"""The initialisations that a recipe or an arm can name, each one call of ``structure_`` on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from torch import nn

from espalier.annotations import refuse_misfits
from espalier.errors import require_known
from espalier.init import FilterCovariance, FilterStatistics, Mimetic, MimeticSSM, StructureReport, structure_
from espalier.init.attention import baselines
from espalier.lookup import errors_of, is_reference, load

Init = Callable[..., StructureReport | None]


def default(model: nn.Module, generator: torch.Generator) -> None:
    """Leave the model as its constructor drew it: the baseline."""


def mimetic(
    model: nn.Module, generator: torch.Generator, preset: str = "vision", **strengths: Any
) -> StructureReport | None:
    """Write mimetic self-attention (arXiv 2305.09828) and leave every other layer alone.

    Args:
        model: the network, in place.
        generator: source of the noise.
        preset: ``"vision"`` or ``"language"``.
        strengths: arguments of ``Mimetic`` that replace the preset's, e.g. ``qk=(0.7, 0.7)``.
    """
    return structure_(
        model, attention=Mimetic.preset(preset, **strengths), ssm=None, depthwise=None, generator=generator
    )


def covariance(
    model: nn.Module, generator: torch.Generator, preset: str = "closed-form", **switches: Any
) -> StructureReport | None:
    """Draw depthwise filters from the closed-form covariance (arXiv 2210.03651) and leave every other layer alone.

    Args:
        model: the network, in place.
        generator: source of the filters.
        preset: name of a ``FilterCovariance`` preset.
        switches: arguments of ``FilterCovariance`` that replace the preset's.
    """
    refuse_misfits("init 'covariance'", FilterCovariance, switches)
    filters = FilterCovariance(preset, **switches)
    return structure_(model, attention=None, ssm=None, depthwise=filters, generator=generator)


def mimetic_ssm(model: nn.Module, generator: torch.Generator, **parts: Any) -> StructureReport | None:
    """Write mimetic state-space structure (arXiv 2410.11135) and leave every other layer alone.

    Args:
        model: the network, in place.
        generator: source of the weights.
        parts: arguments of ``MimeticSSM``, e.g. ``correlate=0.9`` or ``layers=0``.

    Raises:
        EspalierError: a part that ``MimeticSSM`` does not have, or a value that it refuses.
    """
    known = [field.name for field in fields(MimeticSSM)]
    for name in parts:
        require_known("argument of init 'mimetic_ssm'", name, known)
    return structure_(model, attention=None, depthwise=None, ssm=MimeticSSM(**parts), generator=generator)


def transferred(
    model: nn.Module, generator: torch.Generator, statistics: str, shrink: str | float = "auto"
) -> StructureReport | None:
    """Draw depthwise filters from the covariances of another network's and leave every other layer alone.

    The other network may have another depth, width, patch and kernel (arXiv 2210.03651, section 3).

    Args:
        model: the network, in place.
        generator: source of the filters.
        statistics: file that ``espalier statistics`` wrote.
        shrink: share of the closed form mixed into each covariance: a number in [0, 1], or ``"auto"`` for the one that
            the sampling error of the measured filters asks for.

    Raises:
        EspalierError: the file cannot be read, its kernels have another number of axes, or a bad ``shrink``.
    """
    measured = FilterStatistics.load(statistics).shrink(strength=shrink)
    filters = FilterCovariance(statistics=measured)
    return structure_(model, attention=None, ssm=None, depthwise=filters, generator=generator)


def structured(model: nn.Module, generator: torch.Generator) -> StructureReport | None:
    """Write every structure that the model has a place for, with the published defaults."""
    return structure_(model, generator=generator)


INITS: dict[str, Init] = {
    "default": default,
    "mimetic": mimetic,
    "mimetic_ssm": mimetic_ssm,
    "covariance": covariance,
    "transferred": transferred,
    "structured": structured,
    "truncated_normal": baselines.truncated_normal_,
    "uniform_values": baselines.uniform_values_,
    "zero_output": baselines.zero_output_,
    "semi_orthogonal": baselines.semi_orthogonal_,
    "impulse": baselines.impulse_,
    "mlp_mean_shift": baselines.mlp_mean_shift_,
}


def get_init(name: str) -> Init:
    """Return the initialisation called ``name``, or a function of your own, ``FILE.py:NAME``.

    A function of your own is called as ``function(model, generator=…, **init_args)`` and writes into the model; draws
    from torch's global stream are as reproducible as those from the generator.

    Raises:
        EspalierError: no initialisation has that name, or there is no such function.
    """
    if not is_reference(name):
        require_known("init", name, INITS)
        return INITS[name]
    function = load("init", name)

    @wraps(function)
    def initialise(model: nn.Module, generator: torch.Generator, **arguments: Any) -> StructureReport | None:
        with errors_of("init", name):
            report = function(model, generator=generator, **arguments)
        return report if isinstance(report, StructureReport) else None

    return initialise
