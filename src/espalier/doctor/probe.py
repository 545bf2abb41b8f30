"""One forward and one backward pass with a batch: is the signal neither lost nor blown up, does every part learn?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.doctor.batch import Batch, as_batch, synthetic
from espalier.doctor.judge import judge_activity, judge_bfloat16, judge_gradients, judge_loss
from espalier.doctor.patient import Patient, plain_name
from espalier.doctor.reconsider import judge_weights, reconsider
from espalier.doctor.registry import Finding, Severity
from espalier.doctor.watch import Activity, first_floating, watch
from espalier.errors import EspalierError


def probe(patient: Patient, example: Any, static: list[Finding]) -> list[Finding]:
    """Run a batch through a model, forward and backward, and say what looks wrong.

    The findings of the static checks come first, where the pass does not withdraw them.

    The pass is a training step without the step: training mode, so that batch norm uses the batch. Parameters,
    gradients, buffers, modes and random state are afterwards what they were.

    Args:
        patient: holds the module, whose parameters must have storage, and whether its weights are trained: the loss
            on made-up targets then says nothing.
        example: what ``as_batch`` takes, or ``"synthetic"``.
        static: what the static checks found.

    Raises:
        EspalierError: no batch can be made of ``example``.
    """
    generator = torch.Generator().manual_seed(0)
    assert patient.model is not None
    # Compiled code hides what happens in it.
    model = getattr(patient.model, "_orig_mod", patient.model)
    with _as_before(model), torch.enable_grad():
        model.train()
        batch = _working_batch(model, example, generator)
        with watch(model) as activity:
            output = _forward(model, batch)
        findings = list(judge_activity(activity, _depth(model, activity)))
        if any(finding.check == "activations" and finding.severity == "error" for finding in findings):
            return [*static, *findings]
        logits, loss, stated = _loss(output, batch, model, generator)
        if logits is not None:
            findings += judge_loss(logits, loss if stated else None, trained=patient.trained)
        if loss is not None and loss.requires_grad:
            model.zero_grad(set_to_none=True)
            loss.backward()
            # A made-up batch may leave out inputs, such as an encoder's states, that training has.
            real: Severity = "note" if isinstance(example, str) else "warning"
            findings += judge_gradients(_gradients(patient), unused=real if stated or logits is not None else None)
        findings += _under_bfloat16(model, batch)
        static = reconsider(static, patient, activity)
        if not patient.trained:
            named = {(finding.check, finding.layer) for finding in static}
            findings += [f for f in judge_weights(patient, activity) if (f.check, f.layer) not in named]
        return [*static, *findings]


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Put back modes, buffers, gradients and the random state after a ``with`` block."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # Autograd adds into a gradient in place where there is one.
    for parameter, _ in gradients:
        parameter.grad = None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, training, own in modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _working_batch(model: nn.Module, example: Any, generator: torch.Generator) -> Batch:
    """Return the example, or the first synthetic batch that the model takes."""
    if not isinstance(example, str):
        return as_batch(model, example)
    if example != "synthetic":
        raise EspalierError(f"example {example!r}: pass a batch, or 'synthetic'")
    reason: Exception | None = None
    for candidate in synthetic(model, generator):
        batch = as_batch(model, candidate)
        try:
            with torch.no_grad():
                _forward(model, batch)
        except Exception as error:  # whatever a model raises at a batch of the wrong shape
            reason = error
            continue
        return batch
    text = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    raise EspalierError(f"example 'synthetic': {type(model).__name__} does not take it ({text}): pass a batch")


def _forward(model: nn.Module, batch: Batch) -> Any:
    try:
        return batch.run(model)
    except ValueError as error:
        # Batch norm refuses a batch of one in training mode.
        if "more than 1 value per channel" not in str(error):
            raise
        model.eval()
        return batch.run(model)


def _depth(model: nn.Module, activity: Activity) -> list[tuple[str, float]]:
    """Return the sizes of the outputs of the longest chain of blocks of one class, in order."""
    chains: list[list[tuple[str, float]]] = []
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= 3:
            names = [plain_name(f"{prefix}.{index}".lstrip(".")) for index in range(len(module))]
            chain = [(name, activity.sizes[name]) for name in names if name in activity.sizes]
            if len({type(block) for block in module}) == 1 and len(chain) == len(module):
                chains.append(chain)
    return max(chains, key=len, default=[])


def _loss(
    output: Any, batch: Batch, model: nn.Module, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return the logits over classes, a loss to differentiate, and whether the loss is the task's own."""
    own = getattr(output, "loss", None)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    logits = logits if isinstance(logits, Tensor) else None
    counts = logits is not None and logits.ndim in (2, 3) and _is_classifier(model, batch, logits)
    classes = logits if counts else None
    if isinstance(own, Tensor) and own.ndim == 0:
        return classes, own, True
    if classes is not None:
        flat = classes.reshape(-1, classes.shape[-1]).float()
        stated = batch.targets is not None and batch.targets.numel() == len(flat)
        targets = batch.targets if stated else torch.randint(flat.shape[-1], (len(flat),), generator=generator)
        assert targets is not None
        return classes, F.cross_entropy(flat, targets.reshape(-1).long().to(flat.device), ignore_index=-100), stated
    first = first_floating(output, learns=True) if logits is None else logits
    if first is None:
        return None, None, False
    # Not the mean square: that of a normalised output is constant, and its gradient only rounding.
    weights = torch.randn(first.shape, generator=generator).to(first.device)
    return None, (first.float() * weights).mean(), False


def _is_classifier(model: nn.Module, batch: Batch, logits: Tensor) -> bool:
    """Return whether the last dimension counts classes: as many as the model or its configuration names."""
    if batch.targets is not None:
        return True
    config = getattr(model, "config", None)
    named = [getattr(s, n, None) for s in (config, model) for n in ("vocab_size", "num_labels", "num_classes")]
    named += [getattr(getattr(config, "text_config", None), "vocab_size", None)]
    return logits.shape[-1] > 1 and logits.shape[-1] in [size for size in named if isinstance(size, int)]


def _gradients(patient: Patient) -> dict[str, float | None]:
    """Return the root mean square of the gradient of every parameter with entries; ``None`` for none."""
    sizes: dict[str, float | None] = {}
    for record in patient.records:
        own, gradient = record.parameter, record.gradient
        if own is None or not own.requires_grad:
            continue
        if gradient is None:
            sizes[record.name] = None
        elif gradient.numel():
            sizes[record.name] = float(gradient.double().norm()) / math.sqrt(gradient.numel())
    return sizes


def _under_bfloat16(model: nn.Module, batch: Batch) -> list[Finding]:
    """Run the batch again under bfloat16 autocast; nothing is said where that is no question or not possible."""
    first = next(model.parameters(), None)
    if first is None or first.dtype != torch.float32 or first.device.type not in ("cpu", "cuda"):
        return []
    with torch.no_grad(), watch(model) as activity, torch.autocast(first.device.type, torch.bfloat16):
        try:
            _forward(model, batch)
        except (RuntimeError, NotImplementedError):  # an operator without a bfloat16 kernel: nothing is known
            return []
    return list(judge_bfloat16(activity))
