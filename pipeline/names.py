"""Names that options take, read off the source of what defines them: the tab key cannot wait for it to load."""

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def keys_of(file: Path, table: str) -> tuple[str, ...]:
    """The keys that a module writes out in its dict `table`, in their order; not those of dicts unpacked there."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys)) if name == table:
                return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))
    raise LookupError(f"{file}: has no dict {table}")


def names_in(file: Path) -> tuple[str, ...]:
    """Every text that a module gives as `name=`."""
    calls = (
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    given = (word.value for call in calls for word in call.keywords if word.arg == "name")
    return tuple(str(value.value) for value in given if isinstance(value, ast.Constant))


def completing(names: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """What the tab key offers for an option: those of the names that begin as what is typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def specs() -> tuple[str, ...]:
    """Mel specs."""
    return names_in(HERE / "melspec.py")


def rules() -> tuple[str, ...]:
    """Rules of propagation."""
    return keys_of(HERE / "propagation.py", "RULES")
