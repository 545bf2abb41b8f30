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
from espalier.doctor.judge import cut_off, judge_activity, judge_bfloat16, judge_gradients, judge_loss, judge_reach
from espalier.doctor.lent import MODULE_FIELDS, WRAPPERS, lend_copies
from espalier.doctor.patient import Patient
from espalier.doctor.reconsider import judge_weights, reconsider
from espalier.doctor.registry import Finding
from espalier.doctor.stats import dense, root_mean_square
from espalier.doctor.watch import Activity, floating, watch
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
    # Nothing can run without storage, and nothing learns without a tensor, which the findings say.
    if not patient.records or any(record.meta for record in patient.records):
        return static
    if any(tensor.is_inference() for tensor in (*patient.model.parameters(), *patient.model.buffers())):
        raise EspalierError("example: weights made under inference_mode cannot be trained: load them outside of it")
    generator = torch.Generator().manual_seed(0)
    model = attribute(patient.model, "_orig_mod", patient.model)
    with _as_before(model), uncompiled(), torch.enable_grad():
        try:
            model.train()
        except NotImplementedError as error:  # of torch.export
            raise EspalierError(f"example: {type(model).__name__} cannot be trained: diagnose it without") from error
        batch = _working_batch(model, example, generator)
        with watch(model) as activity:
            output = _forward(model, batch)
        findings = list(judge_activity(activity, _depth(model, activity)))
        if any(finding.check == "activations" and finding.severity == "error" for finding in findings):
            return [*static, *findings]
        logits, stated, loss = _loss(output, batch, model, generator)
        if logits is not None:
            findings += judge_loss(logits, stated, trained=patient.trained)
        if loss is not None and loss.requires_grad:
            _backward(model, batch, loss, generator)
            findings += judge_gradients(_gradients(patient))
        elif loss is not None and any(record.trainable for record in patient.records):
            findings.append(cut_off())
        findings += _under_bfloat16(model, batch)
        static = reconsider(static, patient, activity)
        if not patient.trained:
            named = {(finding.check, finding.layer) for finding in static}
            findings += [f for f in judge_weights(patient, activity) if (f.check, f.layer) not in named]
        if loss is not None and loss.requires_grad:
            findings += _unregistered(model, loss)
            findings += _judge_reach(patient, model, batch, generator, activity, made_up=isinstance(example, str))
        return [*static, *findings]


def _unregistered(model: nn.Module, loss: Tensor) -> Iterator[Finding]:
    """Yield findings on tensors that learn in plain attributes and lists: ``model.parameters()`` does not give them."""
    kept: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            for part in parts if name not in MODULE_FIELDS else ():
                held = part.parameters() if isinstance(part, nn.Module) else [part]
                place = plain_name(f"{prefix}.{name}".lstrip("."))
                kept |= {id(tensor): place for tensor in held if isinstance(tensor, Tensor)}
    for parameter in model.parameters():
        kept.pop(id(parameter), None)
    seen, open_nodes, places = set(), [loss.grad_fn], dict[str, int]()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes += [earlier for earlier, _ in node.next_functions]
            if (learnt := id(getattr(node, "variable", None))) in kept:
                places[kept[learnt]] = places.get(kept[learnt], 0) + 1
    for place, count in places.items():
        measured = f"{count} of its tensors learn and are no parameters of the model"
        remedy = "register what it holds: nn.ModuleList, nn.ModuleDict, nn.Parameter or nn.ParameterList"
        yield Finding("warning", place, "optimizer", measured, "none", remedy)


def _judge_reach(
    patient: Patient, model: nn.Module, batch: Batch, generator: torch.Generator, activity: Activity, *, made_up: bool
) -> Iterator[Finding]:
    """Yield findings on parameters that the gradient does not reach, or reaches as nothing but zeros.

    A pass may skip a layer at random (stochastic depth), and in the first step no gradient passes what starts at zero:
    what is missing or zero is looked for in three more passes, with noise in place of zeros.
    """
    sizes = _gradients(patient)
    for _ in range(3):
        lost = [name for name, size in sizes.items() if not size]
        if not lost:
            break
        with torch.no_grad():
            for record, stats in patient.measured():
                own = record.parameter
                opens = stats.closed and record.trainable and "bias" not in record.leaf
                if opens and own is not None and not _expanded(own):
                    own.data.normal_(std=0.1)
        try:
            *_, loss = _loss(_forward(model, batch), batch, model, generator)
            assert loss is not None
            _backward(model, batch, loss, generator)
        except Exception:  # whatever a model raises at weights other than its start: of zeros nothing is known then
            sizes = {name: None for name, size in sizes.items() if size is None}
            break
        again = _gradients(patient)
        sizes |= {name: again.get(name) if sizes[name] is None else again.get(name) or 0.0 for name in lost}
    # A made-up batch may leave out inputs, such as an encoder's states, that training has.
    yield from judge_reach(sizes, patient, activity, unused="note" if made_up else "warning")


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
    tables = _tables(model)
    # What a user lets happen as a gradient arrives, such as a step of an optimiser, is no part of a look.
    at_gradients = [p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks]
    tables += [(hooks, dict(hooks)) for hooks in at_gradients]
    for hooks in at_gradients:
        hooks.clear()
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
        for table, then in tables:
            table.clear()
            table.update(then)


def _tables(model: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Return the tables of hooks and modules, and what they hold: what a pass adds to them stands in the same ones."""
    parts = [part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    fields = MODULE_FIELDS - {"_parameters", "_buffers"}
    tables = [table for part in parts for name, table in vars(part).items() if name in fields]
    return [(table, dict(table)) for table in tables if isinstance(table, dict)]


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
        _, _, again = _loss(_forward(model, batch), batch, model, generator)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the logits with their classes last, their loss where targets state it, and a loss to differentiate.

    That loss is the model's own, or depends on all that it gives: a second head learns from a loss of its own.
    """
    own = getattr(output, "loss", None)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    targets = batch.targets if batch.targets is not None else batch.keywords.get("labels")
    rows = classes = stated = None
    if isinstance(logits, Tensor) and dense(logits) and logits.is_floating_point() and logits.ndim > 1:
        rows = _by_class(logits, targets)
        classes = rows if rows is not None or not _is_classifier(model, logits) else logits
    if isinstance(own, Tensor) and own.ndim == 0:
        return classes, own if rows is not None else None, own
    parts = []
    if classes is not None:
        flat = classes.reshape(-1, classes.shape[-1]).float()
        known = rows is not None
        named = targets if known else torch.randint(flat.shape[-1], (len(flat),), generator=generator)
        assert isinstance(named, Tensor)
        parts = [F.cross_entropy(flat, named.reshape(-1).long().to(flat.device), ignore_index=-100)]
        stated = parts[0] if known else None
    for part in floating(output):
        if part is not logits or classes is None:
            # Not the mean square: that of a normalised output is constant, and its gradient only rounding.
            part = torch.view_as_real(part) if part.is_complex() else part
            weights = torch.randn(part.shape, generator=generator).to(part.device)
            parts.append((part.float() * weights).mean())
    # Of a model that lies on several devices, outputs may.
    return classes, stated, sum((part.to(parts[0].device) for part in parts[1:]), parts[0]) if parts else None


def _by_class(logits: Tensor, targets: Any) -> Tensor | None:
    """Return logits with the classes last if targets name one for every row; −100 marks rows that do not count.

    Classes are the last dimension, or the second, as torch has it of sequences and images.
    """
    if not isinstance(targets, Tensor) or not dense(targets) or targets.is_floating_point():
        return None
    named = targets[targets != -100]
    if not named.numel() or int(named.min()) < 0:
        return None
    last, second = logits, logits.movedim(1, -1)
    fitting = [rows for rows in (last, second) if rows.shape[:-1] == targets.shape]
    rows = next(iter(fitting), last)
    fits = rows.shape[:-1].numel() == targets.numel() and 1 < rows.shape[-1] > int(named.max())
    return rows if fits else None


def _is_classifier(model: nn.Module, logits: Tensor) -> bool:
    """Return whether the last dimension counts classes: as many as the model or its configuration names."""
    config = attribute(model, "config")
    named = [attribute(s, n) for s in (config, model) for n in ("vocab_size", "num_labels", "num_classes")]
    named += [attribute(attribute(config, "text_config"), "vocab_size")]
    sizes = [size for size in named if isinstance(size, int)]
    return logits.ndim in (2, 3) and logits.shape[-1] > 1 and logits.shape[-1] in sizes


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
