"""The identity of a run: the JSON of its recipe.json, to the byte, and nothing that is not understood."""

import json
from dataclasses import replace

import pytest
from identities import run_identity, task_identity

from ajepa.training.run import Run
from ajepa.training.run_identity import BlockShuffleIdentity, RunIdentity, StartCheckpoint
from pipeline.errors import RunError

MEL = """{"name": "a-jepa", "sample_rate_hz": 32000, "window_samples": 800, "hop_samples": 320, "fft_samples": 1024,
 "high_hz": 16000.0, "low_hz": 20.0, "mel_bands": 128, "clip_seconds": 10.0, "framing": "kaldi", "remove_dc": true,
 "preemphasis": 0.97, "window": "hann_symmetric", "filters": "kaldi", "flooring": "max",
 "floor": 1.1920928955078125e-07, "decoding": "1: mean of the channels, soxr HQ"}"""

DATA = f'"store_id": "own", "spec_id": "ff4c3612e71f", "mel": {MEL}, "mean": -9.25, "std": 4.5'

TASK = """"task": "esc50", "kind": "multi", "label_set": "raw", "train_splits": ["fold1", "fold3"],
 "eval_splits": ["fold2"], "classes": ["c", "a", "b"]"""

JOINED = '"stores": ["ab", "cd"], "excluded": [null, "0f"], "store_weights": [0.7, 0.3]'

ESC50 = task_identity(
    task="esc50",
    kind="multi",
    train_splits=("fold1", "fold3"),
    eval_splits=("fold2",),
    classes=("c", "a", "b"),
)

IDENTITIES = {
    "pre-trained": (f"{{{DATA}}}", run_identity()),
    "excluded": (f'{{{DATA}, "excluded": "0f"}}', run_identity(excluded="0f")),
    "joined": (
        f"{{{DATA}, {JOINED}}}",
        run_identity(stores=("ab", "cd"), excluded=(None, "0f"), store_weights=(0.7, 0.3)),
    ),
    "block-shuffled": (
        f'{{{DATA}, "block_shuffle": {{"blocks": "shards", "window_blocks": 2}}}}',
        run_identity(block_shuffle=BlockShuffleIdentity(window_blocks=2)),
    ),
    "fine-tuned": (
        f'{{{DATA}, {TASK}, "from": {{"step": 60, "sha256": "41db"}}}}',
        run_identity(task_identity=replace(ESC50, start=StartCheckpoint(step=60, sha256="41db"))),
    ),
    "fine-tuned from random weights, excluded": (
        f'{{{DATA}, {TASK}, "excluded": "0f", "from": null}}',
        run_identity(excluded="0f", task_identity=ESC50),
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_is_read_from_its_json_and_written_as_it_was(name):
    """Key by key in the same order: recipe.json does not change, and runs that are under way are carried on."""
    text, identity = IDENTITIES[name]
    assert RunIdentity.from_json(json.loads(text)) == identity
    assert json.dumps(identity.to_json()) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("pre-trained", "mean", None, "identity: mean missing; restore the file"),
        ("pre-trained", "colour", "red", "identity: unknown colour; written by a newer version"),
        ("fine-tuned", "classes", None, "identity: classes missing; restore the file"),
        ("fine-tuned", "task", None, "identity: task missing; restore the file"),
        ("fine-tuned", "kind", "double", "identity.kind must be single or multi, got 'double'"),
        ("fine-tuned", "from", {"step": 60}, "identity.from: sha256 missing"),
        ("block-shuffled", "block_shuffle", {"blocks": "shards", "rows": 2}, "block_shuffle: unknown rows"),
        ("pre-trained", "mel", {"name": "a-jepa", "octaves": 3}, "mel spec: unknown octaves"),
    ],
)
def test_an_identity_that_is_not_understood_is_refused_in_one_line(tmp_path, name, key, value, message):
    """A key that is skipped, or filled in, would make another run of it; `None` stands for a key that is gone."""
    record = json.loads(IDENTITIES[name][0]) | {key: value}
    if value is None:
        del record[key]
    run_record = {"format": 1, "recipe": {}, "identity": record, "versions": {}}
    (tmp_path / "recipe.json").write_text(json.dumps(run_record))
    with pytest.raises(RunError) as refused:
        Run.open(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'recipe.json'}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_folder_holds_the_identity_and_gives_it_back(tmp_path):
    """What is compared on resume is what stands in the file."""
    text, identity = IDENTITIES["fine-tuned"]
    run = Run.create_or_open(tmp_path / "run", recipe={"steps": 3}, identity=identity)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["identity"] == json.loads(text)
    assert Run.open(tmp_path / "run") == run
    other = run_identity(task_identity=ESC50)
    with pytest.raises(RunError, match=r"identity.from.step: was 60, now absent"):
        Run.create_or_open(tmp_path / "run", recipe={"steps": 3}, identity=other)


def test_only_a_fine_tuned_run_has_a_task(tmp_path):
    """A pre-trained one is refused by its path, where a classifier is needed."""
    tuned = Run(path=tmp_path, recipe={}, identity=IDENTITIES["fine-tuned"][1], versions={})
    assert tuned.task_identity.classes == ("c", "a", "b")
    assert not tuned.task_identity.single_label
    with pytest.raises(RunError, match="was pre-trained and has no task"):
        replace(tuned, identity=run_identity()).task_identity  # noqa: B018
