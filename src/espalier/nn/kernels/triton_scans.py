"""Triton kernels of both recurrences on CUDA: Mamba-1 whole, of Mamba-2 what goes from chunk to chunk."""

# The arguments of a kernel are Triton's pointers and numbers, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from espalier.nn.kernels import formulas
from espalier.nn.precision import without_autocast

# Note [Time in registers]
# One program walks the time of one sequence for a few channels, with their states in registers: a tile of (N, channels)
# whose fast side is the channels, so that sums over N stay within a thread or two. Few channels a program make many
# programs, which hide each other's waits; the sums over channels that B and C need are then written once a program and
# added by torch, in a fixed order, so that a step repeats bit for bit.
# The forward pass keeps the state at every T-th step. The backward pass takes such pieces from the last to the first:
# it walks a piece forward again, which leaves the states in a scratch of T tiles, then backward with the adjoint. Both
# stores are small for T near √L.
_MANY_PROGRAMS = 1 << 12
_RUNTIME = ["length", "steps", "pieces"]  # no kernel of its own for each length


@triton.jit(do_not_specialize=_RUNTIME)
def _scan_forward(
    x_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, initial_ptr, y_ptr, starts_ptr, final_ptr,
    length, channels, size, steps, pieces,
    HAS_INITIAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    n, own = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_E)[None, :]
    e = tl.program_id(1) * BLOCK_E + own
    in_n, in_e = n < size, e < channels
    cell, inside = e * size + n, in_n & in_e
    a = tl.load(a_ptr + cell, mask=inside, other=0.0)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + batch * channels * size + cell, mask=inside, other=0.0)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    starts_ptr += (batch * tl.num_programs(1) + tl.program_id(1)) * pieces * (BLOCK_N * BLOCK_E) + own * BLOCK_N + n
    for piece in range(pieces):
        tl.store(starts_ptr + piece * (BLOCK_N * BLOCK_E), state)
        for t in range(piece * steps, tl.minimum(piece * steps + steps, length)):
            row = batch * length + t
            x = tl.load(x_ptr + row * channels + e, mask=in_e, other=0.0)
            delta = tl.load(delta_ptr + row * channels + e, mask=in_e, other=0.0)
            b = tl.load(b_ptr + row * size + n, mask=in_n, other=0.0)
            c = tl.load(c_ptr + row * size + n, mask=in_n, other=0.0)
            state = tl.exp(delta * a) * state + (delta * x) * b
            tl.store(y_ptr + row * channels + e, tl.sum(state * c, axis=0, keep_dims=True), mask=in_e)
    tl.store(final_ptr + batch * channels * size + cell, state, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def _scan_backward(
    x_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, dy_ptr, starts_ptr, dfinal_ptr, scratch_ptr,
    dx_ptr, ddelta_ptr, da_ptr, db_ptr, dc_ptr, dinitial_ptr,
    length, channels, size, steps, pieces,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    batch, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, own = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_E)[None, :]
    e = block * BLOCK_E + own
    in_n, in_e = n < size, e < channels
    cell, inside = e * size + n, in_n & in_e
    a = tl.load(a_ptr + cell, mask=inside, other=0.0)
    carry = tl.load(dfinal_ptr + batch * channels * size + cell, mask=inside, other=0.0)
    da = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    program, tile = batch * tl.num_programs(1) + block, own * BLOCK_N + n
    starts_ptr += program * pieces * (BLOCK_N * BLOCK_E) + tile
    scratch_ptr += program * steps * (BLOCK_N * BLOCK_E) + tile
    # Sums over this program's channels: (blocks, B, L, N).
    sums = (block.to(tl.int64) * tl.num_programs(0) + batch) * length * size + n
    for done in range(pieces):
        piece = pieces - 1 - done
        first = batch * length + piece * steps
        count = tl.minimum(steps, length - piece * steps)
        state = tl.load(starts_ptr + piece * (BLOCK_N * BLOCK_E))
        for t in range(count):
            tl.store(scratch_ptr + t * (BLOCK_N * BLOCK_E), state)
            x = tl.load(x_ptr + (first + t) * channels + e, mask=in_e, other=0.0)
            delta = tl.load(delta_ptr + (first + t) * channels + e, mask=in_e, other=0.0)
            b = tl.load(b_ptr + (first + t) * size + n, mask=in_n, other=0.0)
            state = tl.exp(delta * a) * state + (delta * x) * b
        tl.debug_barrier()  # what one thread wrote another may read
        for back in range(count):
            t = count - 1 - back
            row, at = first + t, (piece * steps + t) * size
            before = tl.load(scratch_ptr + t * (BLOCK_N * BLOCK_E))
            x = tl.load(x_ptr + row * channels + e, mask=in_e, other=0.0)
            delta = tl.load(delta_ptr + row * channels + e, mask=in_e, other=0.0)
            dy = tl.load(dy_ptr + row * channels + e, mask=in_e, other=0.0)
            b = tl.load(b_ptr + row * size + n, mask=in_n, other=0.0)
            c = tl.load(c_ptr + row * size + n, mask=in_n, other=0.0)
            grad = carry + dy * c
            tl.store(dc_ptr + sums + at, tl.sum(dy * state, axis=1, keep_dims=True), mask=in_n)
            tl.store(db_ptr + sums + at, tl.sum(grad * (delta * x), axis=1, keep_dims=True), mask=in_n)
            carry = tl.exp(delta * a) * grad
            through = tl.sum(grad * b, axis=0, keep_dims=True)
            dlog = carry * before  # the gradient of Δ A
            da += dlog * delta
            tl.store(dx_ptr + row * channels + e, through * delta, mask=in_e)
            ddelta = through * x + tl.sum(dlog * a, axis=0, keep_dims=True)
            tl.store(ddelta_ptr + row * channels + e, ddelta, mask=in_e)
            state = before
        tl.debug_barrier()
    tl.store(da_ptr + batch * channels * size + cell, da, mask=inside)
    tl.store(dinitial_ptr + batch * channels * size + cell, carry, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _walk_chunks(
    updates_ptr, decays_ptr, first_ptr, before_ptr, last_ptr, chunks, heads, width, cells,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, head = cell < cells, cell // width % heads
    state = tl.zeros((BLOCK,), updates_ptr.dtype.element_ty)
    if HAS_FIRST:
        state = tl.load(first_ptr + batch * cells + cell, mask=inside, other=0.0)
    for done in range(chunks):
        k = batch * chunks + (chunks - 1 - done if REVERSE else done)
        tl.store(before_ptr + k * cells + cell, state, mask=inside)
        decay = tl.load(decays_ptr + k * heads + head)
        state = tl.load(updates_ptr + k * cells + cell, mask=inside, other=0.0) + decay * state
    tl.store(last_ptr + batch * cells + cell, state, mask=inside)


def tile(batch: int, channels: int, size: int) -> dict[str, int]:
    """Return the tile of a program of the Mamba-1 kernels and its number of warps; see Note [Time in registers]."""
    block_n = triton.next_power_of_2(size)
    block_e = 8 if batch * channels <= 8 * _MANY_PROGRAMS else 16
    return {"BLOCK_N": block_n, "BLOCK_E": block_e, "num_warps": min(8, max(1, block_n * block_e // 256))}


class TritonScan(torch.autograd.Function):
    """The Mamba-1 recurrence of float32 tensors; the same inputs and outputs as in plain torch."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = x, delta, a, b, c, initial
        x, delta, a, b, c = (t.contiguous() for t in (x, delta, a, b, c))
        (batch, length, channels), size = x.shape, a.shape[1]
        steps = length
        if any(ctx.needs_input_grad):
            steps = min(length, triton.next_power_of_2(max(8, int(length**0.5))))
        pieces, shape = triton.cdiv(length, steps), tile(batch, channels, size)
        blocks = triton.cdiv(channels, shape["BLOCK_E"])
        y, final = torch.empty_like(x), x.new_empty(batch, channels, size)
        starts = x.new_empty(batch, blocks, pieces, shape["BLOCK_N"], shape["BLOCK_E"])
        begin = None if initial is None else initial.contiguous()
        with torch.cuda.device_of(x):
            _scan_forward[batch, blocks](
                x, delta, a, b, c, begin, y, starts, final, length, channels, size, steps, pieces,
                HAS_INITIAL=begin is not None, **shape,
            )  # fmt: skip
        ctx.save_for_backward(*given, starts)
        ctx.steps, ctx.shape = steps, shape
        return y, final

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, a, b, c, initial, starts = ctx.saved_tensors
        if formulas.by_formula():
            return tuple(formulas.differentiate(formulas.selective_scan, (x, delta, a, b, c, initial), (dy, dfinal)))
        x, delta, a, b, c = (t.contiguous() for t in (x, delta, a, b, c))
        (batch, length, channels), size = x.shape, a.shape[1]
        blocks, pieces = starts.shape[1:3]
        scratch = x.new_empty(batch, blocks, ctx.steps, *starts.shape[3:])
        dx, ddelta, da = torch.empty_like(x), torch.empty_like(x), x.new_empty(batch, channels, size)
        db, dc = x.new_empty(2, blocks, batch, length, size)
        dinitial = torch.empty_like(da)
        with torch.cuda.device_of(x):
            _scan_backward[batch, blocks](
                x, delta, a, b, c, dy.contiguous(), starts, dfinal.contiguous(), scratch,
                dx, ddelta, da, db, dc, dinitial, length, channels, size, ctx.steps, pieces, **ctx.shape,
            )  # fmt: skip
        return dx, ddelta, da.sum(0), db.sum(0), dc.sum(0), None if initial is None else dinitial


def walk_chunks(
    updates_BnNHP: Tensor, decays_BnH: Tensor, first_BNHP: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the states before each chunk and the one after all; ``reverse`` goes from the last chunk to the first."""
    updates, decays = updates_BnNHP.contiguous(), decays_BnH.contiguous()
    first = None if first_BNHP is None else first_BNHP.contiguous()
    batch, chunks, size, heads, width = updates.shape
    before, last = torch.empty_like(updates), updates.new_empty(batch, size, heads, width)
    cells, block = size * heads * width, 256
    with torch.cuda.device_of(updates):
        _walk_chunks[batch, triton.cdiv(cells, block)](
            updates, decays, first, before, last, chunks, heads, width, cells,
            HAS_FIRST=first is not None, REVERSE=reverse, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return before, last
