"""Programs of ``torch.export`` that hold Mamba's recurrences, at sizes that they were not exported at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from espalier.nn import Mamba1, Mamba2, ssd, use_backend
from needs import IMPLEMENTATIONS
from reference.ssd_reference import ssd_loop

BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=4096)


class Recurrence(nn.Module):
    """Mamba-2's with a start, two groups and the state at the end."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *given, start = tensors
        y, final = ssd(*given, initial_state=start, return_state=True, chunk_size=8)
        return y, final


def drawn(batch: int, length: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(length)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g)  # noqa: E731
    delta, a = normal(batch, length, 4).abs(), -normal(4).abs()
    b, c = normal(batch, length, 2, 6), normal(batch, length, 2, 6)
    return normal(batch, length, 4, 5), delta, a, b, c, normal(4), normal(batch, 4, 6, 5)


@pytest.mark.parametrize("length", [5, 8, 30])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_program_of_any_length_is_the_recurrence(implementation: str, length: int) -> None:
    of_tokens, of_sequences = {0: BATCH, 1: LENGTH}, {0: BATCH}
    shapes = (of_tokens, of_tokens, None, of_tokens, of_tokens, None, of_sequences)
    with use_backend(implementation):
        program = torch.export.export(Recurrence(), drawn(2, length), dynamic_shapes=(shapes,)).module()
    for batch, tokens in ((1, 2), (3, 7), (2, 8), (2, 9), (1, 16), (1, 65), (2, 100)):
        given = drawn(batch, tokens)
        for found, expected in zip(program(*given), ssd_loop(*given), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mixer", [Mamba1, Mamba2])
def test_a_mixer_takes_batches_of_any_size_and_is_trained_in_its_program(
    mixer: type[nn.Module], implementation: str, strict: bool
) -> None:
    with torch.random.fork_rng(), use_backend(implementation):
        torch.manual_seed(0)
        net = (Mamba2(8, head_dim=4) if mixer is Mamba2 else Mamba1(8)).double()
        with torch.no_grad():
            program = torch.export.export(
                net, (torch.ones(2, 20, 8).double(),), dynamic_shapes=({0: BATCH},), strict=strict
            ).module()
    for batch in (1, 5):
        x = torch.randn(batch, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        ours, theirs = program(x), net(x)
        torch.testing.assert_close(ours, theirs)
        for name, parameter in net.named_parameters():
            of_program = dict(program.named_parameters())[name]
            found, expected = (
                torch.autograd.grad(y.square().sum(), p, retain_graph=True)[0]
                for y, p in ((ours, of_program), (theirs, parameter))
            )
            torch.testing.assert_close(found, expected)
