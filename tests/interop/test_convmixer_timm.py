"""Our ConvMixer beside timm's own class: names, logits, gradients, the register and timm's tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer

import espalier
from espalier.checkpoints.convmixer import convert_state, load_model
from espalier.models import ConvMixer, register_with_timm
from espalier.models.convmixer_family import CONVMIXERS
from reference.convmixer_original import original_convmixer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(activation: str = "gelu", kernel: int = 5) -> tuple[ConvMixer, TimmConvMixer]:
    act = {"gelu": torch.nn.GELU, "relu": torch.nn.ReLU}[activation]
    ours = ConvMixer(12, 3, kernel_size=kernel, patch_size=2, num_classes=4, activation=activation)
    theirs = TimmConvMixer(12, 3, kernel_size=kernel, patch_size=2, num_classes=4, act_layer=act)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("activation", "kernel"), [("gelu", 5), ("relu", 3), ("gelu", 4)])
@pytest.mark.parametrize("training", [True, False])
def test_same_names_same_logits_same_gradients(activation: str, kernel: int, training: bool) -> None:
    ours, theirs = pair(activation, kernel)
    ours.train(training), theirs.train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 3, 10, 12, generator=seeded())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_contract_agrees_with_timm_s_class() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    ours.eval(), theirs.eval()
    assert ours.feature_info == theirs.feature_info
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.head_hidden_size == theirs.head_hidden_size
    for indices in (None, 2, [0, -1]):
        for a, b in zip(
            ours.forward_intermediates(x, indices, intermediates_only=True),
            theirs.forward_intermediates(x, indices, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.forward_head(ours.forward_features(x), pre_logits=True),
                               theirs.forward_head(theirs.forward_features(x), pre_logits=True))  # fmt: skip
    for net in (ours, theirs):
        net.reset_classifier(0, "")
    torch.testing.assert_close(ours(x), theirs(x))


def test_published_names_have_timm_s_shapes() -> None:
    for name in ("convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"):
        with torch.device("meta"):
            ours, theirs = CONVMIXERS[name](), timm.create_model(name)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        kinds = [type(module) for module in theirs.modules() if isinstance(module, torch.nn.GELU | torch.nn.ReLU)]
        assert kinds == [type(m) for m in ours.modules() if isinstance(m, torch.nn.GELU | torch.nn.ReLU)], name


def test_registered_models_are_built_by_timm_and_served_by_its_tools() -> None:
    from timm.models import group_parameters

    names = register_with_timm()
    assert register_with_timm() == names
    assert set(names) <= set(timm.list_models())
    net = timm.create_model("espalier_convmixer_256_8_ks5_p2", num_classes=7, in_chans=1, drop_rate=0.1)
    assert isinstance(net, ConvMixer)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    groups = group_parameters(net, net.group_matcher())
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in net.named_parameters())
    assert [row.status for row in espalier.structure_(net, generator=seeded()).layers] == ["written"] * 8


def test_features_only_through_timm_equals_ours() -> None:
    register_with_timm()
    theirs = timm.create_model("espalier_convmixer_256_8_ks5_p2", features_only=True, out_indices=(1, 4)).eval()
    assert theirs.feature_info.channels() == [256, 256]
    assert theirs.feature_info.reduction() == [2, 2]
    net = CONVMIXERS["convmixer_256_8_ks5_p2"]().eval()
    net.load_state_dict(theirs.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 12, 12, generator=seeded())
    assert theirs.feature_info.module_name() == [net.feature_info[block]["module"] for block in (1, 4)]
    for a, b in zip(net.forward_intermediates(x, (1, 4), intermediates_only=True), theirs(x), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_go_both_ways_between_timm_and_the_original(tmp_path: Path) -> None:
    theirs = TimmConvMixer(12, 2, kernel_size=5, patch_size=2, num_classes=4)
    x = torch.randn(4, 3, 8, 8, generator=seeded())
    theirs(x)  # moves the running statistics
    theirs.eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "timm.pth.tar")
    torch.testing.assert_close(load_model(tmp_path / "timm.pth.tar")(x), theirs(x))
    original = original_convmixer(12, 2, 5, 2, 4).eval()
    original.load_state_dict(convert_state(theirs.state_dict(), "original"), strict=True)
    torch.testing.assert_close(original(x), theirs(x))
    back = convert_state(original.state_dict(), "timm")
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
