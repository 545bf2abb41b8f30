"""What should be equal and is not, or is and should not: copies, an earlier state, other ranks, tied weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.patient import Patient, Record, pattern_of, whole
from espalier.doctor.registry import Finding, Severity, register_check
from espalier.doctor.stats import dense, measure
from espalier.errors import EspalierError
from espalier.init import StructureReport, audit
from espalier.init.layouts.registry import attribute
from espalier.init.matching import plain_name
from espalier.init.sharded import is_distributed

# Averaged copies of a network start equal on purpose.
_COPIES = re.compile(
    r"teacher|momentum|(^|[._])ema([._]|$)|target|(^|[._])key_encoder|_m\.|shadow|averaged|reference_", re.IGNORECASE
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$")
_EMBEDDING = "the embedding itself (tie_word_embeddings)"
# What the ranks hold of a tensor, whole or a shard; what they are compared on; and whether the bits are noise.
Mark = tuple[str, str, bool]


@register_check("clones")
def clones(patient: Patient) -> Iterator[Finding]:
    """Two untied parameters with equal bits that look like noise: copied layers start, and partly stay, the same."""
    groups: dict[str, list[Record]] = {}
    for record, stats in patient.measured():
        if record.matrix and stats.noise and record.role not in ("ssm", "position"):
            groups.setdefault(stats.fingerprint, []).append(record)
    for first, *others in groups.values():
        # The fingerprint is of a sample: look at every bit before saying so.
        values = patient.load(first.name) if others else None
        same = [other for other in others if values is not None and torch.equal(values, patient.load(other.name))]
        if same:
            yield from _copies(patient, [first, *same])


def _copies(patient: Patient, members: list[Record]) -> Iterator[Finding]:
    names = [member.name for member in members]
    siblings = len({pattern_of(name) for name in names}) == 1
    heads = all(re.search(r"head|classifier|embed|pred", name, re.IGNORECASE) for name in names)
    severity: Severity = "error" if siblings or not heads else "warning"
    remedy = "draw every layer again (reset_parameters), or tie them if sharing is meant"
    if not all(map(patient.learns, members)) or any(_COPIES.search(name) for name in names):
        severity, remedy = "note", "usual for an averaged or frozen copy; otherwise draw it again"
    elif patient.model is None and severity == "warning":  # files keep tied weights twice
        return
    for name in names[1:]:
        yield Finding(severity, name, "clones", f"equal to {names[0]}", "noise of its own", remedy)


@register_check("structure")
def structure(patient: Patient) -> Iterator[Finding]:
    """Layers that carried structure in an earlier report and do not now."""
    if not isinstance(patient.against, StructureReport):
        return
    if patient.model is None:
        raise EspalierError("against: a report is compared with a module: open the checkpoint as one first")
    for row in audit(patient.model, against=patient.against).layers:
        usual = row.asked or "the structure that was written"
        if row.status == "lost":
            measured, remedy = "the structure is gone", "call structure_ after whatever drew these weights again"
            yield Finding("error", row.layer, "structure", row.note or measured, usual, remedy)
        elif row.status == "changed":
            measured, remedy = "other bits than were written", "usual after training or a cast"
            yield Finding("note", row.layer, "structure", row.note or measured, usual, remedy)


@register_check("overwritten")
def overwritten(patient: Patient) -> Iterator[Finding]:
    """Weights that are not those of a checkpoint that the model should hold: redrawn on load, or never loaded."""
    if not isinstance(patient.against, Mapping):
        return
    # Wrappers put words into the names of a state dictionary, too; a part of the user's own may be called like them.
    held = {name: name for name in patient.against if isinstance(name, str)}
    for name in tuple(held):
        held.setdefault(plain_name(name), name)
    for record in patient.records:
        names = [held[n] for n in (record.name, *patient.aliases.get(record.name, ())) if n in held]
        if not names and not record.buffer:
            remedy = "it keeps its own start: is that meant?"
            yield Finding("warning", record.name, "overwritten", "not in the checkpoint", "stored", remedy)
        stored = patient.against[names[0]] if names and not record.meta else None
        if not isinstance(stored, Tensor) or stored.is_meta:
            continue
        if tuple(stored.shape) != record.shape:
            measured = f"shape {record.shape}, stored {tuple(stored.shape)}"
        else:
            share = _difference(patient.load(record.name), whole(stored))
            if not share:
                continue
            measured = f"{share:.0%} of its entries differ"
        remedy = "load again last: something initialised it after it was loaded"
        yield Finding("error", record.name, "overwritten", measured, "what the checkpoint holds", remedy)


def _difference(own: Tensor, stored: Tensor) -> float:
    """Return the share of entries that differ; 0 where they cannot be compared: sparse, nested and quantised ones."""
    if not (type(own) is type(stored) is Tensor and dense(own) and dense(stored)):
        return 0.0
    if own.is_quantized or stored.is_quantized:
        return 0.0
    own = own.to(stored.dtype) if stored.is_complex() else own  # which has no imaginary part
    stored = stored.to(own.device, own.dtype)
    if own.is_floating_point() and own.itemsize == 1:  # torch does not compare these
        own, stored = own.float(), stored.float()
    if torch.equal(own, stored):
        return 0.0
    return float(((own != stored) & ~((own != own) & (stored != stored))).double().mean())


@register_check("ranks")
def ranks(patient: Patient) -> Iterator[Finding]:
    """Replicated tensors have equal bits on every rank; shards of noise have different ones.

    Running statistics are not compared: each rank keeps its own between forward passes.

    Every rank must call; all get the same findings.
    """
    world = torch.distributed.get_world_size() if is_distributed() else 1
    if patient.model is None or world < 2:
        return
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, dict(_marks(patient.model)))
    # Names that some rank lacks belong to a stage of a pipeline.
    for name in (name for name in everyone[0] if all(name in marks for marks in everyone)):
        kinds, prints, noise = (set(column) for column in zip(*(marks[name] for marks in everyone), strict=True))
        if kinds == {"replica"} and len(prints) > 1:
            measured = f"{len(prints)} different tensors on {world} ranks"
            remedy = "broadcast from rank 0 (DistributedDataParallel does), or seed every rank alike before building"
            yield Finding("error", name, "ranks", measured, "one, on every rank", remedy)
        elif kinds == {"shard"} and len(prints) == 1 and noise == {True}:
            remedy = "initialise before sharding, or with another seed on every rank"
            yield Finding("error", name, "ranks", f"the same shard on {world} ranks", "different shards", remedy)


def _marks(model: nn.Module) -> Iterator[tuple[str, Mark]]:
    """Yield what this rank holds of every tensor: the fingerprint of its replica or of its shard."""
    from torch.distributed.tensor import DTensor, Shard

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        own = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        if own or tensor.is_meta or nn.parameter.is_lazy(tensor):
            continue
        # Megatron and FSDP1 keep shards as ordinary tensors that say so.
        if getattr(tensor, "tensor_model_parallel", False) or "FlatParam" in type(tensor).__name__:
            continue
        kind, local = "replica", tensor.detach()
        if isinstance(tensor, DTensor):
            split = any(isinstance(placement, Shard) for placement in tensor.placements)
            kind, local = "shard" if split else "replica", tensor.to_local().detach()
        if not local.numel():
            continue
        if local.is_floating_point():
            stats = measure(local)
            yield plain_name(name), (kind, stats.fingerprint, stats.noise)
        elif kind == "replica":
            yield plain_name(name), (kind, str(int(local.long().sum())), False)


@register_check("tied")
def tied(patient: Patient) -> Iterator[Finding]:
    """The head shares the embedding's memory where ``tie_word_embeddings`` says so, and exists where it says not."""
    asked = patient.config.get("tie_word_embeddings")
    text = patient.config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        asked = bool(asked) or bool(text["tie_word_embeddings"])
    if isinstance(asked, bool):
        yield from _in_file(patient, asked) if patient.model is None else _in_memory(patient, patient.model, asked)


def _in_memory(patient: Patient, model: nn.Module, asked: bool) -> Iterator[Finding]:
    embedding, head = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    if embedding is None or head is None or embedding.shape != head.shape:
        return
    shared = embedding is head or (not head.is_meta and _same_memory(embedding, head))
    name = next((r.name for r in patient.records if r.parameter is head), "output head")
    if shared and not asked:
        measured, usual = "the head shares the embedding's memory", "weights of its own (configuration)"
        remedy = "set tie_word_embeddings to true, or give the head its own weight"
        yield Finding("warning", name, "tied", measured, usual, remedy)
    elif asked and not shared and attribute(model, "_tied_weights_keys", True):
        yield _untied(name, "the head has weights of its own")
    elif asked and not shared:  # a class of transformers that lists nothing: calling tie_weights() would change nothing
        measured = "its class ties nothing, whatever the configuration says"
        remedy = "assign the embedding's weight to the head, or set tie_word_embeddings to false"
        yield Finding("warning", name, "tied", measured, _EMBEDDING, remedy)


def _in_file(patient: Patient, asked: bool) -> Iterator[Finding]:
    head = next((r for r in patient.records if _HEAD.search(r.name)), None)
    embedding = next((r for r in patient.records if _TOKENS.search(r.name)), None)
    if embedding is None or "ForCausalLM" not in str(patient.config.get("architectures")):
        return
    if head is None and not asked:
        measured, usual = "missing from the checkpoint", "stored, as the configuration unties it"
        remedy = "set tie_word_embeddings to true, or save the head: on loading it is drawn at random"
        yield Finding("error", "lm_head.weight", "tied", measured, usual, remedy)
    elif head is not None and asked:
        prints = [record.stats.fingerprint for record in (head, embedding) if record.stats is not None]
        if len(prints) < 2 or prints[0] != prints[1]:
            yield _untied(head.name, "the stored head differs from the embedding")


def _untied(name: str, measured: str) -> Finding:
    remedy = "call model.tie_weights() after loading or building, or set tie_word_embeddings to false"
    return Finding("error", name, "tied", measured, _EMBEDDING, remedy)


def _end(model: nn.Module, ask: str) -> Tensor | None:
    """Return the weight of the token embedding or of the output head, where the model names it."""
    try:
        layer = getattr(model, ask)()
    except Exception:  # a class without one raises what it likes
        return None
    # A parametrised weight is computed whenever it is asked for: what is tied is what it is computed from.
    kept = attribute(attribute(layer, "parametrizations"), "weight")
    weight = attribute(layer, "weight") if kept is None else attribute(kept, "original")
    return weight if isinstance(weight, Tensor) else None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if hasattr(one, "to_local") and hasattr(other, "to_local"):
        one, other = one.to_local(), other.to_local()
    return one.numel() > 0 and one.data_ptr() == other.data_ptr()
