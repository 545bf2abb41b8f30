"""Weights without noise where units must differ: constant matrices, equal rows, products zero on both sides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Finding, Severity, Verdict, judges, register_check
from espalier.doctor.stats import TensorStats

# Weights that feed a product: with zero here neither this nor what follows gets a gradient.
_READS = re.compile(
    r"(^|[._])(q|k|query|key|qkv|wq|wk|wqkv|c_attn|query_key_value|q_proj|q_lin|k_lin|k_proj|qkv_proj|to_q|to_k|to_qkv|in_proj|"
    r"in_proj_weight|fc1|up_proj|gate_proj|gate_up_proj|c_fc|w1|w3|lin1|linear1|intermediate\.dense|x_proj|conv1d)$",
    re.IGNORECASE,
)
# Of these, the weights that hold both factors of a product; and what else a first layer feeds.
_BOTH = re.compile(
    r"(^|_)(qkv|wqkv|c_attn|query_key_value|qkv_proj|to_qkv|in_proj|gate_up_proj|x_proj)$", re.IGNORECASE
)
_FOLLOWS = re.compile(r"(^|[._])(fc2|down_proj|c_proj|w2|lin2|linear2|output\.dense)$", re.IGNORECASE)
_FACTORS = ("weight", "adapter")
_USUAL = "noise of standard deviation 0.02 to 1/√fan-in"


@register_check("constant")
def constant(patient: Patient) -> Iterator[Finding]:
    """One number everywhere in a matrix: the units of the layer never become different.

    Zero is usual where a branch is to start closed (output projections, LoRA's B, position tables, heads): a note
    there; an error in queries, keys, first layers of an MLP and token embeddings; a warning where the same weight of
    other layers is not zero.
    """
    zero = zero_matrices(patient)
    for record, stats in patient.measured():
        if not record.matrix or not stats.constant or record.role in ("norm", "ssm", "gain"):
            continue
        learns = patient.learns(record)
        vital = stats.closed and learns and (reads(record, patient) or _only_table(record, patient))
        # A bare parameter learns beside a factor that is not zero: attention's query may start there, as a mean.
        if vital and record.role != "embedding" and not record.multiplies:
            vital = holds_both(record) or any(_beside(record, other) for other in zero)
        if vital:
            yield all_zero(record, "error")
        elif stats.closed and learns and patient.alone(record):
            remedy = "draw it as its siblings are drawn"
            yield Finding("warning", record.name, "constant", "all zero, and its siblings are not", _USUAL, remedy)
        elif stats.closed and record.role != "position" and not patient.trained:
            yield all_zero(record, "note")
        elif not stats.closed and record.role in ("weight", "embedding") and learns:
            # What is not called a weight may be a mixing coefficient that starts at one on purpose. Beside a drawn one
            # of its shape it is that one's deviation (NoisyNet, Bayesian layers): their units differ already.
            twins = (s for r, s in patient.measured() if r.layer == record.layer and r.shape == record.shape)
            severity: Severity = "error" if record.multiplies and not any(s.noise for s in twins) else "note"
            remedy = "draw it from noise: equal units get equal gradients and stay equal"
            yield Finding(severity, record.name, "constant", f"every entry is {stats.minimum:.4g}", _USUAL, remedy)


def all_zero(record: Record, severity: Severity) -> Finding:
    """Return what is to be said of a matrix of zeros."""
    remedy = "usual for a branch that starts closed; otherwise draw it"
    if severity == "error":
        remedy = "draw it: no gradient passes a zero here"
    return Finding(severity, record.name, "constant", "all zero", _USUAL, remedy)


def zero_matrices(patient: Patient) -> list[Record]:
    """Return the matrices that hold nothing but zeros, gains of normalisation apart."""
    return [r for r, stats in patient.measured() if r.matrix and r.role != "norm" and stats.closed]


def reads(record: Record, patient: Patient) -> bool:
    """Return whether a weight feeds a product: it is called as those are that do, or attention is seen to read it."""
    return bool(_READS.search(record.layer) or _READS.search(record.leaf)) or patient.feeds_attention(record)


def holds_both(record: Record) -> bool:
    """Return whether a weight is called as those are that hold both factors of a product."""
    return bool(_BOTH.search(record.leaf))


def _beside(record: Record, other: Record) -> bool:
    """Return whether another tensor, of the same module or of a layer in it, is called like a factor beside it."""
    inner = other.multiplies
    if other is record or (other.layer.rpartition(".")[0] if inner else other.layer) != record.layer:
        return False
    name = other.layer if inner else other.leaf
    return bool(_READS.search(name) or _FOLLOWS.search(name))


def _only_table(record: Record, patient: Patient) -> bool:
    """Return whether it is a table of tokens and no other holds anything: a second one may be added from zero on."""
    tables = [stats for r, stats in patient.measured() if r.role == "embedding" and r.matrix]
    return record.role == "embedding" and all(stats.magnitude == 0 for stats in tables)


@register_check("equal-units", scope="tensor")
def equal_units(record: Record, patient: Patient) -> Iterator[Finding]:
    """Output units, heads, experts or shards of one weight that repeat each other."""
    stats, values = record.stats, record.values
    if stats is None or values is None or not record.matrix or stats.constant or stats.nonfinite:
        return
    if record.role not in (*_FACTORS, "embedding") or not patient.learns(record):
        return
    number = equal_pieces(values, patient.heads)
    if number > 1:
        drawn = looks_drawn(values.reshape(number, -1)[0])
        # Filters see a channel each. A table's rows may have been computed alike: what they meet sets them apart.
        meant = not drawn and (record.filters or not record.multiplies or record.role == "embedding")
        yield repeated(record, number, "note" if meant else "error")
        return
    if stats.noise and not record.filters:
        mixer = record.layer.rpartition(".")[0]
        yield from _repeated_rows(record, patient, f"{mixer}.A_log".lstrip(".") in patient.names)


def equal_pieces(values: Tensor, heads: int | None) -> int:
    """Return into how many equal pieces a tensor falls, its rows or parts of the same length; 0 where into none."""
    count = len(values)
    parts = {count, 2, 4, 8, 16, *([heads] if heads else [])}
    for number in sorted((part for part in parts if 1 < part <= count and count % part == 0), reverse=True):
        pieces = values.reshape(number, -1)
        # Rows of few levels, as of identities and averages, repeat on purpose.
        length, equal = pieces.shape[1], torch.equal(pieces[1:], pieces[:-1])  # which stops at the first difference
        if equal and length >= 4 and int(pieces[0].unique().numel()) >= min(length // 2, 64):
            return number
    return 0


def repeated(record: Record, number: int, severity: Severity, more: str = "") -> Finding:
    """Return what is to be said of a tensor of equal pieces."""
    what = "rows" if number == record.shape[0] and len(record.shape) == 2 else "slices"
    remedy = "draw each on its own: repeats come from one seed for every shard, expert or head, or from copying"
    if severity == "note":
        remedy = "usual for a table that was computed; otherwise draw each on its own"
    return Finding(severity, record.name, "equal-units", f"{number} equal {what}{more}", f"{what} that differ", remedy)


def looks_drawn(row: Tensor) -> bool:
    """Return whether numbers are in no order: noise turns, from rising to falling or back, at two of three entries.

    The number of turns in n entries of noise, of any distribution, has mean 2(n − 2)/3 and variance (16n − 29)/90.
    Every second entry is looked at, too: conjugate pairs and interleaved sines turn at each.
    """
    row = row[:4096].double()
    return len(row) >= 16 and all(_turns_like_noise(part) for part in (row, row[::2], row[1::2]))


def _turns_like_noise(row: Tensor) -> bool:
    steps, length = row.diff(), len(row)
    turns = int((steps[1:] * steps[:-1] < 0).sum())
    return turns > 0 and abs(turns - 2 * (length - 2) / 3) < 4 * math.sqrt((16 * length - 29) / 90)


def _repeated_rows(record: Record, patient: Patient, state_space: bool) -> Iterator[Finding]:
    """Rows that occur more than once among others that do not: a note in a table of tokens, where rows that are added
    later often start at the mean of the others."""
    rows = record.units
    assert rows is not None  # a check of tensors is called while they are at hand
    count, length = rows.shape
    if count < 4 or length < 8:
        return
    # Equal rows give equal sums of their first entries; the few that do are compared in full.
    head = rows[:, :32].double()
    keys, order = (head @ torch.linspace(1, 2, head.shape[1], dtype=head.dtype, device=head.device)).sort()
    repeats = []
    for index in (keys[1:] == keys[:-1]).nonzero().flatten().tolist()[:4096]:
        one, other = sorted((int(order[index]), int(order[index + 1])))
        # Zero rows, and rows of few levels, have a check of their own or repeat on purpose.
        if torch.equal(rows[one], rows[other]) and int(rows[one][:64].unique().numel()) > min(length, 64) // 2:
            repeats.append((one, other))
    # The mimetic start of a state-space layer reads and writes its state by the same rows: one block is that behind it.
    offsets = {other - one for one, other in repeats}
    if state_space and len(offsets) == 1 and min(offsets) >= len(repeats):
        return
    if repeats and not _shuffled(record, rows, count - len(repeats), patient):
        severity: Severity = "error" if len(repeats) >= count / 4 else "warning"
        if record.role == "embedding":
            severity = "note"
        one, other = repeats[0]
        measured = f"{len(repeats)} of {count} rows repeat others: row {other} is row {one}"
        remedy = "draw each row on its own: units with equal weights in and out stay equal"
        yield Finding(severity, record.name, "equal-units", measured, "rows that differ", remedy)


def _shuffled(record: Record, rows: Tensor, kept: int, patient: Patient) -> bool:
    """Return whether rows repeat as many times as each pixel becomes pixels of its own (ICNR, arXiv 1707.02937)."""
    if len(record.shape) < 3 or patient.model is None or not kept or len(rows) % kept:
        return False
    each = len(rows) // kept
    shuffles = [part for part in patient.model.modules() if isinstance(part, nn.PixelShuffle)]
    groups = rows.unflatten(0, (kept, each))
    return any(part.upscale_factor**2 == each for part in shuffles) and bool((groups == groups[:, :1]).all())


@judges("zero-rows", scope="tensor", fresh_only=True)
def zero_rows(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """Output units of one weight that are all zero among others that were drawn: queries within a fused projection.

    An error where the layer feeds a product, a warning elsewhere.
    """
    values = record.values
    if values is None or not record.matrix or record.role != "weight" or not patient.learns(record):
        return None
    # Zeros in the sample first: a look at every row costs as much as all other checks.
    if not stats.noise or stats.zeros < stats.sampled / 64:
        return None
    closed = (values.reshape(len(values), -1) == 0).all(1).nonzero().flatten()
    if len(closed) < max(2, len(values) / 32):
        return None
    measured = f"{len(closed)} of {len(values)} rows all zero, from row {int(closed[0])} on"
    remedy = "draw them: heads or units that start at zero here get no gradient, or leave their partners without one"
    return "error" if reads(record, patient) else "warning", measured, "rows drawn alike", remedy


@register_check("closed-twice")
def closed_twice(patient: Patient) -> Iterator[Finding]:
    """Both factors of a product are zero, so that neither ever gets a gradient (LoRA's A and B, a whole branch)."""
    matrices = [r for r, _ in patient.measured() if r.matrix and r.role != "norm"]
    zero = {r.name for r in zero_matrices(patient)}
    for record in matrices:
        other = record.name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if other != record.name and record.name in zero and other in zero:
            measured, remedy = "LoRA's A and B are both zero", "draw A (kaiming_uniform_) after the adapter was added"
            yield Finding("error", record.name, "closed-twice", measured, "A drawn, B zero", remedy)
    # A branch: all matrices below one module. Mixing coefficients, which are no "weight", may well be zero together.
    below: dict[str, list[str]] = {}
    for record in matrices:
        parts = record.layer.split(".")
        for depth in range(len(parts)):
            below.setdefault(".".join(parts[:depth]), []).append(record.name)
    # Nor is a branch closed whose biases were set: deformable attention starts at fixed offsets. None is drawn large.
    biases = [(r, stats) for r, stats in patient.measured() if not r.matrix and "bias" in r.leaf]
    speaking = {bias.layer for bias, stats in biases if stats.magnitude >= 0.5}
    shut = {r.name for r in matrices if r.name in zero and r.leaf == "weight" and r.role in _FACTORS}
    shut -= {r.name for r in matrices if r.layer in speaking}
    closed = [layer for layer, names in below.items() if len(names) > 1 and shut.issuperset(names)]
    for layer in closed:
        if not any(layer.startswith(f"{other}.") for other in closed):
            measured = f"all its {len(below[layer])} weights are zero"
            yield Finding("error", layer, "closed-twice", measured, "at most one of them", "draw all but the last")
