"""Are the token embedding and the output head tied as the configuration says?"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import register_check

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$")


@register_check("tied")
def tied(patient: Patient) -> Iterator[Finding]:
    """The head shares the embedding's memory where ``tie_word_embeddings`` says so, and exists where it says not."""
    asked = patient.config.get("tie_word_embeddings")
    text = patient.config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        asked = bool(asked) or bool(text["tie_word_embeddings"])
    if not isinstance(asked, bool):
        return
    if patient.model is None:
        yield from _tied_on_disk(patient, asked)
        return
    embedding, head = _ends(patient.model)
    if embedding is None or head is None or embedding.shape != head.shape:
        return
    shared = embedding is head or (not head.is_meta and _same_memory(embedding, head))
    record = next(
        (r for r in patient.records if r.module is not None and r.module._parameters.get(r.leaf) is head), None
    )
    name = record.name if record else "output head"
    if asked and not shared:
        if getattr(patient.model, "_tied_weights_keys", True):
            yield _untied(name, "the head has weights of its own")
        else:  # a class of transformers that lists nothing to tie: calling tie_weights() would change nothing
            yield Finding(
                "warning", name, "tied", "its class ties nothing, whatever the configuration says",
                "the embedding itself (tie_word_embeddings)",
                "assign the embedding's weight to the head, or set tie_word_embeddings to false",
            )  # fmt: skip
    elif shared and not asked:
        yield Finding(
            "warning", name, "tied", "the head shares the embedding's memory", "weights of its own (configuration)",
            "set tie_word_embeddings to true, or give the head its own weight",
        )  # fmt: skip


def _tied_on_disk(patient: Patient, asked: bool) -> Iterator[Finding]:
    head = next((r for r in patient.records if _HEAD.search(r.name)), None)
    embedding = next((r for r in patient.records if _TOKENS.search(r.name)), None)
    if embedding is None or "ForCausalLM" not in str(patient.config.get("architectures")):
        return
    if head is None and not asked:
        yield Finding(
            "error", "lm_head.weight", "tied", "missing from the checkpoint", "stored, as the configuration unties it",
            "set tie_word_embeddings to true, or save the head: on loading it is drawn at random",
        )  # fmt: skip
    elif head is not None and asked and _differ(head, embedding):
        yield _untied(head.name, "the stored head differs from the embedding")


def _untied(name: str, measured: str) -> Finding:
    return Finding(
        "error", name, "tied", measured, "the embedding itself (tie_word_embeddings)",
        "call model.tie_weights() after loading or building, or set tie_word_embeddings to false",
    )  # fmt: skip


def _differ(one: Record, other: Record) -> bool:
    if one.stats is None or other.stats is None or one.shape != other.shape:
        return True
    return one.stats.fingerprint != other.stats.fingerprint


def _ends(model: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the weights of the token embedding and of the output head, where the model names them."""
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError, TypeError):
            module = None
        weight = getattr(module, "weight", None)
        found.append(weight if isinstance(weight, torch.Tensor) else None)
    return found[0], found[1]


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if hasattr(one, "to_local") and hasattr(other, "to_local"):
        one, other = one.to_local(), other.to_local()
    return one.numel() > 0 and one.data_ptr() == other.data_ptr()
