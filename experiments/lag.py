"""How much of a state-space layer's mixing matrix lies where copying needs it, at the start and after training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from espalier.data import GeneratedSource
from espalier.errors import EspalierError
from espalier.nn import Mamba1, Mamba2, mixing_matrix
from espalier.train import Run

EXAMPLES = 16


@torch.no_grad()
def copying_lag_share(model: nn.Module, source: GeneratedSource, examples: int = EXAMPLES) -> float:
    """Return the largest share of any layer while the model copies strings of exactly the training length n.

    The share is Σ_t |M[t, t − n]| / Σ_t Σ_s |M[t, s]| over the places t of the answer, mean over heads or channels and
    over examples: the symbol that is asked for at a place stands n tokens before it.

    Raises:
        EspalierError: the model has no Mamba layer.
    """
    inputs_BL, _ = source.examples(source.length, examples)
    given: list[tuple[nn.Module, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, Mamba1 | Mamba2)]
    hooks = [layer.register_forward_pre_hook(lambda m, args: given.append((m, args[0]))) for layer in layers]
    try:
        model(inputs_BL)
    finally:
        for hook in hooks:
            hook.remove()
    if not given:
        raise EspalierError("the model has no Mamba layer: it has no mixing matrix")
    # Rows of the answer alone: the part before it has nothing to look up.
    first = source.length + 1
    shares = []
    for layer, x_BLD in given:
        mixing = mixing_matrix(layer, x_BLD)  # type: ignore[arg-type]
        rows = mixing[..., first:, :].abs()
        places = torch.arange(rows.shape[-2])
        wanted = rows[..., places, places + first - source.length]
        shares.append(float((wanted.sum(-1) / rows.sum((-2, -1)).clamp_min(1e-30)).mean()))
    return max(shares)


def measured_lags(run: Run) -> Mapping[str, float]:
    """Return the share on the right lag at the start and after training, beside the accuracies of the other splits."""
    source = run.source()
    assert isinstance(source, GeneratedSource)
    last = run.rows[-1]
    others = {key: last[key] for key in last if key.endswith("/accuracy") and key != (run.result or {})["metric"]}
    start, end = (copying_lag_share(run.model(which), source) for which in ("start", "final"))
    return {**others, "right lag, start": start, "right lag, end": end}
