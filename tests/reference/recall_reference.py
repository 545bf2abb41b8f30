"""Solvers of the recall tasks in plain loops: from a row of tokens alone to what must be answered, place by place."""

from __future__ import annotations

START, BAR, STOP = 0, 1, 2


def solve_string(row: list[int], order: str) -> list[tuple[int, int]]:
    """Return (place, next token) for ``$ s | a .``: at the bar comes the answer's first token, at its end ``.``."""
    assert row[0] == START
    bar = row.index(BAR)
    answer = row[1:bar]
    if order == "reverse":
        answer = answer[::-1]
    elif order == "sorted":
        answer = sorted(answer)
    return [(bar + i, token) for i, token in enumerate([*answer, STOP])]


def solve_ngram(row: list[int], ngram: int, answer_length: int, side: str) -> list[tuple[int, int]]:
    """Return (place, next token) for a look-up: find the key's first occurrence, read on."""
    assert row[0] == START
    bars = [place for place, token in enumerate(row) if token == BAR]
    if side == "suffix":
        (bar,) = bars
        string, key, first = row[1:bar], row[bar + 1 : bar + 1 + ngram], bar + ngram
    else:
        left, right = bars
        string, key, first = row[left + 1 : right], row[1:left], right
    assert len(key) == ngram
    for place in range(len(string)):
        if string[place : place + ngram] == key:
            answer = string[place + ngram : place + ngram + answer_length]
            return [(first + i, token) for i, token in enumerate(answer)]
    raise AssertionError("the key does not occur")


def solve_mqar(row: list[int], pairs: int, asked: list[int]) -> list[tuple[int, int]]:
    """Return (place, value) at the places ``asked``: what the pairs at the start bind the key there to."""
    book = {row[2 * i]: row[2 * i + 1] for i in range(pairs)}
    return [(place, book[row[place]]) for place in asked]
