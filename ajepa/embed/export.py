"""Export: a trained encoder as files for others: safetensors, its configuration, a card that says what it is."""

import json
import re
from dataclasses import replace
from pathlib import Path

from ajepa.embed.hub import EXPORT_FILES
from ajepa.embed.pretrained import (
    EXPORT_METADATA_KEY,
    LAST_CHECKPOINT,
    WEIGHTS_FILE,
    PretrainedEncoder,
    load_pretrained,
)
from ajepa.training.checkpoints import write_safetensors
from ajepa.training.run import RECIPE_FILE, Json, flatten_to_paths
from pipeline.errors import RunError
from pipeline.files import replacing_file

CONFIG_FILE, CARD_FILE = "config.json", "README.md"

COMPUTE_FILE, EVALUATION_GLOB = "compute.json", "evaluation*.json"  # of a run, where they are there

UNSTATED_LICENCE = "not stated; ask those who made it before you build on it"


def export_encoder(
    location: Path | str, out: Path, *, licence: str | None = None, at: str | int = LAST_CHECKPOINT
) -> PretrainedEncoder:
    """Write `model.safetensors`, `config.json` and `README.md` into the folder `out`; what was exported.

    The configuration also stands in the header of the safetensors file, which therefore is enough by itself;
    nothing in it needs pickle or code. `licence` is that of the weights, and its user's to state; `at` as in
    `trained`. RunError where `place` holds no encoder, or `out` something else than an export.
    """
    model = load_pretrained(location, at)
    model = replace(model, licence=licence or model.licence)
    refuse_other_files(out)
    out.mkdir(parents=True, exist_ok=True)
    config = model.to_json()
    with replacing_file(out / WEIGHTS_FILE) as scratch:
        write_safetensors(scratch, model.weights, {EXPORT_METADATA_KEY: json.dumps(config)})
    with replacing_file(out / CONFIG_FILE) as scratch:
        scratch.write_text(json.dumps(config, indent=1) + "\n")
    run = Path(location) if (Path(location) / RECIPE_FILE).is_file() else None
    with replacing_file(out / CARD_FILE) as scratch:
        scratch.write_text(model_card(model, run))
    return model


def refuse_other_files(out: Path) -> None:
    """RunError where `out` holds anything that is no export's, which a push would leave behind or lose."""
    if out.is_file():
        raise RunError(f"{out}: is a file; expected a folder")
    others = [path.name for path in out.iterdir() if path.name not in EXPORT_FILES] if out.is_dir() else []
    if others:
        raise RunError(f"{out}: holds {sorted(others)[0]}, which is no export's; choose another --out")


def model_card(model: PretrainedEncoder, run: Path | None) -> str:
    """The model card: front matter for the hub, then every fact as a line."""
    spec, mel, grid, origin = model.spec, model.mel, model.spec.grid, model.origin
    count = sum(weight.numel() for weight in model.weights.values())
    view_seconds = mel.samples_of(grid.frames) / mel.sample_rate_hz
    column_ms = grid.patch_frames * mel.hop_samples / mel.sample_rate_hz * 1e3
    recipe = origin.get("recipe", {})
    head = ["---", "library_name: ajepa", "pipeline_tag: feature-extraction"]
    head += ["tags: [audio, self-supervised-learning, JEPA]"]
    head += licence_lines(model.licence)
    lines = [
        *[*head, "---", "", f"# {model.recipe_name}, an audio encoder", ""],
        f"Sound of any length and rate in, one vector a clip and one every {column_ms:g} ms out:",
        *["", "```python", "import ajepa", "", 'model = ajepa.load("THIS FOLDER OR ORG/NAME")'],
        'told = model.embed(["a.mp3", "b.wav"])',
        f"told.clips_BD         # float32 [2, {spec.width}]",
        f"told[0].frames_TD     # float32 [T, {spec.width}]",
        *["told[0].times_ms_T    # centres, ms", "```", ""],
        *card_section(
            "What it is", {"model id": model.model_id, "parameters": f"{count:,}"} | encoder_facts(model)
        ),
        f"It sees {view_seconds:.3f} s at a time; what is longer goes through it in windows that overlap.",
        "",
        *card_section("Licence of the weights", {"licence": model.licence or UNSTATED_LICENCE}),
        *card_section("Mel spec", mel.to_json() | {"mean": model.mean, "std": model.std}),
        *card_section("Data", origin.get("identity", {})),
        *card_section(
            "Training",
            {key: recipe[key] for key in ("name", "clips_per_step", "steps", "seed") if key in recipe}
            | {"checkpoint": f"step {origin.get('step')}"}
            | origin.get("versions", {}),
        ),
        *card_section(
            "Compute", read_run_json(run / COMPUTE_FILE) if run and (run / COMPUTE_FILE).is_file() else {}
        ),
    ]
    for file in sorted(run.glob(EVALUATION_GLOB)) if run else ():
        told = read_run_json(file)
        if (
            told.get("protocol", {}).get("step") == origin["step"]
        ):  # another checkpoint's scores are not its own
            lines += evaluation_lines(file.name, told)
    return "\n".join(lines).rstrip() + "\n"


def licence_lines(licence: str | None) -> list[str]:
    """For the hub, which knows licences by their short names and every other as `other` with a name."""
    if licence is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        return [f"license: {licence}"] if licence else []
    return ["license: other", f"license_name: {json.dumps(licence)}"]


def encoder_facts(model: PretrainedEncoder) -> Json:
    """Shape of the network."""
    spec, grid = model.spec, model.spec.grid
    return {
        "encoder": f"ViT, width {spec.width}, depth {spec.depth}, heads {spec.heads}, {spec.positions} positions",
        "patches": f"{grid.patch_frames} frames x {grid.patch_bands} bands, "
        f"{grid.cols} columns x {grid.rows} rows",
    }


def card_section(title: str, facts: Json) -> list[str]:
    """A heading and a table of what is known, nested values by their paths; nothing where nothing is known."""
    if not facts:
        return []
    rows = [f"| {key} | {value} |" for key, value in flatten_to_paths(facts).items()]
    return [f"## {title}", "", "| | |", "| --- | --- |", *rows, ""]


def evaluation_lines(name: str, evaluation: Json) -> list[str]:
    """Every score of an evaluation as a row, with the protocol that it was measured by."""
    kept = [score_cells(score) for score in evaluation.get("scores", ())]
    columns = list(dict.fromkeys(key for score in kept for key in score))
    lines = [f"## Scores ({name})", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for score in kept:
        cells = [score.get(key, "") for key in columns]
        told_cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(told_cells)} |")
    return [*lines, "", *card_section(f"Protocol ({name})", evaluation.get("protocol", {}))]


def score_cells(score: Json) -> Json:
    """What fits a row: plain values, and each metric with its interval."""
    plain = {key: value for key, value in score.items() if isinstance(value, str | int | float)}
    for name, one in score.get("metrics", {}).items():
        plain[name] = f"{one['value']:.4g} ({one['low']:.4g} to {one['high']:.4g})"
    return plain


def read_run_json(file: Path) -> Json:
    """A file of the run, as it is."""
    return json.loads(file.read_text())
