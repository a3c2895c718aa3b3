"""Names of recipes, tasks and kinds of classifiers, without loading what they name."""

from pathlib import Path

from pipeline.cli.options import keys_in_source, names_in_source

PACKAGE = Path(__file__).parents[1]


def pretrain_recipe_names() -> tuple[str, ...]:
    """Recipes to pre-train with."""
    return keys_in_source(PACKAGE / "recipes/pretrain.py", "PRETRAIN_RECIPES")


def finetune_recipe_names() -> tuple[str, ...]:
    """Recipes to fine-tune or train classifiers with."""
    supervised = keys_in_source(PACKAGE / "recipes/supervised.py", "SUPERVISED_RECIPES")
    return keys_in_source(PACKAGE / "recipes/catalogue.py", "FINETUNE_RECIPES") + supervised


def task_names() -> tuple[str, ...]:
    """Tasks to fine-tune on."""
    return names_in_source(PACKAGE / "evaluate/tasks.py")


def classifier_kind_names() -> tuple[str, ...]:
    """Kinds of classifiers."""
    return keys_in_source(PACKAGE / "model/classifier.py", "CLASSIFIER_KINDS")
