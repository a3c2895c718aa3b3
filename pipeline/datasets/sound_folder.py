"""Find the sounds below a user's folder by paths that may have other capitals, another extension or another root."""

import os.path
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.audio.folder_walk import SEARCHED_SUFFIXES, SOUND_EXTENSIONS, LeftOut, walk_sound_files
from pipeline.errors import InputError, ManifestError
from pipeline.messages import did_you_mean

SHOWN_SUFFIXES = 5  # at most this many extensions in an error about a folder without sounds

MACOS_NOTE_PREFIX = "._"  # macOS writes metadata of a file into a second file with this prefix

AS_WRITTEN = ""  # rule of paths that are right as written; it is not reported


def _normalised_name(name: str) -> str:
    # macOS writes an umlaut as two characters, other systems write it as one.
    return unicodedata.normalize("NFC", name)


def _case_folded_name(name: str) -> str:
    return _normalised_name(name).casefold()


def _without_extension(name: str) -> str:
    """Return the name without its extension, if the extension is that of a sound."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension.lower() in SOUND_EXTENSIONS else name


# Rules by which a path in a table may differ from a file's path, smallest difference first. A rule gives the key of a
# path; two paths match if their keys are equal.
PATH_MATCH_RULES: dict[str, Callable[[str], str]] = {
    AS_WRITTEN: _normalised_name,
    "without regard to capitals": _case_folded_name,
    "without regard to capitals and extensions": lambda name: _without_extension(_case_folded_name(name)),
}

# Rules for paths that are only a file name; they are tried after the rules above.
FILE_NAME_MATCH_RULES: dict[str, Callable[[str], str]] = {
    "by the name of the file alone": lambda name: os.path.basename(_normalised_name(name)),
    "by the name of the file alone, without regard to capitals and extensions": lambda name: (
        _without_extension(os.path.basename(_case_folded_name(name)))
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundFolder:
    """A folder and the sounds below it."""

    root: Path
    sound_names: list[str]  # relative to the folder
    _index_by_rule: dict[str, dict[str, list[str]]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def scan_folder(cls, root: Path) -> tuple["SoundFolder", list[str]]:
        """Find all sounds below a folder; returns the folder with its sounds, and notes. InputError without sounds."""
        if not root.exists():
            raise InputError(f"{root}: no such folder{did_you_mean(root)}")
        if not root.is_dir():
            raise InputError(f"{root}: a file; give the folder that it lies in")

        search_left_out = LeftOut()
        all_names = list(walk_sound_files(root, search_left_out))
        names = [name for name in all_names if not os.path.basename(name).startswith(MACOS_NOTE_PREFIX)]
        if not names:
            raise _no_sounds_error(root)

        notes = []
        if len(all_names) > len(names):
            left_out = len(all_names) - len(names)
            notes.append(f"{left_out} files named ._* left out: macOS's own notes, no sounds")
        notes += search_left_out.describe()
        return cls(root=root, sound_names=names), notes

    def file_path(self, name: str) -> str:
        """Return the path of a file from its name below the folder; an absolute path is returned unchanged."""
        return os.path.join(self.root, name)

    def find_sound(self, table_path: str, location: str) -> tuple[str | None, str]:
        """Find the file to which a path in a table refers; returns its name below the folder and the matching rule.

        The name is None if there is no file; the rule is empty if the path is right as written. Raises ManifestError,
        with the `location` in the table, if several files match.
        """
        for name in self._possible_names(table_path):
            rules = PATH_MATCH_RULES
            if os.path.basename(name) == name:
                rules = PATH_MATCH_RULES | FILE_NAME_MATCH_RULES

            for rule_name, key_of_name in rules.items():
                matches = self._sounds_by_key(rule_name, key_of_name).get(key_of_name(name), [])
                if len(matches) > 1:
                    raise ManifestError(
                        f"{location}: {table_path!r} may be {matches[0]!r} or {matches[1]!r}; "
                        "write the path below the folder as it is"
                    )
                if matches:
                    return matches[0], rule_name

                # A file outside the folder, or with an extension that is not listed as that of a sound.
                if rule_name == AS_WRITTEN and os.path.isfile(self.file_path(name)):
                    return name, AS_WRITTEN
        return None, AS_WRITTEN

    def _sounds_by_key(self, rule_name: str, key_of_name: Callable[[str], str]) -> dict[str, list[str]]:
        """Return the names of all sounds by their keys under a rule; computed at the first call for the rule."""
        if rule_name not in self._index_by_rule:
            index: dict[str, list[str]] = {}
            for name in self.sound_names:
                index.setdefault(key_of_name(name), []).append(name)
            self._index_by_rule[rule_name] = index
        return self._index_by_rule[rule_name]

    def _possible_names(self, table_path: str) -> list[str]:
        """Return names below the folder to which a path may refer, the likeliest first.

        These are the path itself, the path relative to the folder if it is inside the folder, and the part of the path
        after the folder's own name.
        """
        root = os.path.abspath(self.root)
        names = [os.path.normpath(table_path)]
        if "\\" in table_path:
            names.append(os.path.normpath(table_path.replace("\\", "/")))

        for name in list(names):
            parts = name.split("/")
            if os.path.isabs(name) and name.startswith(root + "/"):
                names.insert(0, os.path.relpath(name, root))
                continue

            # The path may be relative to the parent folder, or absolute on another machine, even with a drive letter.
            own_name = os.path.basename(root)
            starts_elsewhere = parts[0] == own_name or not parts[0] or ":" in parts[0]
            if own_name in parts[:-1] and starts_elsewhere:
                names.append("/".join(parts[parts.index(own_name) + 1 :]))
        return names


def _no_sounds_error(root: Path) -> InputError:
    suffixes = Counter(path.suffix.lower() or path.name for path in root.rglob("*") if path.is_file())
    found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(SHOWN_SUFFIXES))
    return InputError(
        f"{root}: no sounds below it; looked for {SEARCHED_SUFFIXES}; found {found or 'no files'}; "
        "give the folder of the sounds"
    )
