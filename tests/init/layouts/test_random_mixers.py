"""State-space mixers of anybody's code: what is written is right by the mixer's own forward pass, or is left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import espalier
from espalier.errors import EspalierError
from espalier.init import LayerReport
from espalier.init.layouts import Skipped, SSMWeights, find_layers
from reference.random_mixers import DIM, INNER, NAMES, NORMS, ORDERS, STARTS, TWISTS, Form, RandomMixer, faults

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rarely(usual: str, *others: str) -> st.SearchStrategy[str]:
    return st.sampled_from((usual,) * 4 + others)


@st.composite
def forms(draw: st.DrawFn) -> Form:
    first = draw(st.booleans())
    heads = draw(st.sampled_from([1, 2, 6, 12, 24]))
    return Form(
        family="mamba1" if first else "mamba2",
        names=draw(rarely(*NAMES)),
        storage=draw(rarely("fused", "separate")),
        order=draw(st.sampled_from((0,) * 10 + tuple(range(1, len(ORDERS["mamba2"]))))),
        state=draw(st.sampled_from([1, 4, 8, 16, 32])),
        heads=heads,
        groups=draw(st.sampled_from([groups for groups in (1, 2, 3) if heads % groups == 0])),
        taps=draw(st.sampled_from([4, 4, 1, 2, 8])),
        skip=draw(st.sampled_from([True, True, True, False])),
        norm=draw(rarely("", "after") if first else st.sampled_from(NORMS)),
        conv_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
        map_bias=draw(st.sampled_from([False] * 4 + [True])),
        step_bias=draw(rarely("layer", "own")),
        conv_on=draw(rarely("all", "x")),
        start=draw(st.sampled_from(STARTS)),
        stated=draw(st.sampled_from(["ngroups", "groups", "n_groups", "other"])),
        twist=draw(st.sampled_from(("",) * len(TWISTS) + TWISTS)),
    )


def structured(
    mixer: RandomMixer, decay: float = 8.0, delta: float = 1.0, rho: float = 1.0
) -> tuple[LayerReport | None, str]:
    """Write a mixer whose steps are independent of the input; return its row, or ``None`` and the refusal."""
    spec = espalier.MimeticSSM(decay=decay, delta=delta, correlate=rho, convolution=True, delta_weight=0.0)
    try:
        [row] = espalier.structure_(mixer, ssm=spec, attention=None, depthwise=None, generator=seeded()).layers
    except EspalierError as error:
        return None, str(error)
    return row, ""


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=forms(),
    dtype=st.sampled_from(DTYPES),
    decay=st.sampled_from([3.0, 8.0, 12.0]),
    delta=st.sampled_from([1.0, 1.0, 0.3, 4.0, 1e-3, 1e-4]),
    rho=st.sampled_from([1.0, 1.0, -1.0]),
)
@example(form=Form("mamba2", heads=1, twist="clamped rate"), dtype=DTYPES[0], decay=8.0, delta=1.0, rho=1.0)
@example(form=Form("mamba2", twist="clamped high"), dtype=DTYPES[0], decay=8.0, delta=4.0, rho=1.0)
@example(form=Form("mamba2", twist="whole chunks"), dtype=DTYPES[0], decay=8.0, delta=1.0, rho=1.0)
@example(form=Form("mamba2", heads=1, twist="stated limits"), dtype=DTYPES[0], decay=3.0, delta=4.0, rho=1.0)
@example(form=Form(twist="floored high"), dtype=DTYPES[0], decay=8.0, delta=1e-3, rho=1.0)
def test_whatever_is_written_is_right_by_a_forward_pass(
    form: Form, dtype: torch.dtype, decay: float, delta: float, rho: float
) -> None:
    torch.random.default_generator.manual_seed(0)
    mixer = RandomMixer(form).to(dtype)
    before = copy.deepcopy(mixer.state_dict())
    for layer in find_layers(mixer):  # audit refuses a model that it knows nothing of
        assert espalier.audit(mixer).layers[0].status in ("absent", "skipped", "failed"), layer
    row, refusal = structured(mixer, decay, delta, rho)
    if row is None:
        assert not form.is_reference(), refusal
        assert "\n" not in refusal
        assert all(torch.equal(a, b) for a, b in zip(before.values(), mixer.state_dict().values(), strict=True))
        if hasattr(mixer, "A_log"):  # it has a row, and its convolution is no layer of its own
            # A step outside of the limits that a layer states is refused; the layer itself is understood.
            kind = SSMWeights if "steps are held within" in refusal else Skipped
            assert [(name, type(found), found.kind) for name, _, found in find_layers(mixer)] == [("", kind, "ssm")]
        return
    assert row.status == "written"
    assert not faults(copy.deepcopy(mixer).double(), decay, delta, rho), form
    for name, value in mixer.state_dict().items():  # the value path, the gate, D and the output stay
        kept = {"in_proj.weight": 2 * INNER, "out_proj.weight": DIM, "D": None}.get(name, 0)
        assert torch.equal(value[:kept], before[name][:kept])
    [now] = espalier.audit(mixer).layers
    assert now.status == "present"
    assert now.measured["delta"] == pytest.approx(delta, rel=0.04)  # a bias of −9 in bfloat16
    assert now.measured["decay"] == pytest.approx(math.exp(-delta * math.exp(-decay)), abs=2e-3)
    assert now.measured["correlation"] == pytest.approx(rho, abs=1e-3)
    assert now.measured["convolution"] == 0


# Twists of which a forward pass shows nothing where W_C = W_B, steps are constant and the convolution is the identity.
HARMLESS = {
    "sigmoid gate", "no gate", "gate before", "residual", "prenorm", "sequence first", "channels first", "interleaved",
    "no activation", "relu activation", "clamped high", "floored", "floored high", "stated limits", "softplus rate",
    "exact", "bilinear", "b for c", "tied", "normalised", "maps activated", "maps of input", "dilated", "whole chunks",
}  # fmt: skip


@pytest.mark.parametrize("twist", TWISTS)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_oracle_sees_twists_that_are_put_in_after_writing(family: str, twist: str) -> None:
    torch.random.default_generator.manual_seed(0)
    plain = RandomMixer(Form(family))
    assert structured(plain, 3.0, 0.3)[0] is not None
    turned = RandomMixer(Form(family, twist=twist))
    turned.load_state_dict(plain.state_dict(), strict=False)
    assert bool(faults(turned.double(), 3.0, 0.3, 1.0)) == (twist not in HARMLESS)


def test_steps_outside_of_a_layer_s_limits_are_refused_and_those_within_are_measured() -> None:
    mixer = RandomMixer(Form("mamba2", twist="stated limits"))
    before = copy.deepcopy(mixer.state_dict())
    row, refusal = structured(mixer, delta=4.0)
    assert row is None
    assert "delta is 4, and its steps are held within 0.01…2.5" in refusal
    assert all(torch.equal(a, b) for a, b in zip(before.values(), mixer.state_dict().values(), strict=True))
    assert structured(mixer, delta=0.3)[0] is not None
    assert not faults(copy.deepcopy(mixer).double(), 8.0, 0.3, 1.0)
    mixer.dt_bias.data.fill_(50.0)
    assert espalier.audit(mixer).layers[0].measured["delta"] == pytest.approx(2.5)


def test_attention_in_a_module_with_an_a_log_of_another_form_keeps_its_row() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log, self.attn = nn.Parameter(torch.zeros(4)), nn.MultiheadAttention(24, 4)

    assert [(name, found.kind) for name, _, found in find_layers(Hybrid())] == [("attn", "attention")]


def test_reasons_name_what_is_missing() -> None:
    turning = RandomMixer(Form())
    turning.A_log = nn.Parameter(torch.zeros(INNER, 4, dtype=torch.complex64))
    odd = RandomMixer(Form())
    odd.chunk = 7
    for mixer, words in (
        (RandomMixer(Form(names="half")), "it has an A_log, in a form of state-space layer that no layout knows"),
        (RandomMixer(Form("mamba2", conv_on="x")), "its convolution sees no B and no C"),
        (turning, "its weights are complex numbers"),
        (odd, "it cannot be run to prove its rows: ValueError: 6 tokens are no whole chunks"),
    ):
        assert words in structured(mixer)[1]
