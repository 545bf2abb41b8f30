"""Whether products in float32 are products in float32: what processors and settings may quietly give up.

Tensor cores and matrix extensions multiply 8 or 11 digits of 24 (TF32, bfloat16), and Winograd's convolution rounds
sums instead of products. A rounding bound of the kind γₙ knows none of them. They are found by trying: one factor picks
single numbers of the other, so that every result is a number of that other factor, exactly, in any order of the sums.
Which code a library takes depends on shapes and layouts, so the trial has those of the operation that is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from espalier.certify.refusal import UncertifiableError
from espalier.errors import EspalierError

_FULL = ("none", "ieee")


def refuse_settings(device: torch.device) -> None:
    """Refuse settings of torch and of its libraries under which float32 products keep fewer digits.

    Raises:
        EspalierError: there is one; the message names it.
    """
    with suppress(RuntimeError):  # it cannot be read once newer settings were made, which are asked for below
        if torch.get_float32_matmul_precision() != "highest":
            raise EspalierError(
                "float32 matrix products are set to fewer digits: torch.set_float32_matmul_precision('highest') first"
            )
    cpu, cuda = ("mkldnn", "mkldnn.matmul", "mkldnn.conv"), ("cudnn", "cudnn.conv", "cuda.matmul")
    for name in ("backends", *(f"backends.{part}" for part in (cuda if device.type == "cuda" else cpu))):
        place: object = torch
        for part in name.split("."):
            place = getattr(place, part, None)
        if (set_to := getattr(place, "fp32_precision", "none")) not in _FULL:
            raise EspalierError(
                f"float32 products are set to {set_to}: torch.{name}.fp32_precision = 'ieee', or "
                "torch.set_float32_matmul_precision('highest'), first"
            )
    if os.environ.get("DNNL_DEFAULT_FPMATH_MODE", "STRICT").upper() not in ("", "STRICT"):
        raise EspalierError("DNNL_DEFAULT_FPMATH_MODE asks for fewer digits: unset it")


def try_products(
    run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, *, rows_are_outputs: bool = True
) -> None:
    """Run a bilinear operation on factors of the same shapes and layouts, one of which picks numbers of the other.

    Args:
        run: returns the operation on an operand and a weight.
        x: its operand (N, …), whose numbers are not used.
        weight: its weight (outputs, …), likewise.
        rows_are_outputs: whether that is so; else several rows may meet in one result, and only x picks.

    Raises:
        UncertifiableError: a result is not the number that was picked.
    """
    generator = torch.Generator().manual_seed(0)
    for picks, picked in ((x, weight), (weight, x)) if rows_are_outputs else ((x, weight),):
        # One number of every image, or of every output, is 1.
        places = torch.randint(picks[0].numel(), (len(picks),), generator=generator)
        ones = picks.new_zeros(len(picks), picks[0].numel()).scatter_(1, places[:, None].to(picks.device), 1)
        numbers = (1 + torch.rand(picked.shape, generator=generator)).to(picked)
        pair = [torch.empty_like(like).copy_(new.view(like.shape)) for like, new in ((picks, ones), (picked, numbers))]
        operand, factor = pair if picks is x else reversed(pair)
        if not torch.equal(run(operand, factor).double(), run(operand.double(), factor.double())):
            raise UncertifiableError(
                "its products lose digits that float32 has (TF32, bfloat16 or Winograd): turn that off, or certify in "
                "float64"
            )
