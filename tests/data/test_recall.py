"""Recall tasks against solvers that read the inputs alone, and the laws that the draws should follow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.data.recall import MQAR_PAIRS, copying, mqar, ngram_lookup
from espalier.data.source import IGNORED
from espalier.errors import EspalierError
from reference.recall_reference import solve_mqar, solve_ngram, solve_string


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(targets: Tensor) -> list[tuple[int, int]]:
    return [(place, token) for place, token in enumerate(targets.tolist()) if token != IGNORED]


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 12),
    short=st.integers(1, 12),
    vocab=st.integers(4, 20),
    order=st.sampled_from(["forward", "reverse", "sorted"]),
    seed=st.integers(0, 99),
)
def test_strings_are_answered_as_a_plain_loop_answers(
    length: int, short: int, vocab: int, order: str, seed: int
) -> None:
    inputs, targets = copying(5, length, vocab, min_length=min(short, length), order=order, generator=seeded(seed))
    assert inputs.shape == targets.shape == (5, 2 * length + 2)
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < vocab
    for row, wanted in zip(inputs, targets, strict=True):
        solution = solve_string(row.tolist(), order)
        assert labelled(wanted) == solution
        size = len(solution) - 1
        assert min(short, length) <= size <= length
        assert row[2 * size + 2 :].tolist() == [2] * (2 * (length - size))  # after the answer come full stops alone
        assert min(row[1 : size + 1].tolist()) >= 3


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(3, 14),
    ngram=st.integers(1, 3),
    answer=st.integers(1, 3),
    vocab=st.integers(4, 12),
    side=st.sampled_from(["prefix", "suffix"]),
    seed=st.integers(0, 99),
)
def test_lookups_are_answered_as_a_plain_loop_answers(
    length: int, ngram: int, answer: int, vocab: int, side: str, seed: int
) -> None:
    length = max(length, ngram + answer)
    inputs, targets = ngram_lookup(
        5, length, vocab, ngram=ngram, answer_length=answer, side=side, generator=seeded(seed)
    )
    assert inputs.shape == targets.shape == (5, length + ngram + answer + 1 + (side == "prefix"))
    for row, wanted in zip(inputs.tolist(), targets, strict=True):
        assert labelled(wanted) == solve_ngram(row, ngram, answer, side)


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.integers(1, 6),
    more=st.integers(0, 20),
    vocab=st.integers(0, 10),
    placement=st.sampled_from(["power", "uniform"]),
    filler=st.booleans(),
    seed=st.integers(0, 99),
)
def test_associations_are_answered_as_a_plain_loop_answers(
    pairs: int, more: int, vocab: int, placement: str, filler: bool, seed: int
) -> None:
    vocab_size, length = 2 * (pairs + 1 + vocab), 4 * pairs + more
    inputs, targets = mqar(
        5, length, vocab_size, pairs=pairs, placement=placement, random_filler=filler, generator=seeded(seed)
    )
    assert inputs.shape == targets.shape == (5, length)
    for row, wanted in zip(inputs.tolist(), targets, strict=True):
        answers = labelled(wanted)
        assert answers == solve_mqar(row, pairs, [place for place, _ in answers])
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert 1 <= min(keys) <= max(keys) < vocab_size // 2 <= min(values) <= max(values) < vocab_size
        # Every key is asked for once, after all pairs, and every other place is filler.
        assert sorted(row[place] for place, _ in answers) == sorted(keys)
        assert all(place >= 2 * pairs and place % 2 == 0 for place, _ in answers)
        others = [token for place, token in enumerate(row) if place >= 2 * pairs and place not in dict(answers)]
        assert filler or set(others) <= {0}


def shares_fit(counts: Tensor, expected: Tensor) -> bool:
    """Whether counts of independent draws lie within five deviations of what is expected."""
    total = counts.sum()
    return bool(((counts / total - expected).abs() < 5 * (expected * (1 - expected) / total).sqrt() + 1e-9).all())


def test_strings_have_uniform_lengths_and_symbols() -> None:
    inputs, targets = copying(6000, 5, 8, min_length=2, generator=seeded())
    sizes = (targets != IGNORED).sum(1) - 1
    assert shares_fit(sizes.bincount(minlength=6)[2:], torch.full((4,), 0.25))
    symbols = inputs[:, 1:3].flatten()  # within every string
    assert shares_fit(symbols.bincount(minlength=8)[3:], torch.full((5,), 0.2))
    pairs = 5 * (inputs[:, 1] - 3) + inputs[:, 2] - 3
    assert shares_fit(pairs.bincount(minlength=25), torch.full((25,), 0.04))


def test_keys_values_and_slots_follow_their_laws() -> None:
    inputs, targets = mqar(6000, 12, 20, pairs=2, power=0.5, generator=seeded())
    assert shares_fit(inputs[:, 2].bincount(minlength=10)[1:10], torch.full((9,), 1 / 9))
    assert shares_fit(inputs[:, 3].bincount(minlength=20)[10:], torch.full((10,), 0.1))
    # Two of four slots, one after the other, with weights j^(−1/2): the chance of each pair is the sum of two orders.
    weight = torch.arange(1, 5).double() ** -0.5
    weight = weight / weight.sum()
    expected = torch.zeros(4, 4, dtype=torch.double)
    for i in range(4):
        for j in range(4):
            if i != j:
                expected[min(i, j), max(i, j)] += weight[i] * weight[j] / (1 - weight[i])
    slots = (targets[:, 4:] != IGNORED).nonzero()[:, 1].view(-1, 2) // 2
    counts = (4 * slots[:, 0] + slots[:, 1]).bincount(minlength=16)
    assert shares_fit(counts.double(), expected.flatten())
    # Which key stands in the first of the two slots is left to the weights as well, and not given away by its rank.
    first = inputs[torch.arange(6000), 4 + 2 * slots[:, 0]] == inputs[:, 0]
    earlier = sum(weight[i] * weight[j] / (1 - weight[i]) for i in range(4) for j in range(4) if i < j)
    assert float(first.double().mean()) == pytest.approx(float(earlier), abs=5 * math.sqrt(0.25 / 6000))


def test_uniform_slots_are_uniform() -> None:
    _, targets = mqar(6000, 12, 20, pairs=2, placement="uniform", generator=seeded())
    slots = (targets[:, 4:] != IGNORED).nonzero()[:, 1] // 2
    assert shares_fit(slots.bincount(minlength=4).double(), torch.full((4,), 0.25))


def test_lookup_places_are_uniform_where_keys_are_unique() -> None:
    inputs, _ = ngram_lookup(4000, 5, 1_000_000, ngram=2, generator=seeded())
    place = (inputs[:, 1:6] == inputs[:, 7:8]).int().argmax(1)
    assert shares_fit(place.bincount(minlength=3).double(), torch.full((3,), 1 / 3))


def test_answers_cannot_be_read_off_the_place_before() -> None:
    """The token at a labelled place says nothing of its target beyond chance, where the task does not make it so."""
    inputs, targets = copying(4000, 6, 9, generator=seeded())
    for place in range(8, 13):
        same = (inputs[:, place] == targets[:, place]).double().mean()
        assert float(same) == pytest.approx(1 / 6, abs=5 * math.sqrt(5 / 36 / 4000))


@pytest.mark.parametrize("task", [copying, ngram_lookup, mqar])
def test_draws_are_a_function_of_the_generator(task) -> None:  # type: ignore[no-untyped-def]
    state = torch.random.get_rng_state()
    one, two, other = (task(4, 64, 40, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_usual_pairs() -> None:
    for length, pairs in MQAR_PAIRS.items():
        _, targets = mqar(2, length, generator=seeded())
        assert (targets != IGNORED).sum(1).tolist() == [pairs, pairs]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: copying(1, 5, 3, generator=g), "vocab_size 3 leaves no symbol beside 3 marks: give at least 4"),
        (lambda g: copying(1, 0, 9, generator=g), "length is 0: give a whole number from 1"),
        (lambda g: copying(1, 5, 9, min_length=6, generator=g), "min_length 6 is above length 5: lower it"),
        (lambda g: copying(1, 5, 9, min_length=0, generator=g), "min_length is 0"),
        (lambda g: copying(1, 5, 9, order="reversed", generator=g), "did you mean 'reverse'"),
        (lambda g: ngram_lookup(1, 3, 9, ngram=3, generator=g), "length 3 is too short .* give at least 4"),
        (lambda g: ngram_lookup(1, 9, 9, side="sufix", generator=g), "did you mean 'suffix'"),
        (lambda g: ngram_lookup(1, 9, 9, ngram=0, generator=g), "ngram is 0"),
        (lambda g: mqar(1, 64, 16, pairs=8, generator=g), "vocab_size 16 for 8 pairs: give an even number from 18"),
        (lambda g: mqar(1, 64, 65, pairs=8, generator=g), "vocab_size 65 for 8 pairs: give an even number from 18"),
        (lambda g: mqar(1, 20, 64, pairs=8, generator=g), "length 20 is too short for 8 pairs: give at least 32"),
        (lambda g: mqar(1, 100, 64, generator=g), "length 100 has no usual number of pairs: give pairs, at most 25"),
        (lambda g: mqar(1, 64, 64, pairs=-1, generator=g), "pairs is -1"),
        (lambda g: mqar(1, 64, 64, pairs=4, placement="x", generator=g), "unknown placement 'x'"),
        (lambda g: mqar(1, 64, 64, pairs=4, random_filler="false", generator=g), "random_filler is 'false'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_tasks_are_refused_in_one_line(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EspalierError, match=words) as caught:
        call(seeded())
    assert "\n" not in str(caught.value)
