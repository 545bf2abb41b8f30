"""One forward and one backward pass with a batch: is the signal neither lost nor blown up, does every part learn?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from espalier.doctor.batch import Batch, as_batch, synthetic
from espalier.doctor.judge import judge_activity, judge_bfloat16, judge_gradients, judge_loss
from espalier.doctor.lent import WRAPPERS, lend_copies
from espalier.doctor.patient import Patient
from espalier.doctor.reconsider import judge_weights, reconsider
from espalier.doctor.registry import Finding, Severity
from espalier.doctor.stats import dense, root_mean_square
from espalier.doctor.watch import Activity, first_floating, watch
from espalier.errors import EspalierError
from espalier.init.layouts.registry import attribute
from espalier.init.layouts.scratch import uncompiled
from espalier.init.matching import plain_name
from espalier.randomness import generators_kept


def probe(patient: Patient, example: Any, static: list[Finding]) -> list[Finding]:
    """Run a batch through a model, forward and backward, and say what looks wrong.

    The findings of the static checks come first, where the pass does not withdraw them.

    The pass is a training step without the step: training mode, so that batch norm uses the batch. Parameters,
    gradients, buffers, attributes, modes and random state are afterwards what they were.

    Args:
        patient: holds the module, which is not run while a tensor of it has no storage, and whether its weights are
            trained: the loss on made-up targets then says nothing.
        example: what ``as_batch`` takes, or ``"synthetic"``.
        static: what the static checks found.

    Raises:
        EspalierError: no batch can be made of ``example``.
    """
    assert patient.model is not None
    # Nothing can run without storage, which the findings say.
    if any(record.meta for record in patient.records):
        return static
    if any(tensor.is_inference() for tensor in (*patient.model.parameters(), *patient.model.buffers())):
        raise EspalierError("example: weights made under inference_mode cannot be trained: load them outside of it")
    generator = torch.Generator().manual_seed(0)
    model = attribute(patient.model, "_orig_mod", patient.model)
    with _as_before(model), uncompiled(), torch.enable_grad():
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
            _backward(model, batch, loss, generator)
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
    """Put back modes, attributes, parameters, buffers, gradients and the random states after a ``with`` block.

    A forward pass may write into parameters: an embedding with ``max_norm`` does, and code books that are averages. It
    may leave what it computed in attributes: a weight (weight_norm), an attention map, a count of its calls.
    """
    modules = [
        (part, part.training, dict(part._buffers), dict(part._parameters.items()), dict(vars(part)))
        for part in model.modules()
    ]
    tensors = [*model.buffers(), *(p for p in model.parameters() if type(p.data) is Tensor or hasattr(p, "to_local"))]
    # Torch refuses to write into a tensor that was expanded.
    held = [(t, t.detach().clone()) for t in tensors if not (t.is_meta or (dense(t) and _expanded(t)))]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # Autograd adds into a gradient in place where there is one.
    for parameter, _ in gradients:
        parameter.grad = None
    # Not manual_seed, which seeds all devices, also those that are not in use yet, and for good.
    started = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = list(range(torch.cuda.device_count())) if started else []
    lend_copies(model.modules())
    try:
        with generators_kept(devices):
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            yield
    finally:
        for module, training, own, weights, attributes in modules:
            module.training = training
            if isinstance(module, torch.jit.ScriptModule):  # which cannot get other ones
                continue
            module._buffers.clear()
            module._buffers.update(own)
            if not type(module).__module__.startswith(WRAPPERS):
                vars(module).clear()
                vars(module).update(attributes)
                # An adapter may put what it merged in their place; shards are FSDP's to swap.
                if not any(hasattr(weight, "to_local") for weight in weights.values()):
                    module._parameters.clear()
                    module._parameters.update(weights)
        with torch.no_grad():
            for tensor, values in held:
                # A graph of the user's own that holds the tensor stays usable.
                tensor.data.copy_(values)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _expanded(tensor: Tensor) -> bool:
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


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


def _backward(model: nn.Module, batch: Batch, loss: Tensor, generator: torch.Generator) -> None:
    """Fill the gradients.

    A checkpoint computes anew what a pass did, and hooks that watched the first time make our layers take other kernels
    then: that pass is made again, unwatched.
    """
    model.zero_grad(set_to_none=True)
    try:
        loss.backward()
    except CheckpointError:
        model.zero_grad(set_to_none=True)
        _, again, _ = _loss(_forward(model, batch), batch, model, generator)
        assert again is not None
        again.backward()


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
    logits = logits if isinstance(logits, Tensor) and dense(logits) else None
    counts = logits is not None and logits.ndim in (2, 3) and _is_classifier(model, batch, logits)
    classes = logits if counts else None
    if isinstance(own, Tensor) and own.ndim == 0:
        return classes, own, True
    if classes is not None:
        flat = classes.reshape(-1, classes.shape[-1]).float()
        stated = _are_classes(batch.targets, flat)
        targets = batch.targets if stated else torch.randint(flat.shape[-1], (len(flat),), generator=generator)
        assert targets is not None
        return classes, F.cross_entropy(flat, targets.reshape(-1).long().to(flat.device), ignore_index=-100), stated
    first = first_floating(output, learns=True) if logits is None else logits
    if first is None:
        return None, None, False
    # Not the mean square: that of a normalised output is constant, and its gradient only rounding.
    first = torch.view_as_real(first) if first.is_complex() else first
    weights = torch.randn(first.shape, generator=generator).to(first.device)
    return None, (first.float() * weights).mean(), False


def _is_classifier(model: nn.Module, batch: Batch, logits: Tensor) -> bool:
    """Return whether the last dimension counts classes: as many as the model or its configuration names."""
    if batch.targets is not None:
        return logits.shape[-1] > 1
    config = attribute(model, "config")
    named = [attribute(s, n) for s in (config, model) for n in ("vocab_size", "num_labels", "num_classes")]
    named += [attribute(attribute(config, "text_config"), "vocab_size")]
    return logits.shape[-1] > 1 and logits.shape[-1] in [size for size in named if isinstance(size, int)]


def _are_classes(targets: Tensor | None, flat: Tensor) -> bool:
    """Return whether targets name a class for every row of logits; −100 marks rows that do not count."""
    if targets is None or targets.numel() != len(flat):
        return False
    named = targets[targets != -100]
    return bool(named.numel()) and int(named.min()) >= 0 and int(named.max()) < flat.shape[-1]


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
            sizes[record.name] = root_mean_square(gradient)
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
