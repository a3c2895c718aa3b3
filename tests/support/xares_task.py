"""A task of X-ARES on this machine: sounds and labels in webdataset tars, and the file that describes them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

TASK = """from xares.task import TaskConfig


def {name}_config(encoder) -> TaskConfig:
    return TaskConfig(
        encoder=encoder,
        name="{name}",
        eval_weight=1,
        private=True,  # its sounds lie here; nothing is fetched
        label_processor=lambda description: description["label"],
        output_dim={classes},
        epochs={epochs},
    )
"""


def write_task(
    folder: Path,
    name: str,
    splits: dict[str, Iterable[tuple[str, bytes, int]]],
    *,
    classes: int,
    epochs: int = 10,
) -> Path:
    """Write a task into `folder`, for `python -m xares.run` there, and return its file.

    `splits` are train, valid and test: names, WAV files and labels.
    """
    # The sounds, where X-ARES would have put its downloads.
    sound_folder = folder / "env" / name
    sound_folder.mkdir(parents=True)
    for split, sounds in splits.items():
        with tarfile.open(sound_folder / f"{split}-000000.tar", "w") as tar:
            for key, wav, label in sounds:
                for suffix, data in (("wav", wav), ("json", json.dumps({"label": label}).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (sound_folder / ".audio_tar_ready").touch()

    # The description.
    file = folder / f"{name}_task.py"
    file.write_text(TASK.format(name=name, classes=classes, epochs=epochs))
    return file
