"""State-space layers of our own, of transformers and of mamba_ssm: found, written, seen in their forward, audited."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import espalier
from espalier.errors import EspalierError
from espalier.init import StructureReport
from espalier.init.layouts import SSMWeights, find_layers
from espalier.nn import Mamba1, Mamba2
from init import mamba_ssm_standin


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statuses(report: StructureReport) -> list[str]:
    return [row.status for row in report.layers]


MAMBA2_SIZES = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8}
HOSTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mamba": ("mamba", "MambaMixer", "MambaConfig", {"state_size": 8}),
    "falcon": ("falcon_mamba", "FalconMambaMixer", "FalconMambaConfig", {"state_size": 8}),
    "jamba": ("jamba", "JambaMambaMixer", "JambaConfig", {"mamba_d_state": 8}),
    "mamba2": ("mamba2", "Mamba2Mixer", "Mamba2Config",
               {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "bamba": ("bamba", "BambaMixer", "BambaConfig", MAMBA2_SIZES),
    "falcon-h1": ("falcon_h1", "FalconH1Mixer", "FalconH1Config", MAMBA2_SIZES | {"mamba_d_ssm": 64}),
    "zamba2": ("zamba2", "Zamba2MambaMixer", "Zamba2Config",
               {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2,
                "layers_block_type": ["mamba"]}),
    "nemotron": ("nemotron_h", "NemotronHMamba2Mixer", "NemotronHConfig",
                 {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
                  "layers_block_type": ["mamba"]}),
    "granite": ("granitemoehybrid", "GraniteMoeHybridMambaLayer", "GraniteMoeHybridConfig", MAMBA2_SIZES),
}  # fmt: skip


def transformers_mixer(host: str, **changes: Any) -> nn.Module:
    """Return a tiny mixer of transformers, its weights all drawn."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    family, cls, config, sizes = HOSTS[host]
    layers = {} if host == "nemotron" else {"num_hidden_layers": 1}
    made = getattr(transformers, config)(**({"hidden_size": 32} | layers | sizes | changes))
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    later = {} if host in ("jamba", "falcon-h1") else {"initialize_mixer_weights": False}
    mixer = getattr(module, cls)(made, 0, **later).eval()
    for parameter in mixer.parameters():
        nn.init.uniform_(parameter, 0.5, 1, generator=seeded())
    return mixer


def own_mixer(family: str, groups: int = 1) -> Mamba1 | Mamba2:
    if family == "mamba1":
        return Mamba1(32, 8, generator=seeded())
    return Mamba2(32, 8, head_dim=8, groups=groups, generator=seeded())


@pytest.mark.parametrize("host", HOSTS)
def test_views_are_what_the_host_itself_calls_b_and_c_and_the_step(host: str) -> None:
    """Rows that a view calls B, C or Δ change that output of the host's projection and no other."""
    mixer = transformers_mixer(host)
    ((_, _, views),) = find_layers(mixer)
    assert isinstance(views, SSMWeights)
    assert views.w_b.shape == views.w_c.shape
    assert views.w_b.shape[0] == 8 * views.groups
    for parameter in mixer.parameters():
        parameter.data.zero_()
    for number, name in enumerate(("w_b", "w_c", "w_delta"), 1):
        getattr(views, name).fill_(number)
    views.delta_bias.fill_(4)
    if views.family == "mamba1":
        rows = mixer.x_proj.weight[:, 0].tolist()
        assert rows == [0] * mixer.dt_proj.in_features + [1] * 8 + [2] * 8
        assert (mixer.dt_proj.weight == 3).all()
        assert (mixer.dt_proj.bias == 4).all()
    else:
        inner, share = mixer.intermediate_size, 8 * mixer.n_groups
        rows = mixer.in_proj.weight[:, 0].tolist()
        assert rows == [0] * 2 * inner + [1] * share + [2] * share + [3] * mixer.num_heads
        assert (mixer.dt_bias == 4).all()


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_is_written_verified_and_found_again(host: str) -> None:
    mixer = transformers_mixer(host)
    before = {name: value.clone() for name, value in mixer.named_parameters()}
    report = espalier.structure_(mixer, ssm=espalier.MimeticSSM(convolution=True), generator=seeded())
    assert statuses(report) == ["written"]
    assert statuses(espalier.audit(mixer, against=report)) == ["present"]
    for name in ("D", "out_proj.weight"):  # the value path is left alone
        assert torch.equal(mixer.get_parameter(name), before[name])


@pytest.mark.parametrize("host", ["mamba2", "bamba", "falcon-h1", "granite"])
def test_steps_that_a_host_holds_within_limits_are_not_written_outside_of_them(host: str) -> None:
    mixer = transformers_mixer(host, time_step_limit=(0.001, 0.1))
    before = mixer.dt_bias.clone()
    with pytest.raises(EspalierError, match=r"delta is 1, and its steps are held within 0.001…0.1"):
        espalier.structure_(mixer, generator=seeded())
    assert torch.equal(mixer.dt_bias, before)
    [row] = espalier.structure_(mixer, ssm=espalier.MimeticSSM(delta=0.1), generator=seeded()).layers
    assert row.measured["delta"] == pytest.approx(0.1)


class FirstArgument(nn.Module):
    """Mamba-2's gated norm without gate and norm."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return y


def readable(mixer: nn.Module, inner: int) -> None:
    """Make one value readable: feature −1 alone feeds inner channel 0, and output 0 shows that channel alone.

    Feature −2 is a constant that opens the gate, where there is one; B, C and the other channels see neither.
    """
    rows = mixer.in_proj.weight
    if hasattr(mixer, "norm"):
        gate, value, mixer.norm = slice(0, inner), inner, FirstArgument()
    else:
        nn.init.normal_(rows, std=0.3, generator=seeded(2))
        gate, value = slice(inner, None), 0
        mixer.x_proj.weight[:, 0] = 0
    rows[:, -2:] = 0
    rows[value] = 0
    rows[gate] = 0
    rows[value, -1] = rows[gate, -2] = 1
    mixer.out_proj.weight.zero_()
    mixer.out_proj.weight[0, 0] = 1
    mixer.D.zero_()


def queries_and_keys(mixer: nn.Module, x_LD: Tensor) -> tuple[Tensor, Tensor]:
    """Return C and B of every token from the parameters, the convolution left out because it is the identity."""
    if hasattr(mixer, "x_proj"):
        maps = F.silu(x_LD @ mixer.in_proj.weight.chunk(2)[0].T) @ mixer.x_proj.weight[-48:].T
    else:
        maps = F.silu(x_LD @ mixer.in_proj.weight[-49:-1].T)
    keys, queries = maps.chunk(2, dim=1)
    return queries, keys


@torch.no_grad()
@pytest.mark.parametrize("host", ["mamba", "mamba2"])
def test_transformers_forward_is_causal_linear_attention(host: str) -> None:
    """Pulses through the module's own forward, one at every place, against C Bᵀ token by token."""
    heads = {"num_heads": 1, "head_dim": 96, "n_groups": 1} if host == "mamba2" else {}
    mixer = transformers_mixer(host, hidden_size=48, state_size=24, **heads).double()
    spec = espalier.MimeticSSM(decay=18.0, correlate=0.9, gain=1.0, convolution=True, delta_weight=0.0)
    espalier.structure_(mixer, ssm=spec, generator=seeded(1))
    readable(mixer, 96)
    length = 11
    x_LD = torch.randn(length, 48, generator=seeded(3), dtype=torch.float64)
    x_LD[:, -2], x_LD[:, -1] = 1, 0
    pulses = x_LD.repeat(length, 1, 1)
    pulses[torch.arange(length), torch.arange(length), -1] = 1
    shown = mixer(pulses)[..., 0]  # row s: what the pulse at s does at every t
    value = float(F.silu(torch.ones(())))
    gate = 1.0 if host == "mamba2" else value
    queries, keys = queries_and_keys(mixer, x_LD)
    for s in range(length):
        for t in range(length):
            expected = float(queries[t] @ keys[s]) * value * gate if s <= t else 0.0
            assert float(shown[s, t]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_language_model_that_draws_again_loses_it_and_the_audit_says_so(family: str) -> None:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2}
    if family == "mamba":
        model = transformers.MambaModel(transformers.MambaConfig(**sizes, state_size=8))
    else:
        config = transformers.Mamba2Config(**sizes, state_size=8, num_heads=8, head_dim=8, n_groups=2)
        model = transformers.Mamba2Model(config)
    assert statuses(espalier.audit(model)) == ["absent"] * 2
    report = espalier.structure_(model, generator=seeded())
    assert statuses(report) == ["written"] * 2
    mixer = model.layers[1].mixer
    # What wrappers draw again after construction: the rates and the steps, not the maps.
    (mixer.init_mamba_weights if family == "mamba" else mixer.init_mamba2_weights)()
    after = espalier.audit(model, against=report)
    assert statuses(after) == ["present", "lost"]
    assert "lost: decay, delta" in after.layers[1].note
    assert "lost: decay, delta" in str(after)
    model.post_init()
    model.apply(model._init_weights)
    assert not espalier.audit(model, against=report).ok


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "one-head"])
def test_a_default_start_is_absent_and_every_single_part_is_present(family: str, seed: int) -> None:
    mixer = Mamba2(32, 8, head_dim=64) if family == "one-head" else own_mixer(family)
    mixer.init_weights(seeded(seed))
    assert statuses(espalier.audit(mixer)) == ["absent"]
    nothing = {"decay": None, "delta": None, "correlate": None}
    for part in ({"decay": 8.0}, {"delta": 1.0}, {"correlate": 0.9}, {"convolution": True}):
        mixer.init_weights(seeded(seed))
        report = espalier.structure_(mixer, ssm=espalier.MimeticSSM(**nothing | part), generator=seeded(seed))
        assert statuses(espalier.audit(mixer, against=report)) == ["present"]
        mixer.init_weights(seeded(seed))
        assert statuses(espalier.audit(mixer, against=report)) == ["lost"]


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2-mlp"])
def test_mamba_ssm_by_its_parameter_names(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mamba_ssm_standin.install(monkeypatch)
    if family == "mamba1":
        mixer: nn.Module = mamba_ssm_standin.Mamba(32, 8)
    else:
        mixer = mamba_ssm_standin.Mamba2(32, 8, headdim=8, ngroups=2, d_ssm=32 if family.endswith("mlp") else None)
    (row,) = espalier.structure_(mixer, generator=seeded()).layers
    assert row.status == "written"
    if family == "mamba1":
        assert torch.equal(*mixer.x_proj.weight[2:].chunk(2))
        torch.testing.assert_close(F.softplus(mixer.dt_proj.bias), torch.ones(64))
    else:
        # Rows from the end: Δ (one a head), C, B.
        end = mixer.in_proj.out_features - mixer.nheads
        assert torch.equal(mixer.in_proj.weight[end - 32 : end - 16], mixer.in_proj.weight[end - 16 : end])
        assert not torch.equal(mixer.in_proj.weight[end - 48 : end - 32], mixer.in_proj.weight[end - 32 : end - 16])
        torch.testing.assert_close(F.softplus(mixer.dt_bias), torch.ones(mixer.nheads))
    assert (mixer.A_log == -8).all()


def test_projection_biases_that_would_shift_what_was_written_are_zeroed() -> None:
    mixer = transformers_mixer("mamba2", use_bias=True)
    espalier.structure_(mixer, generator=seeded())
    inner = mixer.intermediate_size
    assert mixer.in_proj.bias[: 2 * inner].all()
    assert not mixer.in_proj.bias[2 * inner :].any()
    mixer.in_proj.bias.data[-8:] = 2.0  # adds to the bias of the step: softplus(0.5413 + 2) = 2.617
    assert espalier.audit(mixer).layers[0].measured["delta"] == pytest.approx(2.617, abs=1e-3)


def test_the_convolution_inside_a_mixer_is_not_a_layer_of_its_own() -> None:
    model = nn.ModuleDict({
        "before": nn.Conv1d(8, 8, 4, groups=8), "one": own_mixer("mamba1"), "two": own_mixer("mamba2", 2)
    })  # fmt: skip
    assert [(name, host) for name, host, _ in find_layers(model)] == [
        ("before", "Conv1d"), ("one", "Mamba1"), ("two", "Mamba2")
    ]  # fmt: skip
    taps = model["one"].conv1d.weight.clone()
    report = espalier.structure_(model, generator=seeded())
    assert [row.kind for row in report.layers] == ["depthwise", "ssm", "ssm"]
    assert torch.equal(model["one"].conv1d.weight, taps)


def test_views_share_storage_so_that_ties_stay_tied() -> None:
    model = nn.ModuleList([own_mixer("mamba1"), own_mixer("mamba1")])
    model[1].x_proj.weight = model[0].x_proj.weight
    report = espalier.structure_(model, ssm=espalier.MimeticSSM(gain=1.0), generator=seeded())
    assert [row.status for row in report.layers] == ["written", "skipped"]
    assert report.layers[1].note == "some of its weights are those of 0, which is written"
    pointer = model[0].x_proj.weight.data_ptr()
    espalier.structure_(model[0], generator=seeded())
    assert model[0].x_proj.weight.data_ptr() == pointer
    assert torch.equal(model[1].x_proj.weight, model[0].x_proj.weight)


def test_layers_are_chosen_by_their_index_among_state_space_layers() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=8), *(own_mixer("mamba2") for _ in range(4)))
    for layers, written in ((1, {1}), (-1, {3}), ([0, -2], {0, 2}), ("all", {0, 1, 2, 3})):
        report = espalier.structure_(model, ssm=espalier.MimeticSSM(layers=layers), depthwise=None, generator=seeded())
        assert {i for i, row in enumerate(report.layers) if row.status == "written"} == written
        assert all(row.note == "not among the layers asked for" for row in report.layers if row.status == "skipped")
    with pytest.raises(EspalierError, match="layers names 4 and the model has 4 state-space layers"):
        espalier.structure_(model, ssm=espalier.MimeticSSM(layers=[0, 4]))
    with pytest.raises(EspalierError, match="layers is 'first': give 'all'"):
        espalier.MimeticSSM(layers="first")


def test_parametrised_mixers_and_meta_are_left_alone_and_said_so() -> None:
    mixer = own_mixer("mamba1")
    parametrizations.weight_norm(mixer.x_proj)
    with pytest.raises(EspalierError, match="parametrised"):
        espalier.structure_(mixer)
    with torch.device("meta"):
        empty = Mamba2(32, 8, head_dim=8)
    report = espalier.structure_(empty)
    assert statuses(report) == ["skipped"]
    assert "meta" in report.layers[0].note


def test_a_layer_without_a_layout_keeps_its_convolution() -> None:
    from transformers import ZambaConfig
    from transformers.models.zamba.modeling_zamba import ZambaMambaMixer

    sizes = {"hidden_size": 32, "mamba_d_state": 8, "n_mamba_heads": 2}
    mixer = ZambaMambaMixer(ZambaConfig(**sizes, num_hidden_layers=1, layers_block_type=["mamba"]), 0)
    with pytest.raises(EspalierError, match="Zamba keeps a set of maps a head"):
        espalier.structure_(mixer)


def test_another_version_of_a_class_is_refused_by_name() -> None:
    mixer = own_mixer("mamba2")
    del mixer.groups
    with pytest.raises(EspalierError, match="it has none of groups, n_groups, ngroups"):
        espalier.structure_(mixer)
