"""Checkpoints from strangers: whatever is in them, one line refuses it or it is read; none of their code ever runs."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import espalier
from espalier.checkpoints.by_shape import skeleton
from espalier.checkpoints.loading import open_checkpoint
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.files import read_tensors
from espalier.init import fit


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(EspalierError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("where", ["metadata", "model.json"])
def test_a_checkpoint_that_names_code_runs_none(tmp_path: Path, where: str) -> None:
    made = tmp_path / "made"
    said = json.dumps({"name": "os:mkdir", "args": {"path": str(made)}})
    weights = {"blocks.0.attn.qkv.weight": torch.randn(36, 12), "blocks.0.attn.proj.weight": torch.randn(12, 12)}
    save_file(weights, tmp_path / "w.safetensors", {"espalier": said} if where == "metadata" else None)
    if where == "model.json":
        (tmp_path / where).write_text(said)
    assert main(["audit", str(tmp_path / "w.safetensors"), "--heads", "3"]) == 0
    assert not made.exists()


@pytest.mark.parametrize("args", [{"depth": 10**9}, {"embed_dim": 3 * 10**5}, {"num_heads": 0}, {"": 1}])
def test_a_stated_model_that_the_file_does_not_hold_is_refused(tmp_path: Path, args: dict[str, Any]) -> None:
    stated = json.dumps({"name": "vit", "args": args})
    save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors", {"espalier": stated})
    refusal(lambda: open_checkpoint(tmp_path / "w.safetensors"))


def test_an_archive_that_grows_is_refused_before_it_is_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    assert "more than its size" in refusal(lambda: read_tensors(tmp_path / "bomb.pt"))
    assert len(read_tensors(tmp_path / "plain.pt")["weight"]) == 10**6


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1).expand(2**20, 2**20), "bias": torch.zeros(2)}, tmp_path / "w.pt")
    for read in (read_tensors, open_checkpoint, espalier.diagnose):
        assert "weight claims" in refusal(lambda read=read: read(tmp_path / "w.pt"))


PARTS = (
    "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "in_proj_weight", "qkv.weight", "qkv.bias",
    "proj.weight", "c_attn.weight", "c_attn.bias", "c_proj.weight", "A_log", "dt_bias", "D", "conv1d.weight",
    "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "in_proj.weight", "norm.weight", "running_var", "embed.weight",
    "weight", "bias", "weight.weight", "",
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw tensors with names that layouts look for, and with shapes, types and values that they do not."""
    found = {}
    for number in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(("", "attn.", "layers.0.mixer.", "layers.0.self_attn.", "blocks.1.attn."))) + draw(
            st.sampled_from(PARTS)
        )
        shape = draw(
            st.one_of(
                st.sampled_from(((12, 12), (36, 12), (12, 36), (12,), (36,), (12, 1, 4), (12, 1, 5, 5), (0, 12))),
                st.lists(st.integers(0, 6), max_size=5).map(tuple),
            )
        )
        kind = draw(st.sampled_from(DTYPES))
        values = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
        if values.numel() and draw(st.booleans()):
            values.view(-1)[0] = draw(st.sampled_from((float("nan"), float("inf"), 1e38, 0.0)))
        found[name or "x"] = values.nan_to_num(0).to(kind) if kind in (torch.int64, torch.uint8) else values.to(kind)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=checkpoints(), heads=st.sampled_from([None, 1, 3, 5]), torch_file=st.booleans())
def test_no_tensors_break_what_reads_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], heads: int | None, torch_file: bool
) -> None:
    path = tmp_path_factory.mktemp("drawn") / ("w.pt" if torch_file else "w.safetensors")
    torch.save(tensors, path) if torch_file else save_file(tensors, path)

    message = ""
    try:
        net = open_checkpoint(path, heads)
        str(espalier.audit(net))
        str(fit(net))
        str(espalier.diagnose(path, heads=heads))
    except EspalierError as error:
        message = str(error)
    assert "\n" not in message


_PLAIN = {f"a.{name}_proj.weight": (8, 8) for name in "qkvo"}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"num_heads.weight": (4, 4), **_PLAIN}, ["a"]),
        ({**_PLAIN, "a.num_heads.weight": (4, 4)}, ["a"]),
        ({"x.D.weight": (8, 1, 5, 5), "x.D": (8,)}, ["x.D"]),
        ({"x.D": (8,), "x.D.weight": (8, 1, 5, 5)}, ["x.D"]),
        ({"x.dt_bias.weight": (8, 1, 5, 5), "x.dt_bias": (8,)}, ["x.dt_bias"]),
    ],
)
def test_tensors_named_like_what_modules_have_are_read_all_the_same(names: dict[str, Any], found: list[str]) -> None:
    model = skeleton({name: torch.randn(shape) for name, shape in names.items()}, 2)
    assert [row.layer for row in espalier.audit(model).layers if row.status == "absent"] == found


def test_a_name_of_thousands_of_parts_is_refused() -> None:
    assert "2000 dots" in refusal(lambda: skeleton({"a." * 2000 + "weight": torch.randn(8, 1, 5, 5)}))


@pytest.mark.parametrize("kind", ["coo", "csr", "ragged", "quantised", "meta"])
def test_tensors_that_are_not_dense_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = {
        "coo": lambda: torch.eye(4).to_sparse(),
        "csr": lambda: torch.eye(4).to_sparse_csr(),
        "ragged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantised": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        "meta": lambda: torch.ones(3, device="meta"),
    }
    with warnings.catch_warnings(action="ignore"):  # torch calls both beta
        torch.save({"a.weight": tensors[kind]()}, tmp_path / "w.pt")
        assert "a.weight is sparse, ragged, quantised" in refusal(lambda: open_checkpoint(tmp_path / "w.pt"))


@pytest.mark.parametrize("kind", ["script", "protocol 4", "quantised"])
@pytest.mark.parametrize("command", ["doctor", "audit", "convert"])
def test_torch_says_nothing_of_its_own_about_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, command: str
) -> None:
    path = tmp_path / "w.pt"
    with warnings.catch_warnings(action="ignore"):
        if kind == "script":
            torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), path)
        elif kind == "protocol 4":
            torch.save({"weight": torch.ones(3)}, path, pickle_protocol=4)
        else:
            torch.save({"weight": torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8)}, path)
    with warnings.catch_warnings(record=True, action="always") as said:
        assert main([command, str(path)]) == 2
    assert not said
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["a\nhealthy: 3 tensors", "\x1b]0;title\x07", "a\u2028b", "a\x9b31m"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_names_that_are_no_print_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, ending: str
) -> None:
    path = tmp_path / f"w.{ending}"
    tensors = {f"{name}.weight": torch.ones(4, 1, 5, 5)}
    torch.save(tensors, path) if ending == "pt" else save_file(tensors, path)
    for command in ("doctor", "audit", "fit", "convert", "statistics"):
        assert main([command, str(path)]) == 2
        said = capsys.readouterr()
        assert not said.out
        assert "rename it" in said.err
        assert said.err.rstrip("\n").isprintable()


def test_negated_and_conjugate_views_are_read_by_their_values(tmp_path: Path) -> None:
    numbers = torch.arange(24.0).view(2, 3, 4)
    views = {"negated": torch._neg_view(numbers), "conjugate": torch.complex(numbers, numbers).conj()}
    torch.save(views, tmp_path / "w.pt")
    found = read_tensors(tmp_path / "w.pt")
    assert found["negated"].numpy().tolist() == (-numbers).tolist()
    assert found["conjugate"].numpy().tolist() == torch.complex(numbers, -numbers).tolist()
    assert main(["doctor", str(tmp_path / "w.pt")]) in (0, 1)


def test_tensors_under_numbers_are_not_tensors_by_name(tmp_path: Path) -> None:
    torch.save({1: torch.ones(3)}, tmp_path / "w.pt")
    assert "holds no tensors by name" in refusal(lambda: open_checkpoint(tmp_path / "w.pt"))
