"""Self-attention in a class that nobody registered, read from the names of its linear layers; the probe must agree."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.linears import fused, paired, separate
from espalier.init.layouts.registry import Found, Skipped, attribute, register_guess

# Names of queries, keys and values that belong together, of both of the latter in one, and of the output projection.
_FORMS = (
    "{}_proj", "w{}", "W{}", "w_{}", "W_{}", "to_{}", "{}_lin", "linear_{}", "{}_linear", "{}",
    "c_{}", "proj_{}", "{}_projection", "fc_{}", "lin_{}", "{}_layer", "conv_{}",
)  # fmt: skip
_WORDS = [
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("queries", "keys", "values"),
    ("qs", "ks", "vs"),
    ("Q", "K", "V"),
]
TRIPLES = [(form.format(q), form.format(k), form.format(v)) for q, k, v in _WORDS for form in _FORMS]
PAIRS = [(form.format("q"), form.format("kv")) for form in _FORMS]
LISTS = ("linears", "linear_layers")
FUSED = ("qkv", "c_attn", "to_qkv", "qkv_proj", "Wqkv", "wqkv", "query_key_value")
OUTPUTS = (
    "o_proj", "out_proj", "c_proj", "to_out", "out_lin", "linear_out", "out_linear", "proj_out", "wo", "Wo", "w_o",
    "W_o", "proj", "dense", "out", "o", "fc_out", "out_projection", "output_projection", "proj_o", "W_out", "fc_o",
    "output_proj", "output_linear", "lin_out", "out_layer", "o_linear", "projection", "merge", "fc", "output", "conv_o",
)  # fmt: skip

NO_OUTPUT = "it has queries, keys and values but no output projection of its own: left alone"


@register_guess
def guess_attention(module: nn.Module, *, by_head: bool = False) -> Found | None:
    """Return the self-attention that a module's linear layers look like, or ``None``.

    Known forms are four layers (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and their synonyms), all in one list
    (The Annotated Transformer's), the first three in a child and the last in another (BERT's), one fused layer whose
    rows are all queries, all keys, all values (nanoGPT's ``c_attn``, ``to_qkv``) or, ``by_head``, those of each head
    together, and ``to_q`` beside a fused ``to_kv``.
    """
    children = dict(module.named_children())
    at = {name: _linear_in(child, name) for name, child in children.items()}
    out = next((at[name] for name in OUTPUTS if name in children), None)
    triple = next((names for names in TRIPLES if children.keys() >= set(names)), None)
    single = next((name for name in FUSED if name in children), None)
    pair = next((names for names in PAIRS if children.keys() >= set(names)), None)
    inner = next((name for name in ("self", "attention") if name in children), None)
    listed = next((name for name in LISTS if isinstance(children.get(name), nn.ModuleList)), None)
    if inner and hasattr(children.get("output"), "dense"):
        within = dict(children[inner].named_children())
        theirs = next((names for names in TRIPLES if within.keys() >= set(names)), None)
        if theirs is not None:
            q, k, v = (f"{inner}.{name}" for name in theirs)
            return separate(module, q, k, v, "output.dense")
    if triple is None and single is None and pair is None and listed is not None:
        names = [*(f"{listed}.{place}" for place, _ in children[listed].named_children()), *filter(None, [out])]
        return separate(module, names[0], names[1], names[2], names[3]) if len(names) == 4 else None
    if triple is None and single is None and pair is None:
        return None
    if out is None:
        return Skipped("attention", NO_OUTPUT)
    if triple is not None:
        q, k, v = (at[name] for name in triple)
        return separate(module, q, k, v, out)
    if single is not None:
        return fused(module, at[single], out, by_head=by_head)
    assert pair is not None
    q, kv = (at[name] for name in pair)
    return paired(module, q, kv, out)


@register_guess
def guess_rows_by_head(module: nn.Module) -> Found | None:
    """Return the other reading of a fused layer: queries, keys and values of each head together (GPT-NeoX's)."""
    return guess_attention(module, by_head=True) if set(FUSED) & set(module._modules.keys()) else None


def _linear_in(layer: nn.Module, name: str) -> str:
    """Return the name of a layer, or of the first one with a matrix in a list (beside a dropout, or new axes)."""
    if not isinstance(layer, nn.Sequential | nn.ModuleList) or not len(layer):
        return name
    found = (i for i, part in enumerate(layer) if attribute(attribute(part, "weight"), "ndim", 0) > 1)
    return f"{name}.{next(found, 0)}"
