"""State-space layers and filters: what was written is read off, from models and from bare checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import espalier
from espalier.checkpoints.by_shape import skeleton
from espalier.cli.main import main
from espalier.init import FilterCovariance, MimeticSSM, StructureFit, fit
from espalier.init.families import FAMILIES, DepthwiseFit, SSMFit
from espalier.models import ConvMixer, SequenceModel
from espalier.nn import Mamba2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_fit(ours: Sequence[SSMFit], theirs: Sequence[SSMFit]) -> None:
    """Assert equality up to rounding: a model and its bare checkpoint lay their weights out differently."""
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        for name, value in asdict(two).items():
            exact = not isinstance(value, float)
            assert getattr(one, name) == (value if exact else pytest.approx(value, rel=1e-6, abs=1e-9)), name


def mixed() -> SequenceModel:
    model = SequenceModel(20, 48, "mamba1 mamba2 attention", head_dim=16, num_heads=3)
    model.init_weights(seeded())
    return model


def test_parts_of_state_space_layers_are_read_as_they_were_written() -> None:
    model = mixed()
    asked = MimeticSSM(decay=6.0, delta=0.5, correlate=0.8, convolution=True)
    espalier.structure_(model, ssm=asked, attention=None, generator=seeded(1))
    found = fit(model)
    assert [row.family for row in found.rows["ssm"]] == ["mamba1", "mamba2"]
    for row in found.rows["ssm"]:
        assert row.decay == pytest.approx(6.0, abs=1e-6)
        assert row.delta == pytest.approx(0.5, abs=1e-6)
        assert row.abar == pytest.approx(math.exp(-0.5 * math.exp(-6.0)), abs=1e-7)
        assert row.correlate == pytest.approx(0.8, abs=0.05)
        assert row.convolution == 0
    spec = found.specs()["ssm"]
    assert isinstance(spec, MimeticSSM)
    assert (spec.decay, spec.delta, spec.convolution) == (pytest.approx(6.0), pytest.approx(0.5), True)


def test_a_default_mamba_asks_for_no_slow_decay_and_no_identity_convolution() -> None:
    model = mixed()
    [one, two] = fit(model).rows["ssm"]
    # The reference's rates are 1, …, N in Mamba-1: −A has the geometric mean (N!)^(1/N).
    rates = model.layers[0].mixer.A_log.detach().exp()[0].double()
    assert -one.decay == pytest.approx(float(rates.log().mean()), abs=1e-6)
    assert abs(one.correlate) < 0.2
    assert two.convolution > 0.5
    spec = fit(model).specs()["ssm"]
    assert isinstance(spec, MimeticSSM)
    assert spec.decay is None
    assert not spec.convolution


def test_sigma_over_depth_is_read_off_filters_and_starts_another_depth() -> None:
    teacher = ConvMixer(512, 4, 7, 2)
    asked = FilterCovariance(sigma0=0.5, v=0.2, a=1.6)
    espalier.structure_(teacher, depthwise=asked, generator=seeded())
    found = StructureFit.from_dict(json.loads(json.dumps(fit(teacher).to_dict())))
    assert found == fit(teacher)
    spec = found.specs()["depthwise"]
    assert isinstance(spec, FilterCovariance)
    for depth in (0.0, 0.5, 1.0):
        assert spec.sigma_at(depth) == pytest.approx(asked.sigma_at(depth), rel=0.1)
    assert found.specs()["attention"] is None
    assert found.specs()["ssm"] is None


def test_few_layers_and_falling_curves_give_positive_schedules() -> None:
    model = ConvMixer(256, 2, 7, 2)
    espalier.structure_(model, depthwise=FilterCovariance(sigma0=1.0, v=1.0, a=0.0), generator=seeded())
    spec = fit(model).specs()["depthwise"]
    assert isinstance(spec, FilterCovariance)
    assert spec.a == 0
    assert spec.sigma_at(1.0) == pytest.approx(2.0, rel=0.15)
    # The curve through these falls below zero on a hundredth of the depth: their mean is taken.
    sigmas = [(depth - 0.505) ** 2 - 1e-7 for depth in (0, 0.5, 1)]
    rows = [DepthwiseFit(str(index), sigma, 0.0, 1.0) for index, sigma in enumerate(sigmas)]
    spec = FAMILIES["depthwise"].spec(rows)
    assert (spec.sigma0, spec.v, spec.a) == (pytest.approx(sum(sigmas) / 3), 0, 0)


def test_a_bare_checkpoint_shows_what_its_model_shows() -> None:
    model = mixed()
    espalier.structure_(model, generator=seeded(2))
    bare = skeleton(model.state_dict(), 3)
    whole, read = fit(model), fit(bare)
    assert_same_fit(read.rows["ssm"], whole.rows["ssm"])
    assert len(read.rows["attention"]) == len(whole.rows["attention"]) == 1
    theirs = {row.layer: row for row in espalier.audit(model).layers}
    for row in espalier.audit(bare).layers:
        assert row.measured == pytest.approx(theirs[row.layer].measured, rel=1e-5, abs=1e-6)
        assert "guessed" in row.note


def test_groups_of_a_bare_mamba2_are_read_as_one() -> None:
    model = nn.ModuleDict({"mixer": Mamba2(32, state_size=8, head_dim=16, groups=2)})
    [known], [bare] = fit(model).rows["ssm"], fit(skeleton(model.state_dict())).rows["ssm"]
    assert bare.correlate == pytest.approx(known.correlate)
    assert bare.abar == pytest.approx(known.abar)


def test_mamba_checkpoints_of_transformers_are_read_without_code() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 20, "state_size": 8}
    for model in (
        transformers.MambaModel(transformers.MambaConfig(**sizes)),
        transformers.Mamba2Model(transformers.Mamba2Config(**sizes, head_dim=16, num_heads=4, n_groups=1)),
    ):
        assert_same_fit(fit(skeleton(model.state_dict())).rows["ssm"], fit(model).rows["ssm"])


def test_the_command_line_starts_a_model_like_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ConvMixer(64, 3, 5, 2)
    espalier.structure_(teacher, depthwise=FilterCovariance(sigma0=1.0, v=0.0, a=0.0), generator=seeded())
    file, found = tmp_path / "model.safetensors", tmp_path / "fit.json"
    save_file(teacher.state_dict(), file)
    assert main(["fit", str(file), "--out", str(found)]) == 0
    assert "ask for sigma0=" in capsys.readouterr().out
    out = tmp_path / "init.safetensors"
    assert main(["structure", "espalier:convmixer", "--like", str(found), "--out", str(out)]) == 0
    assert "written" in capsys.readouterr().out
