"""Draw the pictures of the methods' pages: ``python docs/draw_pictures.py`` (a minute; docs/images/methods/*.svg).

Each shows the idea of a method in three panels, from networks that are made here: nothing is drawn by hand.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn

import espalier
from espalier.report.raster import mosaic, png_address, value_limit

FOLDER = Path(__file__).parent / "images" / "methods"
SIDE, GAP, TOP, BOTTOM = 220, 40, 34, 46

Panel = tuple[str, str, str]
"""A title, the markup of a square of SIDE, and a line below it."""


def matrix(values_HW: Tensor, *, diverging: bool = True) -> str:
    """Return a matrix as a picture, blue below zero and red above, or from dark to light."""
    limit = value_limit([values_HW]) or 1.0
    address = png_address(values_HW, -limit if diverging else 0.0, limit, "diverging" if diverging else "sequential")
    return f'<image href="{address}" width="{SIDE}" height="{SIDE}" style="image-rendering:pixelated"/>'


def curves(lines: list[tuple[str, str, Tensor]], top: float) -> str:
    """Return curves over equal steps on a common scale from zero, each with a colour and a name."""
    parts = [f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#bbb"/>']
    for row, (name, colour, values) in enumerate(lines):
        points = " ".join(
            f"{SIDE * i / max(len(values) - 1, 1):.1f},{SIDE * (1 - min(float(v), top) / top):.1f}"
            for i, v in enumerate(values)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(
            f'<text x="{SIDE - 8}" y="{20 + 17 * row}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
    parts.append(f'<text x="4" y="14" fill="#777">{top:g}</text><text x="4" y="{SIDE - 5}" fill="#777">0</text>')
    return "".join(parts)


def write(name: str, panels: list[Panel]) -> None:
    """Write three panels side by side as one SVG."""
    width, height = len(panels) * SIDE + (len(panels) - 1) * GAP, TOP + SIDE + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#222">'
    ]
    for index, (title, body, below) in enumerate(panels):
        words = [f'<text x="{SIDE / 2}" y="22" text-anchor="middle" font-weight="600">{escape(title)}</text>']
        for row, line in enumerate(below.split("\n")):
            y = TOP + SIDE + 18 + 17 * row
            words.append(
                f'<text x="{SIDE / 2}" y="{y}" text-anchor="middle" fill="#555" font-size="12.5">{escape(line)}</text>'
            )
        inside = f'{"".join(words)}<g transform="translate(0 {TOP})">{body}</g>'
        parts.append(f'<g transform="translate({index * (SIDE + GAP)} 0)">{inside}</g>')
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.svg").write_text("\n".join([*parts, "</svg>\n"]))


def generator(seed: int = 0) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def attention() -> None:
    """Products of one layer of a small ViT: as it is usually started, and mimetic."""
    net = espalier.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=1, num_heads=3)
    net.init_weights(generator())
    attn = net.blocks[0].attn

    def products() -> tuple[Tensor, Tensor]:
        q, k, v = attn.qkv.weight.detach().reshape(3, 3, 16, 48).unbind(0)
        return q[0].T @ k[0], torch.einsum(
            "hkd,hke->de", v, attn.proj.weight.detach().reshape(48, 3, 16).permute(1, 2, 0)
        )

    before = products()[0]
    espalier.structure_(net, generator=generator())
    qk, vo = products()
    write(
        "attention",
        [
            ("the usual start", matrix(before), "W_Q W_Kᵀ of one head: noise,\nso every token looks everywhere"),
            ("mimetic: queries and keys", matrix(qk), "W_Q W_Kᵀ near +I: a token\nlooks at tokens like itself"),
            (
                "mimetic: values and output",
                matrix(vo),
                "W_V W_proj near −I: what was\nseen is taken away from the token",
            ),
        ],
    )


def state_space() -> None:
    """How a Mamba-2 layer mixes 64 tokens: as it is usually started, mimetic, and what is left of a token."""
    mixer = espalier.nn.Mamba2(32, 16, generator=generator())
    tokens = torch.randn(1, 16, 32, generator=generator(1)).repeat(1, 4, 1)  # a sequence that repeats itself

    def mixing() -> Tensor:
        with torch.no_grad():
            return espalier.nn.mixing_matrix(mixer, tokens)[0].abs().mean(0)

    def memory() -> Tensor:
        (row,) = espalier.audit(nn.Sequential(mixer)).layers
        return row.measured["decay"] ** torch.arange(64.0)

    usual, forgets = mixing(), memory()
    espalier.structure_(nn.Sequential(mixer), generator=generator())
    write(
        "ssm",
        [
            (
                "the usual start",
                matrix(usual, diverging=False),
                "who is mixed into whom, 64 tokens\nthat repeat after 16: the nearest",
            ),
            ("mimetic", matrix(mixing(), diverging=False), "the same: tokens equal to it,\nhowever long ago"),
            (
                "memory",
                curves([("mimetic", "#b2182b", memory()), ("usual", "#2166ac", forgets)], 1.0),
                "what is left of a token\nafter 0 to 63 further ones",
            ),
        ],
    )


def filters() -> None:
    """Depthwise filters of torch's start, the closed form's covariance, and filters drawn from it."""
    conv = nn.Conv2d(36, 36, 9, groups=36, padding=4)
    nn.init.uniform_(conv.weight, -1 / 9, 1 / 9, generator=generator())
    usual = mosaic(conv.weight.detach()[:, 0], 6)
    covariance = espalier.init.filter_covariance(9, 3.0)
    espalier.init.depthwise_covariance_(conv.weight, 3.0, generator=generator())
    write(
        "filters",
        [
            ("the usual start", matrix(usual), "36 filters of 9 × 9 taps:\nevery tap on its own"),
            (
                "the covariance",
                matrix(covariance.float()),
                "81 × 81: neighbouring taps near\nthe centre belong together",
            ),
            (
                "drawn from it",
                matrix(mosaic(conv.weight.detach()[:, 0], 6)),
                "36 filters as smooth as\ntrained ones, before step 1",
            ),
        ],
    )


def convmixer() -> None:
    """A digit, and what a ConvMixer's blocks make of it before any training."""
    from sklearn.datasets import load_digits

    digit = torch.tensor(load_digits().images[3] / 16, dtype=torch.float32)
    image = nn.functional.interpolate(digit[None, None], size=32, mode="bilinear")
    net = espalier.models.ConvMixer(16, 4, kernel_size=9, patch_size=2, in_chans=1)
    net.init_weights(generator())
    espalier.structure_(net, generator=generator())
    net.eval()
    with torch.no_grad():
        patches = net.stem(image)
        mixed = net.blocks(patches)
    write(
        "convmixer",
        [
            ("pixels", matrix(image[0, 0], diverging=False), "32 × 32"),
            ("patches", matrix(mosaic(patches[0], 4)), "one convolution cuts patches\nof 2 × 2: 16 maps of 16 × 16"),
            (
                "four blocks later",
                matrix(mosaic(mixed[0], 4)),
                "depthwise mixes places, pointwise\nchannels; the size never changes",
            ),
        ],
    )


def cayley() -> None:
    """Singular values of a convolution and of a Cayley convolution, and what depth does to a signal."""
    draw = generator()
    free = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.kaiming_uniform_(free.weight, a=5**0.5, generator=draw)
    orthogonal = espalier.nn.CayleyConv2d(8, 8, 3, bias=False)
    basis = torch.eye(8 * 64).reshape(-1, 8, 8, 8)
    with torch.no_grad():
        values = [torch.linalg.svdvals(layer(basis).flatten(1)) for layer in (free, orthogonal.eval())]
        x = torch.randn(4, 8, 8, 8, generator=draw)
        norms: list[list[float]] = [[1.0], [1.0]]
        for kind in (0, 1):
            y = x
            for depth in range(24):
                if kind:
                    layer: nn.Module = espalier.nn.CayleyConv2d(8, 8, 3, bias=False).eval()
                else:
                    layer = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", bias=False)
                    nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator(depth))
                y = layer(y)
                norms[kind].append(float(y.norm() / x.norm()))
        through = [("Cayley", "#b2182b", torch.tensor(norms[1])), ("plain", "#2166ac", torch.tensor(norms[0]))]
        gram = layer(basis).flatten(1)
    write(
        "cayley",
        [
            (
                "singular values",
                curves([("Cayley", "#b2182b", values[1]), ("plain", "#2166ac", values[0])], 1.5),
                "of a 3 × 3 convolution on 8 × 8\npixels, 512 of them, in order",
            ),
            ("QᵀQ", matrix((gram @ gram.T)[:64, :64]), "the identity: every distance\nbetween images is kept"),
            (
                "a signal through 24 layers",
                curves(through, 1.5),
                "its norm after each layer,\nwithout anything between",
            ),
        ],
    )


def certificates() -> None:
    """A small certified net on digits: certified accuracy over the radius, and an image under attack."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from espalier.certify import certify, pgd_l2
    from espalier.recipes import get_recipe
    from espalier.train import train

    with TemporaryDirectory() as folder:
        run = train(replace(get_recipe("digits_robust"), epochs=10, threads=1), Path(folder) / "run", progress=False)
        source = run.source()
        net = nn.Sequential(source.normalizer, run.model()).double().eval()
        images, labels = source.images("test")
    images = images.double()
    proof = certify(net, images, labels)
    radii = torch.tensor(proof.radii)
    steps = torch.linspace(0, 1.2, 61)
    certified = torch.tensor([proof.certified_accuracy(float(r)) for r in steps])
    index = int(radii.argmax())
    shown = images[index : index + 1]
    radius = float(radii[index])
    found = pgd_l2(net, shown, labels[index : index + 1], 2 * radius, generator=generator())
    write(
        "certificates",
        [
            (
                "certified accuracy",
                curves([("proved", "#b2182b", certified)], 1.0),
                "over the ℓ2 radius, 0 to 1.2,\non digits not trained on",
            ),
            (
                "an image",
                matrix(shown[0, 0], diverging=False),
                f"proved: nothing within\n{radius:.2f} changes its class",
            ),
            (
                "twice as far",
                matrix(found[0, 0], diverging=False),
                "what an attack makes of it there;\nno attack is a proof",
            ),
        ],
    )


DRAWINGS = (attention, state_space, filters, convmixer, cayley, certificates)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[f.__name__ for f in DRAWINGS])
    chosen = parser.parse_args().only
    for drawing in DRAWINGS:
        if not chosen or drawing.__name__ in chosen:
            drawing()
