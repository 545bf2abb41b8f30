"""Closed forms: structured weights on tensors, and on whole models."""

from espalier.init.attention.mimetic import Mimetic, measure_attention, mimetic_attention_
from espalier.init.attention.near_identity import near_identity, near_identity_factors
from espalier.init.families import AttentionFit
from espalier.init.filters.census import depthwise_layers
from espalier.init.filters.closed_form import depthwise_covariance_, filter_covariance, sample_filters
from espalier.init.filters.fit import covariance_fit
from espalier.init.filters.spec import FilterCovariance
from espalier.init.filters.statistics import FilterStatistics
from espalier.init.layouts import (
    AttentionWeights,
    DepthwiseWeights,
    LatentAttentionWeights,
    Skipped,
    SSMWeights,
    register_layout,
)
from espalier.init.model_fit import StructureFit, fit
from espalier.init.report import LayerReport, StructureReport
from espalier.init.ssm import MimeticSSM, measure_ssm, mimetic_ssm_, token_memory
from espalier.init.structure import VerificationError, audit, structure_
from espalier.init.trained import TrainedWeightsWarning

__all__ = [
    "AttentionFit",
    "AttentionWeights",
    "DepthwiseWeights",
    "FilterCovariance",
    "FilterStatistics",
    "LatentAttentionWeights",
    "LayerReport",
    "Mimetic",
    "MimeticSSM",
    "SSMWeights",
    "Skipped",
    "StructureFit",
    "StructureReport",
    "TrainedWeightsWarning",
    "VerificationError",
    "audit",
    "covariance_fit",
    "depthwise_covariance_",
    "depthwise_layers",
    "filter_covariance",
    "fit",
    "measure_attention",
    "measure_ssm",
    "mimetic_attention_",
    "mimetic_ssm_",
    "near_identity",
    "near_identity_factors",
    "register_layout",
    "sample_filters",
    "structure_",
    "token_memory",
]
