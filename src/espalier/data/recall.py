"""Recall tasks drawn from a generator: copying, sorting, n-gram look-up, multi-query associative recall.

Every function returns ``(inputs, targets)``, both (B, L): the target at a place is the token after it where that token
belongs to the answer, and −100 elsewhere. Tensors live on the generator's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.data.source import IGNORED
from espalier.errors import EspalierError, require_known
from espalier.sizes import whole_number

START, BAR, STOP = 0, 1, 2
MARKS = 3
"""Tokens 0, 1, 2 are the marks ``$``, ``|`` and ``.``; symbols are the tokens from 3."""

ORDERS = ("forward", "reverse", "sorted")
SIDES = ("prefix", "suffix")
PLACEMENTS = ("power", "uniform")
MQAR_PAIRS = {64: 4, 128: 8, 256: 16, 512: 64}
"""Usual number of pairs by length."""


def copying(
    count: int,
    length: int,
    vocab_size: int,
    *,
    min_length: int | None = None,
    order: str = "forward",
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw ``$ s | a .`` with a the string s itself, reversed (stack order) or sorted by token; the answer is ``a .``.

    Lengths are uniform on {min_length, …, length}, symbols uniform and independent; shorter rows end in more ``.``,
    without a target.

    Args:
        count: rows B.
        length: of the longest string n.
        vocab_size: tokens V, of which three are marks.
        min_length: of the shortest string; ``length`` if none is given.
        order: ``forward``, ``reverse`` or ``sorted``.
        generator: source of lengths and symbols.

    Returns:
        Inputs and targets of shape (B, 2·length + 2).

    Raises:
        EspalierError: no symbols, an impossible length, or an unknown order.

    Source: "Repeat After Me" (arXiv 2402.01032), section 3.
    """
    shortest = whole_number("length", length) if min_length is None else whole_number("min_length", min_length)
    if not shortest <= length:
        raise EspalierError(f"min_length {shortest} is above length {length}: lower it")
    require_known("order", order, ORDERS)
    _require_symbols(vocab_size)
    device = generator.device
    size_B1 = torch.randint(shortest, length + 1, (count, 1), generator=generator, device=device)
    string_BN = torch.randint(MARKS, vocab_size, (count, length), generator=generator, device=device)
    place_N = torch.arange(length, device=device)
    if order == "forward":
        answer_BN = string_BN
    elif order == "reverse":
        answer_BN = string_BN.gather(1, (size_B1 - 1 - place_N).clamp_min(0))
    else:
        answer_BN = string_BN.masked_fill(place_N >= size_B1, vocab_size).sort(1).values
    place_T = torch.arange(2 * length + 3, device=device)
    behind_BT = place_T - size_B1 - 2  # place within the answer
    tokens_BT = string_BN.gather(1, (place_T - 1).clamp(0, length - 1).expand(count, -1))
    tokens_BT[:, 0] = START
    tokens_BT = torch.where(behind_BT == -1, BAR, tokens_BT)
    tokens_BT = torch.where(behind_BT >= 0, answer_BN.gather(1, behind_BT.clamp(0, length - 1)), tokens_BT)
    tokens_BT = tokens_BT.masked_fill(behind_BT >= size_B1, STOP)
    asked_BT = (behind_BT >= 0) & (behind_BT <= size_B1)
    return tokens_BT[:, :-1].contiguous(), tokens_BT.masked_fill(~asked_BT, IGNORED)[:, 1:].contiguous()


def ngram_lookup(
    count: int,
    length: int,
    vocab_size: int,
    *,
    ngram: int = 2,
    answer_length: int = 1,
    side: str = "suffix",
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw a string s and an n-gram of it; the answer a is what follows the first occurrence of the n-gram in s.

    The n-gram comes after the string, ``$ s | key a``, or before it, ``$ key | s | a``; then the model knows what to
    look for while it reads. The n-gram is the one at a place of s drawn uniformly.

    Args:
        count: rows B.
        length: of the string.
        vocab_size: tokens V, of which three are marks.
        ngram: length n of the key.
        answer_length: tokens of the answer.
        side: ``suffix`` or ``prefix``.
        generator: source of strings and places.

    Returns:
        Inputs and targets of shape (B, length + n + answer_length + 1), one more with ``prefix``.

    Raises:
        EspalierError: no symbols, a string too short for key and answer, or an unknown side.

    Source: "Repeat After Me" (arXiv 2402.01032), section 3.
    """
    require_known("side", side, SIDES)
    need = whole_number("ngram", ngram) + whole_number("answer_length", answer_length)
    if length < need:
        raise EspalierError(
            f"length {length} is too short for an n-gram of {ngram} and its answer: give at least {need}"
        )
    _require_symbols(vocab_size)
    device = generator.device
    string_BN = torch.randint(MARKS, vocab_size, (count, length), generator=generator, device=device)
    place_B1 = torch.randint(length - need + 1, (count, 1), generator=generator, device=device)
    key_BK = string_BN.gather(1, place_B1 + torch.arange(ngram, device=device))
    matches_BP = (string_BN.unfold(1, ngram, 1) == key_BK[:, None]).all(-1)
    first_B1 = matches_BP.int().argmax(1, keepdim=True)  # the first of equal values
    answer_BA = string_BN.gather(1, first_B1 + ngram + torch.arange(answer_length, device=device))
    start_B1, bar_B1 = (torch.full_like(place_B1, mark) for mark in (START, BAR))
    if side == "suffix":
        parts = [start_B1, string_BN, bar_B1, key_BK, answer_BA]
    else:
        parts = [start_B1, key_BK, bar_B1, string_BN, bar_B1, answer_BA]
    tokens_BT = torch.cat(parts, dim=1)
    targets_BT = torch.full_like(tokens_BT, IGNORED)
    targets_BT[:, -answer_length:] = answer_BA
    return tokens_BT[:, :-1].contiguous(), targets_BT[:, 1:].contiguous()


def mqar(
    count: int,
    length: int,
    vocab_size: int = 8192,
    *,
    pairs: int | None = None,
    placement: str = "power",
    power: float = 0.01,
    random_filler: bool = True,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw multi-query associative recall: P key-value pairs, then every key once more; its target is its value.

    The first 2P tokens are ``k_1 v_1 … k_P v_P``. Keys are distinct tokens of the lower half {1, …, V/2 − 1}, values
    distinct tokens of the upper half {V/2, …, V − 1}. Of the S = ⌊(length − 2P)/2⌋ slots of two tokens that follow, P
    different ones hold a key each in their first place: slot j = 1 … S is drawn without replacement with weight
    ``j^(power − 1)`` (``power``: queries come soon after the pairs, with a long tail) or 1 (``uniform``). All other
    places are filled with random tokens of the whole vocabulary, or with 0.

    Args:
        count: rows B.
        length: tokens a row.
        vocab_size: V, even.
        pairs: P; the usual number for this length if none is given (``MQAR_PAIRS``).
        placement: ``power`` or ``uniform``.
        power: exponent of the power law.
        random_filler: random tokens between the queries, else 0.
        generator: source of everything.

    Returns:
        Inputs and targets of shape (B, length).

    Raises:
        EspalierError: too many pairs for the vocabulary or the length, or an unknown placement.

    Source: Zoology (arXiv 2312.04927), section 4 and its published generator.
    """
    pairs = usual_pairs(length) if pairs is None else whole_number("pairs", pairs)
    require_known("placement", placement, PLACEMENTS)
    if isinstance(power, bool) or not isinstance(power, int | float):
        raise EspalierError(f"power is {power!r}: give a number")
    if not isinstance(random_filler, bool):
        raise EspalierError(f"random_filler is {random_filler!r}: give true or false")
    half = whole_number("vocab_size", vocab_size) // 2
    if vocab_size % 2 or half - 1 < pairs:
        raise EspalierError(f"vocab_size {vocab_size} for {pairs} pairs: give an even number from {2 * (pairs + 1)}")
    if length < 4 * pairs:
        raise EspalierError(f"length {length} is too short for {pairs} pairs: give at least {4 * pairs}")
    device = generator.device
    keys_BP = 1 + _distinct(torch.zeros(half - 1, device=device), count, pairs, generator)
    values_BP = half + _distinct(torch.zeros(half, device=device), count, pairs, generator)
    slot_S = torch.arange(1, (length - 2 * pairs) // 2 + 1, device=device)
    weight_S = (power - 1) * slot_S.log() if placement == "power" else torch.zeros(len(slot_S), device=device)
    place_BP = 2 * pairs + 2 * _distinct(weight_S, count, pairs, generator)
    tokens_BL = torch.zeros(count, length, dtype=torch.long, device=device)
    if random_filler:
        tokens_BL.random_(vocab_size, generator=generator)
    tokens_BL[:, : 2 * pairs] = torch.stack([keys_BP, values_BP], dim=2).flatten(1)
    tokens_BL.scatter_(1, place_BP, keys_BP)
    return tokens_BL, torch.full_like(tokens_BL, IGNORED).scatter_(1, place_BP, values_BP)


def usual_pairs(length: int) -> int:
    """Return the usual number of pairs for ``length``.

    Raises:
        EspalierError: this length has none.
    """
    if length not in MQAR_PAIRS:
        raise EspalierError(f"length {length} has no usual number of pairs: give pairs, at most {max(1, length // 4)}")
    return MQAR_PAIRS[length]


def _distinct(log_weight_S: Tensor, count: int, picks: int, generator: torch.Generator) -> Tensor:
    """Draw (B, picks) distinct places, one after the other, with the given weights (the Gumbel top-k trick)."""
    noise_BS = torch.empty(count, len(log_weight_S), device=log_weight_S.device).exponential_(generator=generator)
    return (log_weight_S - noise_BS.log()).topk(picks, dim=1).indices


def _require_symbols(vocab_size: int) -> None:
    if whole_number("vocab_size", vocab_size) <= MARKS:
        raise EspalierError(f"vocab_size {vocab_size} leaves no symbol beside {MARKS} marks: give at least {MARKS + 1}")
