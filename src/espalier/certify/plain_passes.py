"""Plain passes of a network in every way that a user may call it, each compared with a pass on values with bounds."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from espalier.certify import steps
from espalier.certify.bounded import Analysis
from espalier.certify.counts import eager_calls
from espalier.certify.surroundings import modes
from espalier.certify.trail import Watch
from espalier.certify.witness import Layers, Underneath, Witness

IMAGES = 5
"""In the pass that is written down: few, and not a size that networks are likely to have besides."""

_MOST, _MANY, _NUMBERS = 8, 70, 400_000
"""In plain passes: in most of them, and in some if the images are small enough."""

_ANSWERS = 64
"""To questions about memory: as many passes are made at most."""


def _kinds(images: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Yield images as users give them to a network, and whether their number may be read."""
    yield images.clone(), True
    yield images[:5].clone(), False
    for wanted in (False, True):  # not contiguous
        yield torch.stack([images, images], -1).flatten(-2)[..., ::2].requires_grad_(wanted), False
    if images.ndim == 4:
        yield images.clone(memory_format=torch.channels_last), False
    elif images.ndim > 1:  # the numbers of an image as rows: dense, and not contiguous
        yield images.transpose(0, -1).contiguous().transpose(0, -1), False
    leaf = images[:6].clone().requires_grad_()
    yield leaf, False
    with torch.enable_grad():
        yield leaf + 0.0, False
    parameter = nn.Parameter(images[:5].clone())
    parameter.grad = torch.zeros_like(parameter)
    yield parameter, True
    with torch.inference_mode():
        made = images.clone()
    yield made, False


def compare_plain_passes(net: nn.Module, analysis: Analysis, images: Tensor) -> None:
    """Hold that a network does on plain tensors what it does on values with bounds, in every way that users call it.

    Args:
        net: a prepared network.
        analysis: of earlier passes of it.
        images: (N, …) in its precision; a few of them are taken.

    Raises:
        UncertifiableError: it does something else, or fails on plain tensors.
    """
    images = images.detach()[torch.arange(_MOST, device=images.device) % len(images)]
    first = analysis.start(images[:IMAGES])
    record = steps.Record(first)
    last = record.number(analysis.run(net, first, record))
    layers: Layers = {}
    # From many to few, for what layers made is used again.
    many = images[torch.arange(max(_MOST, min(_MANY, _NUMBERS // images[0].numel())), device=images.device) % _MOST]
    asks = False
    for way in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        for x, counted in ((many, False), *_kinds(images)):
            given = x if x.requires_grad or x.is_inference() or not x.is_contiguous() else x.clone()
            witness = Witness(analysis, record, given, layers, counted=counted)
            _follow(net, witness, way, given, last)
            asks = asks or bool(witness.answered)
    # There is no end to the ways in which images can lie in memory, but each question has two answers.
    answers: list[list[bool]] = [[]] if asks else []
    for count in itertools.count():
        if not answers:
            return
        if count == _ANSWERS:
            raise analysis.refuse("it asks too often how its input lies in memory (is_contiguous): call contiguous()")
        given, tried = images[:IMAGES].clone(), answers.pop()
        witness = Witness(analysis, record, given, layers, answers=tried)
        _follow(net, witness, torch.no_grad, given, last)
        answers += [[*witness.answered[:place], False] for place in range(len(tried), len(witness.answered))]


def _follow(net: nn.Module, witness: Witness, way: Callable[[], Any], x: Tensor, last: int) -> None:
    analysis = witness.analysis
    analysis.watch = witness
    # A module that keeps its input registers a parameter, and takes no plain tensor in its place any more.
    parts = net.modules() if isinstance(x, nn.Parameter) else ()
    kept = [(part, dict(vars(part)), dict(part._parameters)) for part in parts]
    try:
        with warnings.catch_warnings(action="ignore"), way(), eager_calls():
            try:
                with Underneath(witness), witness:
                    analysis.modes = modes()
                    result = net(x)
            except Exception as error:
                if witness.failed is not None:
                    raise witness.failed from error
                if witness.answers is not None:
                    return  # as it must where images that lie in memory in one way are taken for others
                analysis.watch = Watch()
                try:
                    net(x)
                except Exception:
                    return  # it cannot be run like that: no prediction could be wrong
                raise witness.refused(f"it fails where it is watched ({type(error).__name__})") from error
    finally:
        analysis.watch = Watch()
        for part, attributes, parameters in kept:
            vars(part).update(attributes)
            part._parameters.clear()
            part._parameters.update(parameters)
    witness.finish(result, last)
