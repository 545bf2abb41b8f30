"""Are the token embedding and the output head tied as the configuration says?"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from espalier.doctor.patient import Patient
from espalier.doctor.registry import Finding, register_check

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$")
_EMBEDDING = "the embedding itself (tie_word_embeddings)"


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
    owned = (r.name for r in patient.records if r.module is not None and r.module._parameters.get(r.leaf) is head)
    name = next(owned, "output head")
    if shared and not asked:
        yield Finding(
            "warning", name, "tied", "the head shares the embedding's memory", "weights of its own (configuration)",
            "set tie_word_embeddings to true, or give the head its own weight",
        )  # fmt: skip
    elif asked and not shared and getattr(model, "_tied_weights_keys", True):
        yield _untied(name, "the head has weights of its own")
    elif asked and not shared:  # a class of transformers that lists nothing: calling tie_weights() would change nothing
        yield Finding(
            "warning", name, "tied", "its class ties nothing, whatever the configuration says", _EMBEDDING,
            "assign the embedding's weight to the head, or set tie_word_embeddings to false",
        )  # fmt: skip


def _in_file(patient: Patient, asked: bool) -> Iterator[Finding]:
    head = next((r for r in patient.records if _HEAD.search(r.name)), None)
    embedding = next((r for r in patient.records if _TOKENS.search(r.name)), None)
    if embedding is None or "ForCausalLM" not in str(patient.config.get("architectures")):
        return
    if head is None and not asked:
        yield Finding(
            "error", "lm_head.weight", "tied", "missing from the checkpoint", "stored, as the configuration unties it",
            "set tie_word_embeddings to true, or save the head: on loading it is drawn at random",
        )  # fmt: skip
    elif head is not None and asked:
        prints = [record.stats.fingerprint for record in (head, embedding) if record.stats is not None]
        if len(prints) < 2 or prints[0] != prints[1]:
            yield _untied(head.name, "the stored head differs from the embedding")


def _untied(name: str, measured: str) -> Finding:
    remedy = "call model.tie_weights() after loading or building, or set tie_word_embeddings to false"
    return Finding("error", name, "tied", measured, _EMBEDDING, remedy)


def _end(model: nn.Module, ask: str) -> torch.Tensor | None:
    """Return the weight of the token embedding or of the output head, where the model names it."""
    try:
        weight = getattr(getattr(model, ask)(), "weight", None)
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return weight if isinstance(weight, torch.Tensor) else None


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if hasattr(one, "to_local") and hasattr(other, "to_local"):
        one, other = one.to_local(), other.to_local()
    return one.numel() > 0 and one.data_ptr() == other.data_ptr()
