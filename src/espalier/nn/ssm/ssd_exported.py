"""The scan of Mamba-2 for graphs that are to take any length: the number of chunks is an axis, and no loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.nn.precision import widened


def ssd_of_any_length(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    alpha_BLH: Tensor,
    b_BLN: Tensor,
    c_BLN: Tensor,
    d_BH: Tensor | None,
    state_BNHP: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return outputs and the last state of one group; see ``ssd``.

    The sequence is padded to whole chunks of Q tokens with steps of Δ = 0, which change no state. What chunk j leaves
    decays until chunk k begins by exp(T_{k−1} − T_j), T the sums of log decays up to the end of each: a matrix of
    (chunks, chunks), where ``ssd`` goes from chunk to chunk: ``torch.export`` keeps how often a loop runs.
    """
    length = x_BLHP.shape[1]
    # For any length, one more chunk, of no tokens: an axis of one would be taken for one for good.
    n = (length + (2 if isinstance(length, torch.SymInt) else 1) * chunk - 1) // chunk
    more = n * chunk - length

    def in_chunks(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (*[0, 0] * (tensor.ndim - 2), 0, more)).unflatten(1, (-1, chunk))

    x, delta, alpha, b, c = map(in_chunks, (x_BLHP, delta_BLH, alpha_BLH, b_BLN, c_BLN))
    within_BnQH = widened(alpha).cumsum(2)
    ends_BnH = within_BnQH[:, :, -1].cumsum(1)
    begins_BnH = ends_BnH - within_BnQH[:, :, -1]
    # Above the diagonal the exponents would be positive and could overflow.
    heads_first = within_BnQH.transpose(2, 3)
    decays_BnHQQ = (heads_first[..., :, None] - heads_first[..., None, :]).clamp_max(0).exp().to(x.dtype)
    mixing_BnHQQ = decays_BnHQQ * (c @ b.mT).tril()[:, :, None]
    y = (mixing_BnHQQ @ (x * delta[..., None]).transpose(2, 3)).transpose(2, 3)
    left_BnQH = (within_BnQH[:, :, -1:] - within_BnQH).exp().to(x.dtype)
    updates_BnNHP = torch.einsum("bnqs,bnqhp->bnshp", b, x * (delta * left_BnQH)[..., None])
    carried_BHkj = (begins_BnH.mT[..., :, None] - ends_BnH.mT[..., None, :]).clamp_max(0).exp().tril(-1).to(x.dtype)
    states_BnNHP = torch.einsum("bhkj,bjshp->bkshp", carried_BHkj, updates_BnNHP)
    until_BnH = (ends_BnH[:, -1:] - ends_BnH).exp().to(x.dtype)
    final_BNHP = torch.einsum("bjh,bjshp->bshp", until_BnH, updates_BnNHP)
    if state_BNHP is not None:
        states_BnNHP = states_BnNHP + begins_BnH.exp().to(x.dtype)[:, :, None, :, None] * state_BNHP[:, None]
        final_BNHP = final_BNHP + ends_BnH[:, -1].exp().to(x.dtype)[:, None, :, None] * state_BNHP
    past = torch.einsum("bnqs,bnshp->bnqhp", c, states_BnNHP)
    y = (y + past * within_BnQH.exp().to(x.dtype)[..., None]).flatten(1, 2)
    y = F.pad(y, (0, 0, 0, 0, 0, -more))
    return (y if d_BH is None else y + d_BH[:, None, :, None] * x_BLHP), final_BNHP
