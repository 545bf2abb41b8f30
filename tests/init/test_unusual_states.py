"""Weights in unusual memory, scripted parts, errors and interrupts in the middle of a layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init import VerificationError
from espalier.init.families.attention import AttentionFamily

DIM = 32


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layers(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(nn.MultiheadAttention(DIM, 2) for _ in range(count))


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("error", [VerificationError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["write", "measure"])
def test_a_layer_is_written_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], place: str
) -> None:
    model, calls, step = layers(), [], getattr(AttentionFamily, place)
    before = copies(model)

    def interrupted(family: AttentionFamily, weights: Any, *args: Any) -> Any:
        done = step(family, weights, *args)
        if not weights.q.is_meta:
            calls.append(1)
            if len(calls) == 2:
                raise error("here")
        return done

    monkeypatch.setattr(AttentionFamily, place, interrupted)
    if error is RuntimeError:
        rows = espalier.structure_(model, generator=seeded()).layers
        assert [row.status for row in rows] == ["written", "failed"]
    else:
        with pytest.raises(error, match="here"):
            espalier.structure_(model, generator=seeded())
    monkeypatch.undo()
    assert unchanged(model[1], {name[2:]: value for name, value in before.items() if name[0] == "1"})
    assert [row.status for row in espalier.audit(model).layers] == ["present", "absent"]


def test_a_bias_that_is_one_number_many_times_leaves_its_layer_alone() -> None:
    model = layers()
    model[0].out_proj.bias.data = torch.ones(1).expand(DIM)
    before = copies(model)
    rows = espalier.structure_(model, generator=seeded()).layers
    assert [row.status for row in rows] == ["skipped", "written"]
    assert "expanded" in rows[0].note
    assert unchanged(model[0], {name[2:]: value for name, value in before.items() if name[0] == "0"})


@pytest.mark.parametrize("part", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_a_layer_of_which_a_part_is_frozen_is_left_alone(part: str) -> None:
    model = layers()
    model[0].get_parameter(part).requires_grad_(False)
    before = copies(model)
    rows = espalier.structure_(model, generator=seeded()).layers
    assert [row.status for row in rows] == ["skipped", "written"]
    assert "frozen" in rows[0].note
    assert unchanged(model[0], {name[2:]: value for name, value in before.items() if name[0] == "0"})
    # A model that is frozen as a whole says nothing of its parts.
    assert espalier.structure_(model.requires_grad_(False), generator=seeded()).layers[0].status == "written"


@pytest.mark.parametrize("steps", [(1, 1), (DIM // 2, 1), (1, DIM - 1), (0, 1)])
def test_a_weight_whose_rows_share_numbers_is_left_alone(steps: tuple[int, int]) -> None:
    model = nn.ModuleList([nn.MultiheadAttention(DIM, 2)])
    model[0].out_proj.weight.data = torch.randn(2 * DIM * DIM).as_strided((DIM, DIM), steps)
    before = copies(model)
    with pytest.raises(EspalierError, match="overlapping"):
        espalier.structure_(model, generator=seeded())
    assert unchanged(model, before)


@pytest.mark.parametrize("steps", [(DIM, 1), (1, DIM), (2 * DIM, 1), (2 * DIM, 2)])
def test_a_weight_with_numbers_of_its_own_is_written_however_it_lies(steps: tuple[int, int]) -> None:
    model, plain = layers(1), layers(1)
    model[0].out_proj.weight.data = torch.randn(2 * DIM * DIM).as_strided((DIM, DIM), steps)
    for each in (model, plain):
        assert espalier.structure_(each, generator=seeded()).layers[0].status == "written"
    assert model[0].out_proj.weight.stride() == steps
    assert torch.allclose(model[0].out_proj.weight, plain[0].out_proj.weight, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["norm1", "linear1", "dropout"])
def test_a_scripted_part_is_no_layer_and_changes_no_other(part: str) -> None:
    drawn = []
    for scripted in (False, True):
        model = nn.Sequential(*(nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, batch_first=True) for _ in range(2)))
        if scripted:
            model[0].register_module(part, torch.jit.script(getattr(model[0], part)))
        report = espalier.structure_(model, generator=seeded())
        assert [row.layer for row in report.layers] == ["0.self_attn", "1.self_attn"]
        drawn.append(model[1].self_attn.in_proj_weight.detach())
    assert torch.equal(*drawn)


class Filters(nn.Module):
    """A depthwise convolution with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Scores(nn.Module):
    """Attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return self.out(scores.softmax(-1) @ self.v(x))


COMPILED = {
    "convolution": (lambda: nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM), ""),
    "filters": (Filters, ".conv"),
    "traced": (lambda: torch.jit.trace(Filters(), torch.randn(1, DIM, 9, 9)), ".conv"),
    "attention": (Scores, ""),
    "torch's": (lambda: nn.MultiheadAttention(DIM, 2), ""),
    "deep": (lambda: nn.Sequential(nn.Sequential(Scores())), ".0.0"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", COMPILED)
def test_a_scripted_layer_is_left_alone_and_says_why(kind: str) -> None:
    make, place = COMPILED[kind]
    scripted = torch.jit.script(make())
    for look in (espalier.audit, partial(espalier.structure_, generator=seeded())):
        rows = look(nn.ModuleList([Filters(), scripted])).layers
        assert [row.layer for row in rows] == ["0.conv", f"1{place}"]
        assert rows[1].status == "skipped"
        assert "compiled by torch.jit" in rows[1].note
    espalier.diagnose(nn.ModuleList([Filters(), scripted]))
    with pytest.raises(EspalierError, match=r"compiled by torch\.jit"):
        espalier.structure_(scripted)


class Crossed(nn.Module):
    """A block whose keys are another sequence's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(DIM, 2, batch_first=True), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.attention(x, y, y)[0])


class Nameless(Crossed):
    """The same with arguments that have no names."""

    def forward(self, *sequences: Tensor) -> Tensor:
        return super().forward(*sequences)


def handed_on(block: nn.Module) -> nn.Module:
    """Put a forward in place of a block's that takes whatever it is given, as wrappers of a call do."""
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    return block


class Wrapper(nn.Module):
    """A module that hands on whatever it gets."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("block", [Crossed(), Nameless(), handed_on(Crossed()), Wrapper(Crossed()),
                                   Wrapper(Nameless()), nn.Sequential(handed_on(Crossed()))])  # fmt: skip
def test_whoever_calls_attention_is_asked_whose_keys_it_gets_whatever_its_arguments(block: nn.Module) -> None:
    before = copies(block)
    with pytest.raises(EspalierError, match=r"cross-attention|cannot be proven"):
        espalier.structure_(block, generator=seeded())
    assert unchanged(block, before)


def test_a_mere_wrapper_knows_no_more_than_its_layer() -> None:
    model = Wrapper(Wrapper(nn.MultiheadAttention(DIM, 2)))
    assert [row.status for row in espalier.structure_(model, generator=seeded()).layers] == ["written"]


class Causal(nn.Module):
    """A causal depthwise convolution, as state-space models and speech encoders have it."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.filters = nn.Conv1d(channels, channels, taps, padding=taps - 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.filters(x)[..., : x.shape[-1]]


@pytest.mark.parametrize("taps", [4, 5, 7, 9])
def test_causal_filters_are_measured_about_the_tap_they_were_written_about(taps: int) -> None:
    model = nn.Sequential(*(Causal(64, taps) for _ in range(4)))
    assert {row.status for row in espalier.audit(model).layers} == {"absent"}
    report = espalier.structure_(model, generator=seeded())
    assert {row.status for row in report.layers} == {"written"}
    assert {row.status for row in espalier.audit(model, against=report).layers} == {"present"}
    for row in report.layers:
        # Around the newest tap the closed form leaves little; around the middle one as much as noise does.
        assert row.measured["error"] < 0.5 * row.measured["white_error"]
    sigmas = [row.sigma for row in espalier.init.fit(model).rows["depthwise"]]
    assert sigmas == sorted(sigmas)  # wider with depth, as was written
