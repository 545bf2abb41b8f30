"""What the probe's numbers mean: thresholds, and the words of the findings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from torch import Tensor

from espalier.doctor.patient import Patient
from espalier.doctor.registry import Finding, Severity
from espalier.doctor.watch import Activity

# Over the depth of a healthy network activations change by at most some ten times.
_GROWTH = 100.0
# Batch norm alone multiplies gradients by about 1.2 a layer, backwards (ConvMixer-768/32: 4e4 from end to end).
_GRADIENTS = 1e6


def judge_activity(activity: Activity, depth: Sequence[tuple[str, float]]) -> Iterator[Finding]:
    """Yield findings on a forward pass, given the outputs' sizes along the blocks."""
    if activity.broken is not None:
        measured, usual = "NaN or infinity in its output", "finite activations"
        remedy = "look at this module's weights and inputs: it is the first whose output is not finite"
        yield Finding("error", activity.broken, "activations", measured, usual, remedy)
        return
    if depth and depth[0][1] > 0:
        (first, start), *_, (last, end) = depth
        ratio = end / start
        if not 1 / _GROWTH <= ratio <= _GROWTH:
            severity: Severity = "error" if ratio > _GROWTH**2 or ratio < _GROWTH**-3 else "warning"
            measured = f"rms {end:.3g}, {ratio:.2g} times that of {first}"
            remedy = "scale the weights up: the signal dies out with depth"
            if ratio > 1:
                remedy = "scale residual branches down with depth, or normalise"
            yield Finding(severity, last, "activations", measured, "within 100 times over the depth", remedy)
    for name, share in activity.dead.items():
        if share >= 0.5:
            severity = "error" if share >= 0.95 else "warning"
            remedy = "look at the bias before it (large and negative?) and at the size of its inputs"
            yield Finding(severity, name, "dead-units", f"{share:.0%} of units always zero", "under 10 %", remedy)
    for name, share in activity.saturated.items():
        if share >= 0.7:
            measured = f"{share:.0%} of its entries are at a bound"
            remedy = "scale down what comes in: at the bounds no gradient passes"
            yield Finding("warning", name, "saturated", measured, "under 30 %", remedy)
    for name, entropy in activity.entropy.items():
        if entropy < 0.1:
            measured, usual = f"{entropy:.2g} of uniform's", "over 0.5 at the start"
            remedy = "scale queries and keys down: each query sees one key, and its softmax passes no gradient"
            yield Finding("warning", name, "attention-entropy", measured, usual, remedy)


def judge_loss(logits: Tensor, loss: Tensor | None, *, trained: bool) -> Iterator[Finding]:
    """Yield a finding if the loss is far from that of a model that knows nothing, ln(classes).

    Without targets the mean over all of them counts: log Σ exp z − mean z, which is ln C for equal logits. Trained
    weights may be sure of themselves; of made-up targets that says nothing.
    """
    if trained and loss is None:
        return
    classes = logits.shape[-1]
    flat = logits.detach().reshape(-1, classes).double()
    measured = float((flat.logsumexp(-1) - flat.mean(-1)).mean() if loss is None else loss.detach())
    usual = math.log(classes)
    excess = measured - usual
    if not math.isfinite(measured) or excess > max(1.0, 0.15 * usual):
        severity: Severity = "error" if not excess < 3 * usual else "warning"
        what = "loss" if loss is not None else "loss over all targets"
        expected = f"ln {classes:,} = {usual:.3g} before training"
        remedy = "scale the last layer (or the tied embedding) down: its logits are far too sure"
        yield Finding(severity, "", "loss", f"{what} {measured:.3g}", expected, remedy)
    # Probabilities, or a rectifier's outputs. A note: somebody may take their logarithm himself.
    lowest, summed = float(flat.min()), flat.sum(-1)
    if loss is not None and (0 == lowest < flat.max() or (lowest >= 0 and bool(((summed - 1).abs() < 1e-3).all()))):
        remedy = "give cross_entropy logits: no softmax or rectifier before it"
        yield Finding("note", "", "loss", "no output is below zero", "logits of both signs", remedy)


def cut_off() -> Finding:
    """Return what is to be said where nothing that a model gives depends on a parameter."""
    remedy = "look for detach, .data, no_grad, item, argmax or a cast to integers on the way to the output"
    return Finding("error", "", "gradients", "no output depends on a parameter", "gradients everywhere", remedy)


def judge_gradients(sizes: Mapping[str, float | None]) -> Iterator[Finding]:
    """Yield findings on a backward pass, given the root mean square of every parameter's gradient, if it got one."""
    finite = {name: size for name, size in sizes.items() if size is not None and math.isfinite(size)}
    broken = [name for name, size in sizes.items() if size is not None and name not in finite]
    if broken:
        measured = f"NaN or infinity in {len(broken)} gradients"
        remedy = "look for a division, root or norm of zero in the backward pass behind this layer"
        yield Finding("error", broken[-1], "gradients", measured, "finite gradients", remedy)
    if finite and not any(finite.values()):
        remedy = "something cuts the graph or multiplies by zero: look at the findings above"
        yield Finding("error", "", "gradients", "every gradient is zero", "gradients everywhere", remedy)
    # Weights of every list of blocks: their typical gradient, first block against last. Blocks of different lists (a
    # stem and the stages, attention and its norms in XLM) are of different kinds, and are not compared.
    chains: dict[str, dict[str, list[float]]] = {}
    for name, size in finite.items():
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is not None and size > 0 and parts[-1] == "weight":
            chain = chains.setdefault(".".join(parts[:index]), {})
            chain.setdefault(".".join(parts[: index + 1]), []).append(size)
    for chain in (chain for chain in chains.values() if len(chain) >= 3):
        first, *_, last = chain
        ratio = median(chain[first]) / median(chain[last])
        if not 1 / _GRADIENTS < ratio < _GRADIENTS:
            measured = f"{ratio:.2g} times the gradient of {last}"
            remedy = "the gradient vanishes or explodes on its way: scale the residual branches, or normalise"
            yield Finding("warning", first, "gradients", measured, "within 1e6 end to end", remedy)


def judge_reach(
    sizes: Mapping[str, float | None], patient: Patient, activity: Activity, *, unused: Severity
) -> Iterator[Finding]:
    """Yield findings on parameters without a gradient, and on the last layer where it is nothing but zeros.

    Args:
        sizes: root mean square of every parameter's gradient; ``None`` where it got none.
        patient: the model.
        activity: what the forward pass showed.
        unused: how severe it is that a parameter gets none.
    """
    usual, remedy = "one for every parameter", "use it in forward, freeze it, or drop it: DDP waits for it"
    missing = [name for name, size in sizes.items() if size is None]
    yield from (Finding(unused, name, "no-gradient", "no gradient", usual, remedy) for name in missing)
    # Rows of a table that the batch does not read have none; a bias may cancel out behind a normalisation.
    weights = [r for r, _ in patient.measured() if r.matrix and r.multiplies and r.role in ("weight", "adapter")]
    zero = [record for record in weights if sizes.get(record.name) == 0]
    if not zero or not any(sizes.values()) or patient.trained:
        return
    calls = list(activity.inputs)
    zero.sort(key=lambda record: calls.index(record.layer) if record.layer in calls else -1)
    # What takes nothing but zeros stands behind the fault; the last one that takes something, right before it.
    reached = [record for record in zero if activity.inputs.get(record.layer) != 0]
    named = reached[-1] if reached else zero[0]
    measured = "every entry of its gradient is zero" + (f", as in {len(zero) - 1} more" if len(zero) > 1 else "")
    remedy = "look behind it for what lets no gradient through: rounding, sign, clamp, dropout of 1, a product with 0"
    if not reached:
        remedy = "its inputs are all zero: look at what comes before it"
    # A made-up image may leave attention with one key, which gets all of it whatever its score.
    lone = unused == "note" and patient.feeds_attention(named)
    yield Finding("note" if lone else "warning", named.name, "no-gradient", measured, usual, remedy)


def judge_bfloat16(activity: Activity) -> Iterator[Finding]:
    """Yield a finding if a pass under bfloat16 autocast is not finite where that in float32 was."""
    if activity.broken is not None:
        measured = "NaN or infinity under bfloat16 autocast"
        remedy = "run this module in float32 (torch.autocast(enabled=False))"
        yield Finding("error", activity.broken, "bfloat16", measured, "finite, as in float32", remedy)
