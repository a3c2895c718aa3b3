"""Names of recipes, tasks and kinds of classifiers, without loading what they name."""

from pathlib import Path

from pipeline.cli.options import keys_of, names_in

PACKAGE = Path(__file__).parents[1]


def pretraining() -> tuple[str, ...]:
    """Recipes to pre-train with."""
    return keys_of(PACKAGE / "recipes/pretrain.py", "RECIPES")


def finetuning() -> tuple[str, ...]:
    """Recipes to fine-tune or train classifiers with."""
    supervised = keys_of(PACKAGE / "recipes/supervised.py", "SUPERVISED")
    return keys_of(PACKAGE / "recipes/catalogue.py", "FINETUNES") + supervised


def tasks() -> tuple[str, ...]:
    """Tasks to fine-tune on."""
    return names_in(PACKAGE / "evaluate/tasks.py")


def models() -> tuple[str, ...]:
    """Kinds of classifiers."""
    return keys_of(PACKAGE / "model/classifier.py", "MODELS")
