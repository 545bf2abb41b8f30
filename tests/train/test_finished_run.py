"""What a finished run is good for without its data: predictions, files for other programs, what is said of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from espalier.cli.main import main
from espalier.files import read_tensors
from espalier.train import load_run
from espalier.train.image_input import ImageInput
from needs import needs_library
from photos import COLOURS, TINY, write_photos

ONNX = needs_library("onnxscript", "'espalier[export]'")


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of photographs that was named by a relative path, and whose folder was moved since."""
    place = tmp_path_factory.mktemp("photos")
    write_photos(place / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("ESPALIER_CACHE", str(place / "cache"))
        command = ["train", "digits_vit", "--dataset", "folder", "--data", "photos", *TINY]
        assert main([*command, "--epochs", "8", "--out", "first", "--quiet"]) == 0
    shutil.move(place / "first", place / "run")
    return place / "run"


def test_a_run_knows_what_its_net_expects(photo_run: Path) -> None:
    run = load_run(photo_run)
    expected, source = ImageInput.load(photo_run), run.source()
    assert expected.class_names == tuple(sorted(COLOURS))
    assert (expected.channels, expected.height, expected.width) == (3, 16, 16)
    train, _ = source.images("train")
    assert expected.mean == pytest.approx(train.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert expected.std == pytest.approx(train.std((0, 2, 3), correction=0).tolist(), abs=1e-6)
    assert run.recipe.data_path == str(photo_run.parent / "photos"), "a path that holds from anywhere"


def test_predictions_are_those_of_the_evaluation(
    photo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(photo_run)
    source = run.source()
    with torch.no_grad():
        logits = torch.cat([run.model()(images) for images, _ in source.eval_batches("test", 100)])
    # Of each class the source took the first ones of a fixed order: find its images among the files again.
    pixels, labels = source.images("test")
    files = sorted((photo_run.parent / "photos").rglob("*.png"))
    decoded = ImageInput.load(photo_run).read(files)
    match = [int((decoded - image).abs().flatten(1).amax(1).argmin()) for image in pixels]
    assert torch.equal(decoded[match], pixels)
    # Elsewhere, without the data: the run folder is enough.
    copies = tmp_path / "unknown"
    for index, number in enumerate(match):
        copies.mkdir(exist_ok=True)
        shutil.copy(files[number], copies / f"{index}.png")
    shutil.copytree(photo_run, tmp_path / "alone")
    hidden = photo_run.parent / "hidden"
    (photo_run.parent / "photos").rename(hidden)
    try:
        monkeypatch.chdir(tmp_path)
        assert main(["predict", "alone", "unknown", "--top", "9", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["predict", "alone", "unknown/0.png", "unknown/1.png"]) == 0
        table = capsys.readouterr().out.splitlines()
    finally:
        hidden.rename(photo_run.parent / "photos")
    names = sorted(COLOURS)
    for index, expected in enumerate(logits.double().softmax(-1)):
        told = found[f"unknown/{index}.png"]
        assert [told[name] for name in names] == pytest.approx(expected.tolist(), abs=1e-5)
        assert list(told.values()) == sorted(told.values(), reverse=True)
    assert [line.split()[:2] for line in table] == [
        [f"unknown/{index}.png", names[int(logits[index].argmax())]] for index in (0, 1)
    ]
    assert (logits.argmax(-1) == labels).float().mean() > 0.6, "a net that learnt nothing tests nothing"


def test_every_kind_of_file_is_predicted_or_named(
    photo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    grey = np.full((9, 5), 40_000, np.uint16)
    Image.fromarray(grey).save(folder / "sixteen.png")
    Image.new("RGBA", (5, 9), (0, 0, 0, 0)).save(folder / "deep" / "clear.png")
    Image.new("1", (3, 3), 1).save(folder / "bits.tif")
    for hidden in (folder / "._sixteen.png", folder / "__MACOSX" / "a.png", folder / ".thumbs" / "b.jpg"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    assert main(["predict", str(photo_run), str(folder), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == sorted(
        map(str, (folder / "bits.tif", folder / "deep" / "clear.png", folder / "sixteen.png"))
    )
    bad = [tmp_path / "text.jpg", tmp_path / "empty.png", tmp_path / "missing.png", tmp_path / "notes.txt"]
    bad[0].write_text("text"), bad[1].write_bytes(b""), bad[3].write_text("x")
    assert main(["predict", str(photo_run), *map(str, bad), str(folder / "bits.tif")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot decode 4 of 5 files" in error
    assert all(str(file) in error for file in bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IMAGE", "--top", "0"], "top is 0"),
        (["EMPTY"], "there are no images"),
        ([], "predict needs RUN IMAGES"),
    ],
)
def test_bad_questions_are_one_line(
    photo_run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    places = {"IMAGE": str(tmp_path / "a.png"), "EMPTY": str(tmp_path / "empty")}
    assert main(["predict", str(photo_run), *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


SOUND = {"class_names": ["a", "b"], "channels": 1, "height": 8, "width": 8, "mean": [0.3], "std": [0.2]}
DAMAGED = [
    SOUND | change
    for change in (
        {"std": [None]}, {"std": [{}]}, {"std": [0.0]}, {"std": [0.1] * 5}, {"mean": ["x"]}, {"mean": 0.3},
        {"height": -1}, {"width": 2.5}, {"channels": True}, {"height": 2**40}, {"class_names": "ab"},
        {"class_names": [1, 2]}, {"more": 1},
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"class_names": 3}', "null", *map(json.dumps, DAMAGED), '{"std": [NaN]}']
)
def test_damage_of_what_the_net_expects_is_named(
    photo_run: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photo_run, tmp_path / "run")
    (tmp_path / "run" / "images.json").write_text(content)
    assert main(["predict", str(tmp_path / "run"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "damaged" in error
    assert error.count("\n") == 1


def test_a_run_without_images_or_without_an_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--data-args.steps-per-epoch", "1", "--data-args.length", "4", "--data-args.eval-examples", "8"]
    tokens = ["train", "copy_mamba2", "--epochs", "1", "--batch-size", "2", *counts, "--out", str(tmp_path / "tokens")]
    assert main([*tokens, "--quiet"]) == 0, capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["train", "digits_vit", *TINY[:6], "--lr", "1e30", "--out", str(tmp_path / "off")])
    diverged = capsys.readouterr()
    assert "diverged in epoch 1" in diverged.err
    for command in (["predict", str(tmp_path / "tokens"), __file__], ["export", str(tmp_path / "tokens")],
                    ["predict", str(tmp_path / "off"), __file__], ["export", str(tmp_path / "off")]):  # fmt: skip
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "only runs on data sets of images" in error or "diverged" in error or "cannot decode" in error


def reference(run: Path, images: torch.Tensor) -> np.ndarray:
    """Return a run's logits in float64, normalised by hand."""
    expected, net = ImageInput.load(run), load_run(run).model().double()
    mean, std = (torch.tensor(values or one, dtype=torch.float64).view(-1, 1, 1)
                 for values, one in ((expected.mean, [0.0]), (expected.std, [1.0])))  # fmt: skip
    with torch.no_grad():
        return net((images.double() - mean) / std).numpy()


MODELS = {
    "digits_vit": ["--model-args.depth", "1"],
    "digits_convmixer": ["--model-args.depth", "1"],
    "digits_robust": ["--model-args.width", "4", "--model-args.hidden", "16"],
}


@pytest.fixture(scope="module")
def digit_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("digits")
    limits = ["--data-args.train-limit", "64", "--data-args.test-limit", "64", "--threads", "1", "--quiet"]
    for name, arguments in MODELS.items():
        command = ["train", name, "--epochs", "1", "--warmup-epochs", "0", *arguments, *limits]
        assert main([*command, "--out", str(place / name)]) == 0
    return {name: place / name for name in MODELS}


@ONNX
@pytest.mark.parametrize("name", MODELS)
def test_onnx_gives_the_same_logits_for_any_batch(name: str, digit_runs: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime

    file = tmp_path / "net.onnx"
    assert main(["export", str(digit_runs[name]), "--to", "onnx", "--out", str(file)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx"], "one file, and nothing half-written"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["espalier"])
    assert about["input"]["class_names"] == list("0123456789")
    for batch in (1, 2, 7):
        images = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert np.abs(found - reference(digit_runs[name], images)).max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_torch_export_runs_without_this_library(name: str, digit_runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    assert main(["export", str(digit_runs[name]), "--to", "torch-export", "--out", str(file)]) == 0
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; sys.modules['espalier'] = None; about = {'espalier': ''}; "
        "net = torch.export.load('net.pt2', extra_files=about).module(); "
        "torch.save((net(torch.load('images.pt')).detach(), about['espalier']), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    found, about = torch.load(tmp_path / "logits.pt")
    assert np.abs(found.numpy() - reference(digit_runs[name], images)).max() < 1e-4
    assert json.loads(about)["input"]["channels"] == 1


def test_exported_safetensors_say_what_they_are(
    digit_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = digit_runs["digits_vit"], tmp_path / "net.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--out", str(file)]) == 0
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["espalier"])
    assert about["input"] == json.loads((run / "images.json").read_text())
    state = load_run(run).model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in read_tensors(file).items())
    capsys.readouterr()
    # The heads of attention cannot be read off shapes: the file says them, and so does the run folder beside its own.
    for weights in (file, run / "final.safetensors", run / "start.safetensors"):
        assert main(["audit", str(weights)]) == 0
        assert "qk_diagonal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"name": "vit"}', '{"name": "vitt", "args": {}}', '{"name": "vit", "args": 3}']
)
def test_weights_beside_a_damaged_description_are_refused(
    digit_runs: dict[str, Path], tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(digit_runs["digits_vit"] / "final.safetensors", tmp_path)
    (tmp_path / "model.json").write_text(content)
    assert main(["audit", str(tmp_path / "final.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.json" in error or "unknown model 'vitt'" in error


@pytest.mark.parametrize("to", ["torch-export", "safetensors", "onnx"])
@pytest.mark.parametrize("out", ["missing/net", "folder", "folder/pipe"])
def test_a_place_where_no_file_can_be_is_refused(
    to: str, out: str, digit_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder/pipe")
    assert main(["export", str(digit_runs["digits_vit"]), "--to", to, "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "pipe"]
    assert (tmp_path / "folder/pipe").is_fifo()


@pytest.mark.parametrize("to", ["torch-export", "safetensors", pytest.param("onnx", marks=ONNX)])
def test_a_link_stays_one_and_any_name_can_be_written(to: str, digit_runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"old")
    (tmp_path / "link").symlink_to("net")
    odd = os.fsdecode(b"d\xe9j\xe0")
    for out in ("link", odd):
        assert main(["export", str(digit_runs["digits_vit"]), "--to", to, "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "link").is_symlink()
    assert len((tmp_path / "net").read_bytes()) > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["link", "net", odd])


@pytest.mark.parametrize("to", ["torch-export", "safetensors", pytest.param("onnx", marks=ONNX)])
def test_a_full_disk_is_named_as_one(
    to: str, digit_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert main(["export", str(digit_runs["digits_vit"]), "--to", to, "--out", str(tmp_path / "net")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "digits_vit", *TINY[:6], "--data-args.train-limit", "64", "--out", str(out)]
    assert main(command) == 0
    first = capsys.readouterr()
    assert f"run: {out}\n" in first.err
    assert f"next: espalier predict {out}" in first.err
    assert main(command) == 0
    again = capsys.readouterr()
    assert "already finished, nothing trained" in again.err
    assert json.loads(first.out) == json.loads(again.out)
    (out / "result.json").unlink()
    assert main(command) == 0
    assert "unfinished, resumed" in capsys.readouterr().err


def test_one_process_of_torchrun_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "digits_vit", *TINY[:6], "--data-args.train-limit", "64", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 0
    assert "already finished" in capsys.readouterr().err  # a RANK that some shell left, without a launcher
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["abc", "-1", "1.5"])
def test_a_launchers_variable_that_is_no_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["train", "digits_vit", *TINY[:6], "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"espalier: the environment says {name}={value}: unset it, or give a ")
    assert not (tmp_path / "run").exists()
