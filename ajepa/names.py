"""Names of recipes, tasks and kinds of classifiers, without loading what they name."""

from pathlib import Path

from pipeline.names import keys_of, names_in

HERE = Path(__file__).parent


def pretraining() -> tuple[str, ...]:
    """Recipes to pre-train with."""
    return keys_of(HERE / "recipes.py", "RECIPES")


def finetuning() -> tuple[str, ...]:
    """Recipes to fine-tune or train classifiers with."""
    supervised = keys_of(HERE / "supervised_recipes.py", "SUPERVISED")
    return keys_of(HERE / "finetune_recipes.py", "FINETUNES") + supervised


def tasks() -> tuple[str, ...]:
    """Tasks to fine-tune on."""
    return tuple(name for file in sorted((HERE / "tasks").glob("*.py")) for name in names_in(file))


def models() -> tuple[str, ...]:
    """Kinds of classifiers."""
    return keys_of(HERE / "models.py", "MODELS")
