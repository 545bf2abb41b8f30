"""Baselines for mimetic initialisation: what others write into attention and MLP layers, each in a few lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init.attention.near_identity import full_precision, random_frame
from espalier.init.layouts import AttentionWeights, locate_layers
from espalier.randomness import cpu_generator

_SPARE = 0.01  # of their size, for what an impulse does not need
# First and second linear layer of an MLP, by the names that libraries give them.
_MLP_PAIRS = (("fc1", "fc2"), ("c_fc", "c_proj"), ("linear1", "linear2"), ("up_proj", "down_proj"), ("w1", "w2"))


@torch.no_grad()
def truncated_normal_(model: nn.Module, *, std: float = 0.02, generator: torch.Generator | None = None) -> None:
    """Draw all four attention weights from a normal distribution cut at ±2 deviations, biases zero.

    Source: the usual default of vision transformers (timm's ``trunc_normal_(std=0.02)``).
    """
    generator = cpu_generator(generator)
    for weights in _opened(model):
        for part in (weights.q, weights.k, weights.v, weights.out):
            noise = torch.empty(part.shape, dtype=torch.float32, device="cpu")
            part.copy_(nn.init.trunc_normal_(noise, std=std, a=-2 * std, b=2 * std, generator=generator))
        _zero(weights.biases)


@torch.no_grad()
def uniform_values_(model: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Draw values and output projections from ±1/√d, without structure: a control for the size of mimetic ones.

    Queries and keys stay. Mimetic values and outputs are larger than a default's 0.02; if this arm does as well, their
    size mattered and not their diagonal.
    """
    generator = cpu_generator(generator)
    for weights in _opened(model):
        bound = weights.q.shape[-1] ** -0.5
        for part in (weights.v, weights.out):
            noise = torch.empty(part.shape, dtype=torch.float32, device="cpu")
            part.copy_(noise.uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def zero_output_(model: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Set output projections and their biases to zero, so that every attention block starts as the identity.

    Source: Fixup, arXiv 1901.09321, which starts residual branches at zero.
    """
    for weights in _opened(model):
        _zero((weights.out, *weights.biases))


@torch.no_grad()
def semi_orthogonal_(model: nn.Module, *, generator: torch.Generator | None = None) -> None:
    """Make W_Q and W_K semi-orthogonal per head and W_V the identity: all three have condition number one.

    Per head W_Q and W_K have orthonormal columns (d × k, k ≤ d), drawn uniformly and apart. Output projections stay.
    Source: semi-orthogonal ("conditioned") initialisation of attention, in our reading.

    Raises:
        EspalierError: a head wider than the model, which has no orthonormal columns.
    """
    generator = cpu_generator(generator)
    for weights in _opened(model):
        dim = weights.q.shape[-1]
        width = weights.q.numel() // dim // weights.num_heads
        if width > dim:
            raise EspalierError(
                f"a head of width {width} over {dim} features cannot be semi-orthogonal: choose another"
            )
        for part, heads in ((weights.q, weights.num_heads), (weights.k, weights.num_kv_heads)):
            frames = [random_frame(dim, width, generator=generator).mT for _ in range(heads)]
            part.copy_(torch.stack(frames).reshape(part.shape))
        rows = weights.v.numel() // dim
        weights.v.copy_(torch.eye(rows, dim, dtype=torch.float32, device="cpu").reshape(weights.v.shape))
        _zero(weights.biases)


@torch.no_grad()
@full_precision()
def impulse_(
    model: nn.Module, *, window: int = 3, width: float = 0.5, generator: torch.Generator | None = None
) -> None:
    """Make each head's first attention map a shifted impulse, in closed form: query pixel x attends to x + δ_h.

    The shift δ_h is drawn from a window of f × f pixels, anew for each head and layer. Logits
    ``−‖x + δ_h − y‖² / 2w²`` give maps that are Gaussians of width w around x + δ_h. With P the position embedding of
    the grid, normalised as a block's norm does, P = U S Vᵀ, the best rank-k approximation A Bᵀ of ``√k·Uᵀ L U`` gives
    W_Q = V S⁻¹ A and W_K = V S⁻¹ B, so that P W_Q W_Kᵀ Pᵀ / √k is the best approximation of the logits L that
    positions and rank allow. What a token contains besides its position adds to this. Dimensions of a head beyond that
    rank keep a hundredth of what they held. Values and outputs stay.

    Args:
        model: a model with a ``pos_embed``, (1, tokens, d), over a square grid; a class token before it is left out.
        window: f, odd: shifts go from −(f−1)/2 to (f−1)/2 in both directions.
        width: w, in pixels; the smaller, the nearer to a single pixel.
        generator: source of the shifts.

    Raises:
        EspalierError: no position embedding of a square grid, or grouped queries.

    Source: structured initialisation of attention, arXiv 2404.01139; the closed form is ours.
    """
    places_ND, side = _positions(model)
    u, s, vh = torch.linalg.svd(places_ND, full_matrices=False)
    kept = s > 1e-3 * s[0]
    span_NR, back_DR = u[:, kept], vh[kept].mT / s[kept]
    axis = torch.arange(side, dtype=torch.float32, device="cpu")
    pixels_N2 = torch.cartesian_prod(axis, axis)
    generator = cpu_generator(generator)
    for weights in _opened(model):
        heads, dim = weights.num_heads, weights.q.shape[-1]
        if heads != weights.num_kv_heads:
            raise EspalierError("impulse heads need keys of their own: this model groups its queries")
        rows = weights.q.numel() // dim // heads
        factors = []
        for _ in range(heads):
            shift = torch.randint(-(window // 2), window // 2 + 1, (2,), generator=generator, device="cpu")
            logits = torch.cdist(pixels_N2 + shift, pixels_N2).square().neg_() / (2 * width**2)
            # A constant added to a row changes no map; without it less rank is needed.
            logits -= logits.mean(1, keepdim=True)
            a, sigma, bh = torch.linalg.svd(span_NR.mT @ logits @ span_NR * rows**0.5)
            rank = min(rows, len(sigma))
            factors.append([back_DR @ (part[:, :rank] * sigma[:rank].sqrt()) for part in (a, bh.mT)])
        for part, chosen in ((weights.q, 0), (weights.k, 1)):
            # Where the rank leaves dimensions over, zeros on both sides would get no gradient, ever.
            by_head = part.float().cpu().reshape(heads, rows, dim) * _SPARE
            for head, pair in zip(by_head, factors, strict=True):
                head[: pair[chosen].shape[1]] = pair[chosen].mT
            part.copy_(by_head.reshape(part.shape))
        _zero(weights.biases)


@torch.no_grad()
def mlp_mean_shift_(model: nn.Module, *, mean: float = 0.01, generator: torch.Generator | None = None) -> None:
    """Add a constant to the first weight of every MLP, so that its entries have a mean that is not zero.

    ``W₁ ← W₁ + mean``. Which sign and size help is not settled: an argument to sweep.

    Raises:
        EspalierError: the model has no MLP of two linear layers.

    Source: first MLP layers of trained transformers have a non-zero mean (mimetic initialisation of MLPs); our reading.
    """
    firsts = []
    for module in model.modules():
        children = dict(module.named_children())
        names = next((pair for pair in _MLP_PAIRS if children.keys() >= set(pair)), ())
        layers = list(module) if isinstance(module, nn.Sequential) else [children[name] for name in names]
        pair = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if len(pair) == 2 and pair[0].out_features == pair[1].in_features > pair[0].in_features:
            firsts.append(pair[0])
    if not firsts:
        raise EspalierError(f"model {type(model).__name__} has no MLP of two linear layers to shift")
    for first in firsts:
        first.weight.add_(mean)


def _opened(model: nn.Module) -> Iterator[AttentionWeights]:
    """Yield every self-attention of a model, opened while it is written to."""
    found = False
    for layer in locate_layers(model):
        with layer.open() as weights:
            if isinstance(weights, AttentionWeights):
                found = True
                yield weights
    if not found:
        raise EspalierError(f"model {type(model).__name__} has no self-attention to initialise")


def _zero(parts: Iterable[Tensor]) -> None:
    for part in parts:
        part.zero_()


def _positions(model: nn.Module) -> tuple[Tensor, int]:
    embedding = getattr(model, "pos_embed", None)
    if not isinstance(embedding, Tensor) or embedding.ndim != 3:
        raise EspalierError(f"model {type(model).__name__} has no pos_embed of shape (1, tokens, d) to shift over")
    side = int(embedding.shape[1] ** 0.5)
    places = embedding[0, -(side**2) :].detach().float().cpu()
    if embedding.shape[1] - side**2 > 2 or side < 2:
        raise EspalierError(f"pos_embed of {embedding.shape[1]} tokens is not a square grid: impulses need one")
    return nn.functional.layer_norm(places, places.shape[-1:]), side
