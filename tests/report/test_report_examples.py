"""Pictures of networks at work: each network is shown an example of its own run, whatever the other arms are shown."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from drawn import assert_same_picture
from espalier.models import SequenceModel, VisionTransformer
from espalier.recipes import get_recipe
from espalier.report import write_report
from espalier.report.mixing import attention_maps, inputs_of_mixers, mixing_matrices
from espalier.report.products import attention_products
from espalier.report.raster import png_address, shrink, value_limit
from espalier.report.views import View
from espalier.study import launch, plan_study
from espalier.train import Run, load_run, train
from photos import write_photos

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 1}


def pictures(html: str) -> list[tuple[str, str]]:
    """Return the addresses of pictures and their words."""
    return re.findall(r'<img src="([^"]+)" alt="([^"]+)"', html)


def vit_run(folder: Path, photos: Path, size: int) -> Run:
    recipe = replace(
        get_recipe("digits_vit"), dataset="folder", data_path=str(photos), data_args={"size": size}, model_args=SMALL,
        epochs=1, batch_size=8, warmup_epochs=0, threads=1,
    )  # fmt: skip
    return train(recipe, folder, progress=False)


def test_a_study_whose_arms_see_images_of_different_sizes_shows_each_its_own(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 5)
    recipe = replace(
        get_recipe("digits_vit"), dataset="folder", data_path=str(tmp_path / "photos"), data_args={"size": 16},
        model_args=SMALL, epochs=1, batch_size=8, warmup_epochs=0, threads=1,
    )  # fmt: skip
    arms = {"small": {}, "big": {"data_args": {"size": 32}}}
    study = plan_study(recipe, arms, [1e-3], [0], tmp_path / "study")
    launch(study, workers=0)
    html = write_report([study.path], tmp_path / "report.html").read_text()
    drawn = [address for address, words in pictures(html) if "look is at itself" in words]
    expected = []
    for trial in study.trials():
        run = load_run(trial.path)
        image = next(iter(run.source().eval_batches("test", 1)))[0]
        for moment in ("start", "final"):
            net = run.model(moment)  # type: ignore[arg-type]
            assert isinstance(net, VisionTransformer)
            with torch.no_grad():
                expected.append(net.attention_maps(image)[0][0, 0])
    limit = value_limit(expected)
    assert [len(each) for each in expected] == [16, 16, 64, 64]
    wanted = [png_address(shrink(each, 96), 0.0, limit, "sequential") for each in expected]
    for address, picture in zip(drawn, wanted, strict=True):
        assert_same_picture(address, picture)
    assert "The first image of the test set of small." in html
    assert "The first image of the test set of big." in html


def test_mixers_of_another_vocabulary_read_an_example_of_their_own(tmp_path: Path) -> None:
    views = []
    for name, vocabulary in (("wide", 40), ("narrow", 8)):
        recipe = replace(
            get_recipe("copy_mamba2"),
            data_args={"vocab_size": vocabulary, "length": 6, "steps_per_epoch": 1, "eval_examples": 4},
            epochs=1, batch_size=4, eval_every=1, threads=1,
        )  # fmt: skip
        run = train(recipe, tmp_path / name, progress=False)
        views.append(View(run.model(), name, "end", run))
    section = mixing_matrices(views)
    assert section is not None
    words = [words for _, words in pictures(section.parts[-1].html)]  # type: ignore[union-attr]
    assert len(words) == sum(
        len(view.net.get_submodule(f"layers.{layer}.mixer").A_log) for view in views for layer in (0, 1)
    )


def test_an_arm_whose_data_are_gone_is_named_and_the_others_are_shown(tmp_path: Path) -> None:
    views = []
    for name in ("here", "gone"):
        write_photos(tmp_path / name, 4)
        run = vit_run(tmp_path / f"run-{name}", tmp_path / name, 16)
        views.append(View(run.model(), name, "end", run))
    shutil.rmtree(tmp_path / "gone")
    section = attention_maps(views)
    assert section is not None
    html = "".join(part.html for part in section.parts)  # type: ignore[union-attr]
    assert "No attention maps: gone: no dataset" in html
    assert sum("look is at itself" in words for _, words in pictures(html)) == 1


def test_networks_without_a_block_or_with_a_mixer_that_takes_no_part_do_not_stop_the_page(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4)
    run = vit_run(tmp_path / "run", tmp_path / "photos", 16)
    bare = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=0, num_heads=1, num_classes=3)
    assert attention_maps([View(bare, "bare", "end", run)]) is None

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SequenceModel(12, 32, "mamba2", state_size=8, head_dim=16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert inputs_of_mixers(Idle(), torch.zeros(1, 3)) == {}
    assert mixing_matrices([View(Idle(), "idle", "end", run)]) is None


def test_arms_of_one_head_and_layer_beside_many_show_all_that_the_caption_says(tmp_path: Path) -> None:
    def net(depth: int, heads: int) -> VisionTransformer:
        return VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=depth, num_heads=heads, num_classes=2
        )

    section = attention_products([View(net(1, 1), "one"), View(net(6, 6), "many")])
    assert section is not None
    first, second = (part.html for part in section.parts)  # type: ignore[union-attr]
    assert [words.partition(":")[0] for _, words in pictures(first)] == [
        "blocks.0.attn head 0",
        *(f"blocks.{layer}.attn head {head}" for layer in (0, 2, 3, 5) for head in (0, 2, 3, 5)),
    ]
    assert len(pictures(second)) == 1 + 4
    for words in ("Shown are 4 of 6 heads", "Shown are 4 of 6 layers"):
        assert words in first


def test_a_finished_run_whose_weights_were_removed_is_not_called_diverged(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4)
    run = vit_run(tmp_path / "run", tmp_path / "photos", 16)
    (run.path / "final.safetensors").unlink()
    html = write_report([run.path], tmp_path / "report.html").read_text()
    assert "has lost a file: it has no final.safetensors" in html
    assert "diverged" not in html.partition("</script>")[2].lower()
