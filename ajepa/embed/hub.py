"""The Hugging Face hub: exported models pushed to it and fetched from it; the only door to huggingface_hub."""

import re
import shutil
from pathlib import Path
from types import ModuleType

from pipeline.errors import RunError
from pipeline.files import replacing_file

EXPORT_FILES = (
    "model.safetensors",
    "config.json",
    "README.md",
)  # of a model: what is pushed and fetched, and nothing else

HUB_ID_PATTERN = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_id(location: str) -> bool:
    """Whether that may be ORG/NAME or ORG/NAME@REVISION: where a folder ORG lies here, it is a mistyped path."""
    told = HUB_ID_PATTERN.fullmatch(location)
    return told is not None and not Path(location).parent.exists()


def fetch_from_hub(hub_id: str) -> Path:
    """A folder of this machine with the model's files, from the hub or its cache; raises RunError."""
    told = HUB_ID_PATTERN.fullmatch(hub_id)
    if told is None:
        raise RunError(f"{hub_id}: expected ORG/NAME, or ORG/NAME@REVISION")
    try:
        hub = _import_hub_client()
    except RunError as error:
        raise RunError(f"{hub_id}: no such run or file here, and {error}") from None
    try:
        folder = hub.snapshot_download(told[1], revision=told[2], allow_patterns=list(EXPORT_FILES))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise RunError(
            f"{hub_id}: neither here nor to be had from the hub ({_first_error_line(error)})"
        ) from None
    if not (Path(folder) / EXPORT_FILES[0]).is_file():
        raise RunError(f"{hub_id}: holds no {EXPORT_FILES[0]}; expected what `ajepa-train push` put there")
    return Path(folder)


def copy_from_hub(hub_id: str, out: Path) -> Path:
    """The model's files in a folder of one's own; RunError where that holds files already."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise RunError(f"{out}: is there already and not empty; choose another --out")
    folder = fetch_from_hub(hub_id)
    out.mkdir(parents=True, exist_ok=True)
    for name in EXPORT_FILES:
        if (folder / name).is_file():
            with replacing_file(out / name) as scratch:
                shutil.copyfile(folder / name, scratch)
    return out


def push_to_hub(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Put an exported folder on the hub, made there if need be; its address. Raises RunError.

    Who may write is asked of huggingface_hub: `hf auth login`, or HF_TOKEN.
    """
    if HUB_ID_PATTERN.fullmatch(hub_id) is None or "@" in hub_id:
        raise RunError(f"{hub_id}: expected ORG/NAME, the model's place on the hub")
    missing = [name for name in EXPORT_FILES if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder}: lacks {', '.join(missing)}; give the --out folder of `ajepa-train export`")
    hub = _import_hub_client()
    try:
        place = hub.create_repo(hub_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=list(EXPORT_FILES))
    except ValueError as error:  # a name or a card that the hub knows better than we
        raise RunError(
            f"{hub_id}: the hub does not take that ({_first_error_line(error)}); export again"
        ) from None
    except (hub.errors.HfHubHTTPError, hub.errors.LocalTokenNotFoundError, OSError) as error:
        raise RunError(
            f"{hub_id}: the hub did not take it ({_first_error_line(error)}); see: hf auth login"
        ) from None
    return str(place)


def _import_hub_client() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise RunError("the hub needs huggingface_hub; run: pip install 'ajepa[export]'") from None
    return huggingface_hub


def _first_error_line(error: BaseException) -> str:
    """The first line of what the hub's client says: it goes on for a paragraph."""
    return str(error).strip().partition("\n")[0][:160].rstrip(".")
