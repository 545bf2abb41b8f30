"""One bad layer costs one row that names it; the others go on, whatever is set around the call."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parameter import UninitializedParameter

import espalier
from espalier.errors import EspalierError
from espalier.init import AttentionWeights, fit, register_layout
from espalier.models import SequenceModel, VisionTransformer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed() -> nn.ModuleDict:
    """Return a model with two layers of each family, so that one of each can be damaged."""
    generator = seeded()
    vision = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3)
    vision.init_weights(generator)
    mixers = SequenceModel(20, 48, "mamba1 mamba1 mamba2 mamba2", head_dim=16)
    mixers.init_weights(generator)
    filters = nn.Sequential(*(nn.Conv2d(16, 16, 5, groups=16, bias=False) for _ in range(2)))
    for layer in filters:
        nn.init.normal_(layer.weight, generator=generator)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, batch_first=True), 2)
    return nn.ModuleDict({"vision": vision, "mixers": mixers, "filters": filters, "encoder": encoder})


# The first layer of every family, and the weight in it that is damaged.
FIRST = {
    "vision.blocks.0.attn": "qkv.weight",
    "mixers.layers.0.mixer": "x_proj.weight",
    "mixers.layers.2.mixer": "in_proj.weight",
    "filters.0": "weight",
    "encoder.layers.0.self_attn": "in_proj_weight",
}
ALL = (
    [*FIRST]
    + [name.replace("s.0.", "s.1.") for name in FIRST if "s.0." in name]
    + ["mixers.layers.3.mixer", "filters.1"]
)
# What is said of a layer that is damaged in these ways.
REASONS = {
    "lazy": "no shape before its first call",
    "expanded": "seen many times|tied to one weight",
    "hook": r"a hook \(<lambda>\) runs",
}


class Adapter(nn.Module):
    """What LoRA puts in place of a linear layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.ModuleDict()


def damage(model: nn.Module, layer: str, how: str) -> None:
    module, name = model.get_submodule(layer), FIRST[layer]
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    weight = owner.get_parameter(leaf)
    if how == "empty":
        for parameter in module.parameters():
            parameter.data = torch.empty(0)
    elif how == "adapter" and path:
        setattr(module, path, Adapter(owner))
    elif how == "int8" and path:
        owner.weight = nn.Parameter(torch.zeros(weight.shape, dtype=torch.int8), requires_grad=False)
    elif how == "lazy":
        setattr(owner, leaf, UninitializedParameter())
    elif how == "expanded":
        setattr(owner, leaf, nn.Parameter(weight.detach()[:1].expand(weight.shape)))
    elif how == "hook":
        owner.register_forward_pre_hook(functools.partial(lambda scale, m, _: getattr(m, leaf).data.mul_(scale), 0.5))
    elif how in ("nan", "inf"):
        weight.data.flatten()[3] = float(how)


@contextlib.contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@settings(deadline=None, max_examples=25)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    device=st.sampled_from([None, "meta", "cpu"]),
    damaged=st.dictionaries(
        st.sampled_from([*FIRST]),
        st.sampled_from(["none", "empty", "adapter", "int8", "nan", "inf", "lazy", "expanded", "hook"]),
        max_size=3,
    ),
    wrapped=st.booleans(),
)
def test_what_surrounds_a_call_changes_nothing_and_a_bad_layer_costs_its_row(
    dtype: torch.dtype, device: str | None, damaged: dict[str, str], wrapped: bool
) -> None:
    model, reference = mixed(), mixed()
    espalier.structure_(reference, generator=seeded(7))
    for layer, how in damaged.items():
        damage(model, layer, how)
    outer = nn.DataParallel(model) if wrapped else model
    prefix = "module." if wrapped else ""
    with default_type(dtype), torch.device(device) if device else contextlib.nullcontext():
        report = espalier.structure_(outer, generator=seeded(7))
        after = espalier.audit(outer, against=report)
    rows = {row.layer.removeprefix(prefix): row for row in report.layers}
    assert sorted(rows) == sorted(ALL)
    for name, row in rows.items():
        how = damaged.get(name, "none")
        if how == "empty":
            assert row.status == "skipped"
            assert "hold" in row.note
        elif how == "int8" and "." in FIRST.get(name, ""):
            assert (row.status, "quantised" in row.note) == ("skipped", True)
        elif how == "adapter" and "." in FIRST[name]:
            assert (row.status, "adapter (LoRA)" in row.note) == ("skipped", True)
        elif how in REASONS:
            assert (row.status, bool(re.search(REASONS[how], row.note))) == ("skipped", True), row
        elif row.status == "failed":
            # W_B is kept and not written, so what was wrong in it still is.
            assert how in ("nan", "inf")
            assert "mixer" in name
            assert "NaN" in row.note
        else:
            assert row.status == "written", row
            if how == "none":
                ours, theirs = model.get_submodule(name), reference.get_submodule(name)
                for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
                    assert torch.equal(one, two), name
    assert {row.status for row in after.layers if rows[row.layer.removeprefix(prefix)].status == "written"} <= {
        "present"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fitting_and_closed_forms_do_not_depend_on_defaults(dtype: torch.dtype) -> None:
    model = mixed()
    espalier.structure_(model, generator=seeded())
    expected = str(fit(model))
    filters = espalier.init.depthwise_covariance_(torch.zeros(8, 1, 5, 5), 1.5, generator=seeded())
    statistics = espalier.init.FilterStatistics.from_model(model["filters"])
    resized = statistics.covariance_at(0.5, (7, 7))
    with default_type(dtype), torch.device("meta"):
        assert str(fit(model)) == expected
        again = torch.zeros(8, 1, 5, 5, dtype=torch.float32, device="cpu")
        espalier.init.depthwise_covariance_(again, 1.5, generator=seeded())
        within = statistics.covariance_at(0.5, (7, 7))
    assert torch.equal(again, filters)
    torch.testing.assert_close(within, resized)


DAMAGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "rates of zero": (lambda m: m.A_log.fill_(-torch.inf), "a_log holds NaN, infinite"),
    "never initialised": (lambda m: (m.A_log.zero_(), m.dt_bias.zero_()), "never initialised"),
    "huge rates": (lambda m: m.A_log.fill_(1e30), "A_log reaches from 1e+30"),
    "no rates": (lambda m: m.A_log.fill_(-1e30), "A_log reaches from -1e+30"),
    "huge steps": (lambda m: m.dt_bias.fill_(1e30), "the step's bias reaches from 1e+30"),
    "no steps": (lambda m: m.dt_bias.fill_(-1e30), "the step's bias reaches from -1e+30"),
    "NaN steps": (lambda m: m.dt_bias.fill_(torch.nan), "delta_bias holds NaN"),
    "NaN maps": (lambda m: m.in_proj.weight.fill_(torch.nan), "NaN"),
    "huge maps": (lambda m: m.in_proj.weight.fill_(1e30), "too large"),
    "zero maps": (lambda m: m.in_proj.weight.zero_(), "0 everywhere"),
    "huge taps": (lambda m: m.conv1d.weight.fill_(1e30), "too large"),
}


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_values_that_cannot_work_are_not_called_present(name: str, against: bool) -> None:
    model = SequenceModel(20, 48, "mamba2 mamba2", head_dim=16)
    report = espalier.structure_(model, generator=seeded())
    change, reason = DAMAGES[name]
    with torch.no_grad():
        change(model.layers[0].mixer)
    after = espalier.audit(model, against=report if against else None)
    assert [row.status for row in after.layers] == ["failed", "present"]
    assert reason in after.layers[0].note
    assert not after.ok


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, -1e30])
def test_attention_and_filters_with_such_values_fail_too(value: float) -> None:
    model = mixed()
    espalier.structure_(model, generator=seeded())
    with torch.no_grad():
        model["vision"].blocks[0].attn.qkv.weight.fill_(value)
        model["filters"][0].weight[0].fill_(value)
    failed = {row.layer for row in espalier.audit(model).layers if row.status == "failed"}
    assert failed == {"vision.blocks.0.attn", "filters.0"}
    with pytest.raises(EspalierError, match=r"layer 'vision\.blocks\.0\.attn' cannot be fitted") as caught:
        fit(model)
    assert "\n" not in str(caught.value)


def test_nan_that_is_not_overwritten_is_named_and_not_called_sharing() -> None:
    model = mixed()
    with torch.no_grad():
        model["vision"].blocks[0].attn.qkv.weight[0, 0] = torch.nan
    report = espalier.structure_(model, attention=espalier.Mimetic(qk=None), generator=seeded())
    row = next(row for row in report.layers if row.layer == "vision.blocks.0.attn")
    assert (row.status, row.note.split()[0]) == ("failed", "q")
    assert not report.ok


def test_a_layout_or_a_measure_that_fails_costs_one_row() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(48, 48)

    @register_layout(Broken)
    def broken(module: nn.Module) -> AttentionWeights:
        raise KeyError("no such thing")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(6, 6))

    @register_layout(Odd)
    def odd(module: nn.Module) -> AttentionWeights:
        return AttentionWeights(*(module.w.detach()[:, :5] for _ in range(4)), 4, 4)  # shapes that do not fit

    model = nn.ModuleDict({"broken": Broken(), **mixed()})
    rows = {row.layer: row for row in espalier.structure_(model, generator=seeded()).layers}
    assert rows["broken"].status == "skipped"
    assert "KeyError" in rows["broken"].note
    assert sum(row.status == "written" for row in rows.values()) == len(ALL)
    with pytest.raises(EspalierError, match="layer 'odd'"):
        espalier.structure_(nn.ModuleDict({"odd": Odd(), **mixed()}), generator=seeded())
    after = {row.layer: row.status for row in espalier.audit(nn.ModuleDict({"odd": Odd(), **mixed()})).layers}
    assert after.pop("odd") == "failed"
    assert len(after) == len(ALL)


@pytest.mark.parametrize("shift", [0, 1, 32, 4095])
def test_projections_that_share_some_memory_are_not_written(shift: int) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2)
    attention = (
        VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=1, num_heads=4).blocks[0].attn
    )
    attention.qkv.weight = nn.Parameter(torch.randn(3 * 64, 64))
    attention.proj.weight = nn.Parameter(attention.qkv.weight.detach().flatten()[shift : shift + 4096].view(64, 64))
    report = espalier.structure_(nn.ModuleDict({"shared": attention, "encoder": encoder}))
    rows = {row.layer: row for row in report.layers}
    assert rows["shared"].status == "skipped"
    assert "tied" in rows["shared"].note or "share memory" in rows["shared"].note
    assert rows["encoder.layers.0.self_attn"].status == "written"


def test_a_hooked_layer_is_measured_all_the_same() -> None:
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3)
    report = espalier.structure_(model, generator=seeded())
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda *_: None)
    assert [row.status for row in espalier.audit(model, against=report).layers] == ["present", "present"]
    assert [row.status for row in espalier.structure_(model, generator=seeded()).layers] == ["skipped", "written"]
