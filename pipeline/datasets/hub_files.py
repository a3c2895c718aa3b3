"""The files of a Hugging Face dataset: found in a folder or fetched from the hub, each with its format and split."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.messages import did_you_mean, suggest_known

# ORG/NAME, or NAME alone as of old datasets.
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")

# What is fetched of a dataset; loose sounds are not.
FETCHED_PATTERNS = ("*.parquet", "*.arrow", "*.json")

# The branch of the hub on which it keeps a Parquet copy of most datasets.
PARQUET_REVISION = "refs/convert/parquet"

# `train-00000-of-00001.parquet`, as `push_to_hub` names files.
SHARD_PATTERN = re.compile(r"(?P<split>[\w.-]+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")

# A word of the name of a file or folder that says its split, as the hub reads it, and the split.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}

DEFAULT_SPLIT = "train"

# Folders that stand for no configuration.
PLAIN_FOLDERS = ("data", "default")

MAX_ERROR_LETTERS = 160  # of the hub client's errors, which are a paragraph long


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFile:
    """One file of a dataset: its path, its path below the dataset's folder, `parquet` or `arrow`, and its split."""

    path: Path
    name: str
    kind: str
    split: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFolder:
    """The folder with a dataset's files, and the commit of the hub that was fetched; None: a folder of one's own."""

    path: Path
    commit: str | None = None


def open_dataset_folder(dataset: str, revision: str | None) -> DatasetFolder:
    """Return a local folder as it is, or that of ORG/NAME, fetched from the hub; raises InputError."""
    path = Path(dataset)
    if path.is_dir():
        return DatasetFolder(path=path)
    if path.exists():
        raise InputError(f"{dataset}: is a file; give the folder of the dataset, or ORG/NAME on the hub")
    if HUB_ID_PATTERN.fullmatch(dataset) is None or (path.parent.exists() and path.parent != Path(".")):
        raise InputError(f"{dataset}: no such folder{did_you_mean(path)}")
    return fetch_dataset(dataset, revision)


def fetch_dataset(hub_id: str, revision: str | None) -> DatasetFolder:
    """Fetch the tables of a dataset, unless they are in the hub's cache on this machine; raises InputError."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise InputError(
            f"{hub_id}: no such folder here, and the hub needs huggingface_hub; run: pip install 'ajepa[hub]'"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, repo_type="dataset", revision=revision, allow_patterns=list(FETCHED_PATTERNS)
        )
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).strip().partition("\n")[0][:MAX_ERROR_LETTERS].rstrip(".")
        raise InputError(
            f"{hub_id}: no such folder here, and the hub did not give it ({reason}); private ones need `hf auth login`"
        ) from None

    # The folder of a snapshot is named for its commit.
    return DatasetFolder(path=Path(folder), commit=Path(folder).name)


def list_dataset_files(folder: DatasetFolder, dataset: str, config: str | None) -> list[DatasetFile]:
    """Return the tables of a dataset, or of one of its configurations, ascending by name; raises InputError."""
    names = sorted(
        path.relative_to(folder.path).as_posix()
        for pattern in ("*.parquet", "*.arrow")
        for path in folder.path.rglob(pattern)
        if not path.name.startswith(("cache-", "."))
    )
    if not names:
        if folder.commit is None:
            advice = "sounds in loose files: ajepa-data build-folder"
        else:
            advice = f"the hub's own Parquet copy, if there is one: --revision {PARQUET_REVISION}"
        raise InputError(f"{dataset}: holds no Parquet and no Arrow file; {advice}")

    kept = names_of_config(names, dataset, config)
    return [
        DatasetFile(
            path=folder.path / name,
            name=name,
            kind=name.rpartition(".")[2],
            split=split_of_file(folder.path, name),
        )
        for name in kept
    ]


def names_of_config(names: Sequence[str], dataset: str, config: str | None) -> list[str]:
    """Return the files of a configuration, which is a folder at the top; InputError if several are left to choose."""
    configs = sorted({config_of_name(name) for name in names} - {""})
    if config is not None:
        if config not in configs:
            raise InputError(f"{dataset}: no configuration {config!r}; {suggest_known(config, configs)}")
        return [name for name in names if config_of_name(name) == config]
    if len(configs) > 1:
        raise InputError(
            f"{dataset}: holds {len(configs)} configurations; add --config, one of: {', '.join(configs)}"
        )
    return list(names)


def config_of_name(name: str) -> str:
    """Return the folder at the top if it names a configuration, else an empty text."""
    top, _, rest = name.partition("/")
    if not rest or top in PLAIN_FOLDERS or split_word(top) is not None:
        return ""
    return top


def split_of_file(root: Path, name: str) -> str:
    """Return the split of a file: by what `save_to_disk` wrote beside it, else by its name, else by its folders."""
    path = root / name
    if (path.parent.parent / "dataset_dict.json").is_file():
        return path.parent.name
    state_file = path.parent / "state.json"
    if path.suffix == ".arrow" and state_file.is_file():
        try:
            return json.loads(state_file.read_text()).get("_split") or DEFAULT_SPLIT
        except ValueError:
            raise InputError(f"{state_file}: damaged (not JSON); save the dataset again") from None

    # The hub's names: the split before the numbers, or any word that is one.
    if match := SHARD_PATTERN.fullmatch(path.stem):
        return match["split"]
    words = (split_word(part) for part in reversed([*Path(name).parent.parts, path.stem]))
    return next((word for word in words if word is not None), DEFAULT_SPLIT)


def split_word(name: str) -> str | None:
    """Return the split that a word of a name says: `test` of `my-test_0`; None if no word does."""
    words: Iterable[str] = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
