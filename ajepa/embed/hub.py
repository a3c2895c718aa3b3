"""The Hugging Face hub: exported models are pushed to it and fetched from it; the only user of huggingface_hub."""

import re
import shutil
from pathlib import Path
from types import ModuleType

from pipeline.errors import RunError
from pipeline.files import replacing_file

# The files of an exported model; only these are pushed and fetched.
EXPORT_FILES = ("model.safetensors", "config.json", "README.md")

# Matches ORG/NAME and ORG/NAME@REVISION.
HUB_ID_PATTERN = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")

# Errors of the hub's client are a paragraph long; messages quote at most this many characters of the first line.
MAX_ERROR_CHARACTERS = 160


def is_hub_id(location: str) -> bool:
    """Return whether a location may be a hub id. If a folder ORG exists it is not: then it is a mistyped path."""
    return HUB_ID_PATTERN.fullmatch(location) is not None and not Path(location).parent.exists()


def fetch_from_hub(hub_id: str) -> Path:
    """Return a local folder with the model's files, from the hub or its cache; raises RunError."""
    match = HUB_ID_PATTERN.fullmatch(hub_id)
    if match is None:
        raise RunError(f"{hub_id}: expected ORG/NAME, or ORG/NAME@REVISION")

    # If the hub's client is not installed, the location is most likely a mistyped path: the message says so.
    try:
        hub = _import_hub_client()
    except RunError as error:
        raise RunError(f"{hub_id}: no such run or file here, and {error}") from None

    # Download the files, unless the local cache has them.
    try:
        folder = hub.snapshot_download(match[1], revision=match[2], allow_patterns=list(EXPORT_FILES))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise RunError(
            f"{hub_id}: no such run or file here, and the hub did not give it ({_first_error_line(error)})"
        ) from None
    if not (Path(folder) / EXPORT_FILES[0]).is_file():
        raise RunError(
            f"{hub_id}: holds no {EXPORT_FILES[0]}; expected a model that `ajepa-train push` put there"
        )
    return Path(folder)


def copy_from_hub(hub_id: str, out: Path) -> Path:
    """Copy the model's files into the folder `out`, and return `out`; RunError if it already contains files."""
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
    """Upload an exported folder to the hub, create the repository if needed, and return its address.

    RunError if the folder is not an export or the hub refuses it. huggingface_hub provides the credentials, from `hf
    auth login` or HF_TOKEN.
    """
    # Check the name and the files before contacting the hub.
    if HUB_ID_PATTERN.fullmatch(hub_id) is None or "@" in hub_id:
        raise RunError(f"{hub_id}: expected ORG/NAME, the model's place on the hub")
    missing = [name for name in EXPORT_FILES if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder}: lacks {', '.join(missing)}; give the --out folder of `ajepa-train export`")

    hub = _import_hub_client()
    try:
        url = hub.create_repo(hub_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=list(EXPORT_FILES))
    except ValueError as error:
        # The client checks the name, and the hub checks the model card.
        raise RunError(
            f"{hub_id}: the hub refuses the name or the model card ({_first_error_line(error)}); "
            "choose another name, or export again"
        ) from None
    except (hub.errors.HfHubHTTPError, hub.errors.LocalTokenNotFoundError, OSError) as error:
        raise RunError(
            f"{hub_id}: the upload failed ({_first_error_line(error)}); run `hf auth login` if you have not"
        ) from None
    return str(url)


def _import_hub_client() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise RunError("the hub needs huggingface_hub; run: pip install 'ajepa[export]'") from None
    return huggingface_hub


def _first_error_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:MAX_ERROR_CHARACTERS].rstrip(".")
