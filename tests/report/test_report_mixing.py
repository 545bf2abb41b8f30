"""Pictures of state-space layers: the inputs that reach the mixers, the pixels, and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier
from drawn import assert_same_picture
from espalier.models import SequenceModel
from espalier.nn import Mamba1, Mamba2, mixing_matrix
from espalier.recipes import get_recipe
from espalier.report import write_report, write_weight_pictures
from espalier.report.mixing import inputs_of_mixers, mixing_matrices, repeated_inputs
from espalier.report.products import state_space_products
from espalier.report.raster import png_address, value_limit
from espalier.report.views import View
from espalier.train import train


def model(pattern: str = "mamba1 mamba2") -> SequenceModel:
    net = SequenceModel(12, 32, pattern, state_size=8, head_dim=16)
    net.init_weights(torch.Generator().manual_seed(0))
    return net


def pictures(html: str) -> dict[str, str]:
    return {words: address for address, words in re.findall(r'<img src="([^"]+)" alt="([^"]+)"', html)}


@torch.no_grad()
def test_the_inputs_that_are_caught_are_what_every_mixer_reads() -> None:
    net = model()
    tokens = torch.randint(12, (1, 300), generator=torch.Generator().manual_seed(1))
    inputs = inputs_of_mixers(net, tokens)
    assert list(inputs) == ["layers.0.mixer", "layers.1.mixer"]
    x = net.embedding(tokens)
    for caught, layer in zip(inputs.values(), net.layers, strict=True):
        torch.testing.assert_close(caught, layer.norm(x)[:, :128])
        x = layer(x)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_hooks_are_gone_even_when_the_network_fails() -> None:
    net = model()
    with pytest.raises(IndexError):
        inputs_of_mixers(net, torch.full((1, 3), 99))
    assert not any(module._forward_pre_hooks for module in net.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_mimetic_start_looks_back_at_the_same_vector_and_a_default_one_does_not(family: str) -> None:
    share = {}
    for start in ("default", "mimetic"):
        g = torch.Generator().manual_seed(0)
        net = Mamba1(64, 64, generator=g) if family == "mamba1" else Mamba2(64, 64, head_dim=32, generator=g)
        if start == "mimetic":
            espalier.structure_(net, ssm=espalier.MimeticSSM(convolution=True), generator=g)
        (x,) = repeated_inputs(net).values()
        assert torch.equal(x[:, :24], x[:, 24:])
        matrix = mixing_matrix(net, x)[0].mean(0)
        rows = range(28, 48)
        back = sum(float(matrix[t, t - 24]) for t in rows)
        others = sum(float(torch.cat([matrix[t, : t - 24], matrix[t, t - 23 : t]]).abs().mean()) for t in rows)
        share[start] = back / others
    assert share["mimetic"] > 2
    assert share["default"] < 1


def test_a_page_shows_every_mixer_and_product_as_it_is(tmp_path: Path) -> None:
    net = model("mamba1 mamba2")
    html = write_weight_pictures(net, tmp_path / "weights.html").read_text()
    assert "24 random vectors, twice" in html
    drawn = pictures(html)
    heads = [words for words in drawn if " head " in words]
    assert [words.partition(":")[0] for words in heads] == [
        "layers.0.mixer head 0", *(f"layers.1.mixer head {head}" for head in range(4))
    ]  # fmt: skip
    inputs = repeated_inputs(net)
    expected = mixing_matrix(net.layers[0].mixer, inputs["layers.0.mixer"])[0].mean(0)
    limit = value_limit([expected])
    assert_same_picture(drawn[heads[0]], png_address(expected, -limit, limit, "diverging"))
    products = {words: address for words, address in drawn.items() if " group " in words}
    assert len(products) == 2
    mixer = net.layers[1].mixer
    *_, w_b, w_c, _ = mixer.in_proj.weight.detach().split([64, 64, 8, 8, 4])
    expected = w_c.T @ w_b
    limit = value_limit([expected])
    address = products[next(words for words in products if "layers.1" in words)]
    assert_same_picture(address, png_address(expected, -limit, limit, "diverging"))


def test_a_run_shows_its_own_test_example_at_both_moments(tmp_path: Path) -> None:
    recipe = replace(
        get_recipe("copy_mamba2"),
        data_args={"vocab_size": 16, "length": 6, "steps_per_epoch": 2, "eval_examples": 4},
        epochs=1, batch_size=4, eval_every=1, threads=1,
    )  # fmt: skip
    run = train(recipe, tmp_path / "run", progress=False)
    html = write_report([run.path], tmp_path / "report.html").read_text()
    assert "first example of the test set" in html
    example = next(iter(run.source().eval_batches("test", 1)))[0]
    for moment in ("start", "final"):
        net = run.model(moment)  # type: ignore[arg-type]
        inputs = inputs_of_mixers(net, example)
        expected = mixing_matrix(net.layers[1].mixer, inputs["layers.1.mixer"])[0, 0]
        limit = value_limit([expected])
        assert png_address(expected, -limit, limit, "diverging") in html


def test_networks_without_state_space_layers_have_no_such_section() -> None:
    for net in (nn.Linear(3, 3), nn.MultiheadAttention(8, 2)):
        assert mixing_matrices([View(net)]) is None
        assert state_space_products([View(net)]) is None


def test_products_of_another_library_are_drawn_by_its_layout() -> None:
    section = state_space_products([View(nn.Sequential(Mamba1(32, 4), Mamba2(32, 4, head_dim=16, groups=2)))])
    assert section is not None
    words = list(pictures(section.parts[0].html))
    assert [text.partition(":")[0] for text in words] == ["0 group 0", "1 group 0", "1 group 1"]
