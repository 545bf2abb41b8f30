"""How scores, outputs and their moves in two runs of a module are compared, and brought into one order of axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Several libraries take scores or softmax in float32, whatever the type.
_RELATIVE = 1e-4
# The size of a push of weights, and how far what moves in proportion may be off, as a share.
PUSH = 1e-3
PUSHED = 0.05
_MASKED = -1e20


def by_query(scores: Tensor) -> Tensor:
    """Return scores with queries before keys, where another axis (the heads, as in bqhk) stands between them."""
    *axes, keys = scores.shape
    return scores.movedim(axes.index(keys), -2) if axes and axes[-1] != keys and axes.count(keys) == 1 else scores


def by_token(out: Tensor, length: int) -> Tensor | None:
    """Return an output as (L, X), also of an image's pixels, channels last or first; ``None`` if it has no tokens."""
    if out.ndim == 4 and length in (pixels := [out.shape[1:3].numel(), out.shape[2:].numel()]):
        out = out.movedim(1, -1) if pixels[0] != length else out
        return out.flatten(1, 2).movedim(1, 0).flatten(1).double()
    return out.movedim(out.shape.index(length), 0).flatten(1).double() if length in out.shape else None


def is_open(scores: Tensor) -> Tensor:
    """Return which scores are not masked."""
    return scores.isfinite() & (scores > _MASKED)


def columns_of(scores: Tensor, pushed: Sequence[Tensor]) -> Tensor:
    """Return which columns of scores move when the rows of keys are pushed: those of tokens, and no sink's.

    Where one more than the tokens moves, the last is one that its owner adds.
    """
    moves_X = torch.stack([(each - scores).nan_to_num(0.0, 0.0, 0.0) for each in pushed]).abs().flatten(0, -2).amax(0)
    columns, length = (moves_X > 1e-6 * moves_X.max()).nonzero().flatten(), scores.shape[-2]
    return columns[:length] if len(columns) == length + 1 else columns


def sink_of(scores: Tensor, columns: Tensor) -> list[int]:
    """Return the column of a sink, which tells of the largest that was taken off each row; none where nothing was.

    Args:
        scores: of weights that are not zero, as of queries and keys of zero all scores may be.
        columns: of tokens.
    """
    others = {*range(scores.shape[-1])} - {*columns.tolist()}
    return [*others] if len(others) == 1 and bool((scores.amax(-1) == 0).all()) else []


def of_tokens(scores: Tensor, columns: Tensor, sink: list[int]) -> Tensor:
    """Return columns of scores, less that of ``sink_of``."""
    return (scores - scores[..., sink] if sink else scores)[..., columns]


def is_close(a: Tensor, b: Tensor, scores: Tensor) -> bool:
    """Return whether two sets of scores agree where they are not masked."""
    seen = is_open(scores)
    return bool(seen.any()) and is_near(a[seen], b[seen])


def is_near(a: Tensor, b: Tensor) -> bool:
    """Return whether a is b up to float32's rounding of the largest of them."""
    return bool(a.isfinite().all()) and float((a - b).abs().max()) <= _RELATIVE * float(b.abs().max())


def is_clear(values: Tensor) -> bool:
    """Return whether any of them is more than rounding."""
    return values.numel() > 0 and float(values.abs().max()) > 1e-6


def off_multiple(pair: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far (a₁, a₂), the moves along the two ways, is from a multiple of (b₁, b₂), and both their size."""
    return pair[0] * other[1] - pair[1] * other[0], pair.norm(dim=0) * other.norm(dim=0)


def same_direction(pair: Tensor, other: Tensor, seen: Tensor) -> bool:
    """Return whether moves are a multiple of others where scores are not masked: up to the push's own size."""
    cross, size = (part.expand(seen.shape)[seen] for part in off_multiple(pair, other))
    return is_clear(size / PUSH**2) and float(cross.norm()) <= PUSHED * float(size.norm())
