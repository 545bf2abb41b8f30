"""ConvMixer checkpoints: every layout to every other, bit for bit, and what cannot be one is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from espalier.checkpoints.convmixer import convert_state, load_checkpoint_file, load_model, model_arguments
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.models import ConvMixer
from reference.convmixer_original import original_convmixer


def trained_original(depth: int = 3, seed: int = 0) -> torch.nn.Sequential:
    """The paper's definition with weights and running statistics that no constructor gives."""
    torch.manual_seed(seed)
    net = original_convmixer(12, depth, 5, 2, 4)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else torch.tensor(7))
    return net.eval()


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_both_ways_is_the_identity_and_logits_are_equal(depth: int) -> None:
    original = trained_original(depth)
    ours = ConvMixer(12, depth, kernel_size=5, patch_size=2, num_classes=4).eval()
    ours.load_state_dict(convert_state(original.state_dict(), "espalier"), strict=True)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), original(x), rtol=1e-5, atol=1e-5)
    back = convert_state(ours.state_dict(), "original")
    assert equal(back, original.state_dict())
    assert equal(convert_state(convert_state(back, "timm"), "original"), original.state_dict())
    assert equal(convert_state(ours.state_dict(), "timm"), ours.state_dict())


@pytest.mark.parametrize("to", ["espalier", "timm", "original"])
@pytest.mark.parametrize("state", [{}, {"fc.weight": torch.ones(1)}, {"0.weight": torch.ones(1)}])
def test_other_models_are_refused_whatever_the_layout(state: dict[str, torch.Tensor], to: str) -> None:
    with pytest.raises(EspalierError, match="it is no ConvMixer's: it has no block"):
        convert_state(state, to)


def test_original_takes_our_weights() -> None:
    ours = ConvMixer(8, 2, kernel_size=3, patch_size=1, num_classes=5).eval()
    original = original_convmixer(8, 2, 3, 1, 5).eval()
    original.load_state_dict(convert_state(ours.state_dict(), "original"), strict=True)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(original(x), ours(x))


@pytest.mark.parametrize(
    "wrapped", ["", "module.", "module._orig_mod.", "_fsdp_wrapped_module.", "model.", "net.model."]
)
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "state_dict_ema"])
def test_files_of_every_origin(tmp_path: Path, wrapped: str, nested: str | None) -> None:
    net = trained_original()
    state = {wrapped + name: tensor for name, tensor in net.state_dict().items()}
    content: object = state
    if nested is not None:
        # As timm's script writes it, its command line included.
        content = {nested: state, "epoch": 3, "arch": "convmixer", "args": argparse.Namespace(lr=0.01)}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path)
    assert equal(load_checkpoint_file(path), convert_state(net.state_dict(), "espalier"))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_model(path)(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["torch's average", "no averages yet"])
def test_averages_of_torchs_class_and_empty_ones_are_no_hindrance(tmp_path: Path, kind: str) -> None:
    net = trained_original()
    content: object = {"state_dict": net.state_dict(), "model_ema": {}}
    if kind == "torch's average":
        content = torch.optim.swa_utils.AveragedModel(net).state_dict()
    torch.save(content, tmp_path / "w.pt")
    assert equal(load_checkpoint_file(tmp_path / "w.pt"), convert_state(net.state_dict(), "espalier"))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_short_is_said_to_be(tmp_path: Path, share: float) -> None:
    torch.save(trained_original().state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EspalierError) as caught:
        load_checkpoint_file(tmp_path / "w.pt")
    assert "Errno" not in str(caught.value)
    assert "cannot be read safely" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.complex128])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state = trained_original().state_dict()
    state["0.weight"] = state["0.weight"].to(dtype)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(EspalierError, match=r"1 no real numbers: stem\.0\.weight"):
        load_model(tmp_path / "w.pt")
    assert main(["convert", str(tmp_path / "w.pt")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_complex_counters_are_refused(tmp_path: Path) -> None:
    state = trained_original().state_dict()
    torch.save({**state, "2.num_batches_tracked": torch.tensor(1j)}, tmp_path / "w.pt")
    with pytest.raises(EspalierError, match=r"1 no real numbers: stem\.2\.num_batches_tracked"):
        load_model(tmp_path / "w.pt")


def test_safetensors_and_models_of_every_shape(tmp_path: Path) -> None:
    for arguments in (
        {"dim": 8, "depth": 2, "kernel_size": 4, "patch_size": 3, "in_chans": 1, "num_classes": 0, "spatial_dims": 1},
        {"dim": 6, "depth": 1, "kernel_size": 3, "patch_size": 2, "in_chans": 2, "num_classes": 9, "spatial_dims": 3},
    ):
        net = ConvMixer(**arguments)
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        assert model_arguments(load_checkpoint_file(tmp_path / "net.safetensors")) == arguments
        assert equal(load_model(tmp_path / "net.safetensors").state_dict(), net.state_dict())
    relu = load_model(tmp_path / "net.safetensors", activation="relu")
    assert any(isinstance(module, torch.nn.ReLU) for module in relu.modules())


def test_counters_may_be_missing(tmp_path: Path) -> None:
    net = trained_original()
    state = {name: tensor for name, tensor in net.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_model(tmp_path / "old.pth")(x), net(x), rtol=1e-5, atol=1e-5)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def test_what_is_no_whole_convmixer_is_refused_in_one_line(tmp_path: Path) -> None:
    state = convert_state(trained_original().state_dict(), "espalier")
    lost = {name: tensor for name, tensor in state.items() if name not in ("head.bias", "blocks.1.3.weight")}
    original = trained_original().state_dict()
    contents: dict[str, tuple[object, str]] = {
        "lost": (lost, "2 missing: blocks.1.3.weight, head.bias"),
        "extra": ({**state, "fc.weight": torch.ones(1)}, "1 unexpected: fc.weight"),
        "extra-number": ({**original, "99.weight": torch.ones(1)}, "1 unexpected: 99.weight"),
        "mixed": ({**original, "head.weight": torch.ones(1)}, "unexpected head.weight"),
        "shape": ({**state, "head.bias": torch.ones(5)}, r"1 of another shape: head.bias \(5,\) for \(4,\)"),
        "other": ({"fc.weight": torch.ones(1)}, "no ConvMixer's: it has no block, only fc.weight"),
        "stemless": ({k: v for k, v in state.items() if k != "stem.0.weight"}, "stem.0.weight is missing"),
        "flat": ({**state, "stem.0.weight": torch.ones(1)}, "no kernels"),
        "deep": ({**state, "blocks.999999999.0.fn.0.weight": torch.ones(1)}, "count 1000000000 blocks, and it holds"),
        "endless": ({f"blocks.{'9' * 5000}.0.fn.0.weight": torch.ones(1)}, "it has no block"),
        "empty": ({}, "holds no tensors by name"),
        "number": (3, "holds no tensors by name"),
        "objects": ({"state_dict": {"a": 3}}, "holds no tensors by name"),
        "malicious": ({"state_dict": state, "x": Malicious()}, "cannot be read safely"),
    }
    for name, (content, words) in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(EspalierError, match=words) as caught:
            load_checkpoint_file(tmp_path / name)
        assert "\n" not in str(caught.value), name
        assert str(tmp_path / name) in str(caught.value), name
    (tmp_path / "text").write_text("not weights")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0")
    for name in ("text", "half.safetensors", "missing", "missing.safetensors"):
        with pytest.raises(EspalierError, match=name):
            load_checkpoint_file(tmp_path / name)
    with pytest.raises(EspalierError, match="did you mean 'original'"):
        convert_state(state, "orginal")
    # Once renamed to "5.weight", which is a block's place.
    with pytest.raises(EspalierError, match=r"unexpected stem\.5\.weight"):
        convert_state({**state, "stem.5.weight": torch.ones(1)}, "original")
    with pytest.raises(EspalierError, match=r"unexpected fc\.weight"):
        convert_state({**state, "fc.weight": torch.ones(1)}, "original")


def test_the_command_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = trained_original()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth.tar")
    assert main(["convert", str(tmp_path / "net.pth.tar"), "--to", "timm"]) == 0
    converted = tmp_path / "net.timm.safetensors"
    assert str(converted) in capsys.readouterr().out
    assert "blocks.0.0.fn.0.weight" in load_file(converted)
    back = tmp_path / "back.safetensors"
    assert main(["convert", str(converted), "--to", "original", "--out", str(back)]) == 0
    loaded = load_file(back)
    assert loaded.keys() == net.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())
    assert main(["convert", str(tmp_path / "nowhere"), "--to", "timm"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
