"""Self-attention in a class that nobody registered, read from the names of its linear layers; the probe must agree."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.linears import fused, paired, separate
from espalier.init.layouts.registry import Found, Skipped, register_guess

# Names of queries, keys and values that belong together, and of the output projection beside them.
_FORMS = ("{}_proj", "w{}", "W{}", "w_{}", "W_{}", "to_{}", "{}_lin", "linear_{}", "{}_linear", "{}")
TRIPLES = [(form.format("q"), form.format("k"), form.format("v")) for form in _FORMS]
TRIPLES += [("query", "key", "value"), ("query_proj", "key_proj", "value_proj")]
FUSED = ("qkv", "c_attn", "to_qkv", "qkv_proj", "Wqkv", "wqkv", "query_key_value")
OUTPUTS = (
    "o_proj", "out_proj", "c_proj", "to_out", "out_lin", "linear_out", "out_linear", "proj_out",
    "wo", "Wo", "w_o", "W_o", "proj", "dense", "out", "o",
)  # fmt: skip


@register_guess
def guess_attention(module: nn.Module, *, by_head: bool = False) -> Found | None:
    """Return the self-attention that a module's linear layers look like, or ``None``.

    Known forms are four layers (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and their synonyms), the first three in
    a child and the last in another (BERT's), one fused layer whose rows are all queries, all keys, all values
    (nanoGPT's ``c_attn``, ``to_qkv``) or, ``by_head``, those of each head together, and ``to_q`` beside a fused
    ``to_kv``.
    """
    children = dict(module.named_children())
    out = next((_linear_in(children[name], name) for name in OUTPUTS if name in children), None)
    triple = next((names for names in TRIPLES if children.keys() >= set(names)), None)
    single = next((name for name in FUSED if name in children), None)
    inner = next((name for name in ("self", "attention") if name in children), None)
    if inner and hasattr(children.get("output"), "dense") and hasattr(children[inner], "query"):
        return separate(module, f"{inner}.query", f"{inner}.key", f"{inner}.value", "output.dense")
    if triple is None and single is None and not children.keys() >= {"to_q", "to_kv"}:
        return None
    if out is None:
        return Skipped("attention", "it has queries, keys and values but no output projection: left alone")
    if triple is not None:
        return separate(module, *triple, out)
    if single is not None:
        return fused(module, single, out, by_head=by_head)
    return paired(module, "to_q", "to_kv", out)


@register_guess
def guess_rows_by_head(module: nn.Module) -> Found | None:
    """Return the other reading of a fused layer: queries, keys and values of each head together (GPT-NeoX's)."""
    return guess_attention(module, by_head=True) if set(FUSED) & set(module._modules) else None


def _linear_in(layer: nn.Module, name: str) -> str:
    """Return the name of a layer, or of the first one inside when it is a list (a linear layer and its dropout)."""
    return f"{name}.0" if isinstance(layer, nn.Sequential | nn.ModuleList) and len(layer) else name
