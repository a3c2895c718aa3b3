"""The Hugging Face hub: exported models pushed to it and fetched from it; the only door to huggingface_hub."""

import re
import shutil
from pathlib import Path
from types import ModuleType

from pipeline.errors import RunError
from pipeline.files import replacing_file

# The files of a model: no others are pushed or fetched.
EXPORT_FILES = ("model.safetensors", "config.json", "README.md")

# ORG/NAME, or ORG/NAME@REVISION.
HUB_ID_PATTERN = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")

# Errors of the hub's client go on for a paragraph; messages repeat so much of the first line.
MAX_ERROR_CHARACTERS = 160


def is_hub_id(location: str) -> bool:
    """Whether a location may be ORG/NAME or ORG/NAME@REVISION; not where a folder ORG exists: a mistyped path then."""
    return HUB_ID_PATTERN.fullmatch(location) is not None and not Path(location).parent.exists()


def fetch_from_hub(hub_id: str) -> Path:
    """Return a folder of this machine with the model's files, from the hub or its cache; raises RunError."""
    match = HUB_ID_PATTERN.fullmatch(hub_id)
    if match is None:
        raise RunError(f"{hub_id}: expected ORG/NAME, or ORG/NAME@REVISION")

    # Without the client, a name of the hub is most likely a mistyped path.
    try:
        hub = _import_hub_client()
    except RunError as error:
        raise RunError(f"{hub_id}: no such run or file here, and {error}") from None

    # Download, unless the cache of this machine has the files.
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
    """Copy the model's files into a folder of the user's, and return it; RunError where it holds files already."""
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
    """Put an exported folder on the hub, in a repository that is made if need be; return its address.

    RunError where the folder is no export or the hub refuses it. The right to write comes from huggingface_hub: `hf
    auth login`, or HF_TOKEN.
    """
    # Refuse what can be refused before the hub is asked.
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
        # The client's rules for names, the hub's for cards.
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
