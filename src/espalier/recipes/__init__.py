"""Recipes, the initialisations they name and the arms that compare them."""

from espalier.recipes import convmixer, other_libraries, robust, sequences, vision  # each registers its recipes
from espalier.recipes.arms import ARMS, apply_arm
from espalier.recipes.base import Recipe, get_recipe, recipe_functions, register_recipe
from espalier.recipes.inits import INITS, get_init

__all__ = ["ARMS", "INITS", "Recipe", "apply_arm", "get_init", "get_recipe", "recipe_functions", "register_recipe"]

del convmixer, other_libraries, robust, sequences, vision
