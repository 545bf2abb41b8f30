"""Every kind of picture, of the states of runs and of one network."""

from __future__ import annotations

from collections.abc import Mapping

from espalier.report.attention import attention_maps, attention_products
from espalier.report.filters import depthwise_filters
from espalier.report.mixing import mixing_matrices
from espalier.report.section import Section, bullets
from espalier.report.state_space import state_space_products
from espalier.report.views import PictureMaker, views_of
from espalier.train import Run

PICTURES: tuple[PictureMaker, ...] = (
    attention_maps,
    attention_products,
    mixing_matrices,
    state_space_products,
    depthwise_filters,
)
"""In the order of the page; a new kind of layer adds its own."""


def picture_sections(runs: Mapping[str, Run]) -> list[Section]:
    """Return the pictures of runs at their start and at their end, and a note on what cannot be shown.

    Args:
        runs: by label.
    """
    views, problems = views_of(runs)
    sections = [section for make in PICTURES if (section := make(views)) is not None] if views else []
    if problems:
        sections.append(Section("Weights that cannot be shown", (bullets(problems, "note"),)))
    return sections
