"""The depthwise layers of a model: one list for all that write, measure, fit or freeze them, and their filters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.init.attention.near_identity import full_precision
from espalier.init.filters.closed_form import centre_name, is_depthwise
from espalier.init.layouts.find import Layer, Place, as_in_evaluation, locate_layers
from espalier.init.layouts.outside import leaves_outside_alone
from espalier.init.layouts.registry import DepthwiseWeights


@dataclass(frozen=True)
class Filters:
    """One depthwise layer's filters.

    Attributes:
        name: the layer's.
        place: its index among the depthwise layers of its model, and their number.
        kernel_size: taps along every axis.
        filters: shape (h, K), taps in row-major order.
        centre: the tap that meets the output's own position, ``"middle"`` or ``"last"``; None where it is unknown
            or another one.
    """

    name: str
    place: Place
    kernel_size: tuple[int, ...]
    filters: Tensor
    centre: str | None


def depthwise_census(model: nn.Module) -> list[Layer]:
    """Return the depthwise layers of a model in order: ``place`` of each is its index and their number.

    All count that ``structure_`` has a row of, also those that it leaves alone: several filters a channel, 2 taps,
    frozen, parametrised. The short convolution of a state-space layer is a part of that layer.
    """
    return [layer for layer in locate_layers(model) if layer.found.kind == "depthwise"]


def depthwise_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the name and module of every depthwise convolution of a model, in the order of depth.

    They are those that ``structure_`` has a row of, also where it leaves one alone; see ``FilterCovariance`` for the
    depth of layer i of n.
    """
    return [(layer.name, layer.part) for layer in depthwise_census(model)]


@torch.no_grad()
@full_precision()
@leaves_outside_alone
def read_filters(model: nn.Module) -> list[Filters]:
    """Return the filters of every depthwise layer with one filter a channel and no axis of 2 taps; nothing moves."""
    read = []
    for layer in depthwise_census(model):
        with layer.open() as weights, as_in_evaluation(layer.part):
            part = layer.part
            centre: str | None = None
            if isinstance(weights, DepthwiseWeights):
                weight = weights.weight
                centre = centre_name(tuple(weight.shape[2:]), weights.centre)
            # What may not be written (its weight is computed, say) can be measured all the same.
            elif is_depthwise(part) and 2 not in part.kernel_size:
                weight = part.weight
            else:
                continue
            kernel = tuple(weight.shape[2:])
            read.append(Filters(layer.name, layer.place, kernel, weight.detach().flatten(1), centre))
    return read
