"""What a recipe's docstring and the pages say of its size is what it trains on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from espalier.recipes import get_recipe, recipe_functions

PAGES = Path(__file__).parents[2] / "docs"
IMAGES = re.compile(r"on ([\d,]+) (?:[\w-]+ )?images")


@pytest.mark.parametrize("name", sorted(recipe_functions()))
def test_the_number_of_images_is_the_recipes(name: str) -> None:
    limits = [f"{get_recipe(name).data_args.get(key, 0):,}" for key in ("train_limit", "test_limit")]
    texts = [" ".join((recipe_functions()[name].__doc__ or "").split())]
    texts += [line for page in PAGES.rglob("*.md") for line in page.read_text().splitlines() if f"| `{name}` |" in line]
    for text in texts:
        assert set(IMAGES.findall(text)) <= set(limits), text
