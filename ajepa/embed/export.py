"""Export of an encoder for other users: weights as safetensors, the configuration, and a model card."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ajepa.embed.head import SOFTMAX
from ajepa.embed.hub import EXPORT_FILES
from ajepa.embed.pretrained import (
    EXPORT_METADATA_KEY,
    LAST_CHECKPOINT,
    WEIGHTS_FILE,
    PretrainedEncoder,
    load_pretrained,
)
from ajepa.model.pooling import column_pooling
from ajepa.training.checkpoints import write_safetensors
from ajepa.training.feature_choice import resolve_features, vector_width
from ajepa.training.run import RECIPE_FILE, Json, flatten_to_paths
from pipeline.errors import RunError
from pipeline.files import replacing_file

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"

# Files of a run whose content is copied into the model card if they exist.
COMPUTE_FILE = "compute.json"
EVALUATION_GLOB = "evaluation*.json"

# The recipe fields that the model card lists.
CARD_RECIPE_FIELDS = ("name", "clips_per_step", "steps", "seed")

GRAPH_PRECISION_NOTE = (
    "Graphs of it (`ajepa-train export --onnx`, `--torch-export`) compute resampler, DFT and mel bands in fp32 on any "
    "hardware, also where it multiplies as TF32; the encoder computes as the runtime that loads the graph is set."
)

SHOWN_CLASSES = 10  # in the model card

UNSTATED_LICENCE = "not stated; ask those who made the model before you build on it"


def export_encoder(
    location: Path | str, out: Path, *, licence: str | None = None, at: str | int = LAST_CHECKPOINT
) -> PretrainedEncoder:
    """Write `model.safetensors`, `config.json` and `README.md` into the folder `out`; return the exported encoder.

    The header of the safetensors file also contains the configuration, so this file alone is a complete export.
    It needs neither pickle nor code. `licence` is the licence of the weights, which only the user can state; `at` is
    as in `load_pretrained`. RunError if `location` has no encoder, or if `out` contains other files than an export.
    """
    model = load_pretrained(location, at)
    model = replace(model, licence=licence or model.licence)
    refuse_other_files(out)
    out.mkdir(parents=True, exist_ok=True)

    # Write the weights and the configuration.
    config = model.to_json()
    with replacing_file(out / WEIGHTS_FILE) as scratch:
        write_safetensors(scratch, model.tensors, {EXPORT_METADATA_KEY: json.dumps(config)})
    with replacing_file(out / CONFIG_FILE) as scratch:
        scratch.write_text(json.dumps(config, indent=1) + "\n")

    # Write the model card. Only a run has figures for it; an export that is exported again has none.
    run = Path(location) if (Path(location) / RECIPE_FILE).is_file() else None
    with replacing_file(out / CARD_FILE) as scratch:
        scratch.write_text(model_card(model, run))
    return model


def add_graph_to_card(
    out: Path, files: Sequence[Path], interface: Sequence[str], audio_hz: int, *, has_scores: bool = False
) -> None:
    """Add to the model card in `out` how to call the graphs in some files; `interface` is a table of their axes.

    `has_scores` is whether the graphs are those of a classifier.
    """
    names = " and ".join(file.name for file in files)
    heading = f"## Audio in: {names}"
    lines = [heading, "", *interface, ""]
    for file in files:
        if file.suffix == ".onnx":
            lines += [*onnx_usage_lines(file.name, audio_hz), *LONG_SOUND_LINES]
            lines += LONG_SCORES_LINES if has_scores else []
        elif file.suffix == ".pt2":
            lines += program_usage_lines(file.name)

    # A card that is written again has this section once.
    card = (out / CARD_FILE).read_text()
    with replacing_file(out / CARD_FILE) as scratch:
        scratch.write_text(
            card.partition("\n## Audio in: ")[0].rstrip() + "\n\n" + "\n".join(lines).rstrip() + "\n"
        )


# How the windows of a long sound become its vector, as in `Embedder.embed`; it goes on from `onnx_usage_lines`.
LONG_SOUND_LINES = """\
A sound of any length, as `ajepa.load(...).embed` does it: windows that overlap by half. Of the columns that two windows
share, each gives the half that is nearer to its middle; the vector is the mean over all columns, and with pooling
`moments` also their deviation.

```python
def embed_long(sound):
    columns = session.get_outputs()[1].shape[1]  # of a window
    hop = int(metadata["hop_columns"])
    step = float(metadata["column_samples"])
    total = 1 + int((len(sound) - float(metadata["first_frame_samples"])) // step)
    if total < 1:
        raise ValueError("the sound is shorter than a frame of the spectrogram")
    last = max(0, total - columns)  # the last window ends with the sound
    starts = [*range(0, last, hop), last]

    # One vector a column, each from the window that has more of the sound around it.
    borders = [0, *((a + columns + b) // 2 for a, b in zip(starts, starts[1:])), total]
    frames = []
    for start, begin, end in zip(starts, borders, borders[1:]):
        piece = sound[round(start * step) :][:window]
        audio = np.zeros((1, window), np.float32)
        audio[0, : len(piece)] = piece
        (found,) = session.run(["frames"], {"audio": audio, "samples": np.array([len(piece)])})
        frames.append(found[0, begin - start : end - start].astype(np.float64))
    frames = np.concatenate(frames)
    if metadata["pooling"] != "moments":
        return frames.mean(0)
    return np.concatenate([frames.mean(0), np.sqrt(np.maximum(frames.var(0), 1e-12))])


vector = embed_long(np.zeros(3 * window, np.float32))
```

""".splitlines()

# How the windows of a long sound become its scores, as in `Predictor`; it goes on from `onnx_usage_lines`.
LONG_SCORES_LINES = """\
`scores` are those of one window. Those of a sound of any length, as `ajepa.load(...).predict` gives them: windows one
after the other, whose logits are averaged, weighted by their frames of the spectrogram; the last one may be shorter.

```python
def predict_long(sound):
    frame = float(metadata["frame_samples"])  # from one frame of the spectrogram to the next
    frames = session.get_outputs()[1].shape[1] * round(float(metadata["column_samples"]) / frame)  # of a window
    total = 1 + int((len(sound) - float(metadata["first_frame_samples"])) // frame)
    if total < 1:
        raise ValueError("the sound is shorter than a frame of the spectrogram")
    softmax = metadata["activation"] == "softmax"
    logits = 0.0
    for start in range(0, total, frames):
        piece = sound[round(start * frame) :][:window]
        audio = np.zeros((1, window), np.float32)
        audio[0, : len(piece)] = piece
        (found,) = session.run(["scores"], {"audio": audio, "samples": np.array([len(piece)])})
        scores = np.maximum(found[0].astype(np.float64), 1e-38)
        odds = scores if softmax else scores / np.maximum(1 - scores, 1e-8)  # float32 rounds some scores to 1
        logits = logits + np.log(odds) * min(frames, total - start)
    logits = logits / total
    if not softmax:
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


scores = predict_long(np.zeros(3 * window, np.float32))  # in the order of `classes`
```

""".splitlines()


def program_usage_lines(name: str) -> list[str]:
    """Return an example in Python that opens a program of torch.export."""
    return [
        "```python",
        "import json",
        "import torch",
        "",
        'files = {"metadata.json": ""}',
        f'program = torch.export.load("{name}", extra_files=files).module()  # program(audio, samples)',
        'metadata = json.loads(files["metadata.json"])  # pooling, layer, samples: those of the ONNX file',
        "```",
        "",
    ]


def onnx_usage_lines(name: str, audio_hz: int) -> list[str]:
    """Return an example in Python that runs an ONNX file on one sound."""
    return [
        "```python",
        "import json",
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{name}")',
        "metadata = session.get_modelmeta().custom_metadata_map",
        'window = int(metadata["samples"])',
        f"sound = np.zeros(window // 2, np.float32)  # yours: mono at {audio_hz} Hz, at most one window",
        "audio = np.zeros((1, window), np.float32)",
        "audio[0, : len(sound)] = sound",
        'inputs = {"audio": audio, "samples": np.array([len(sound)])}',
        "names = [output.name for output in session.get_outputs()]",
        "outputs = dict(zip(names, session.run(None, inputs)))",
        'vector = outputs["clip"][0]',
        'if "scores" in outputs:  # of a fine-tuned model',
        '    classes = json.loads(metadata["class_names"])',
        '    print(classes[outputs["scores"][0].argmax()])',
        "```",
        "",
    ]


def refuse_other_files(out: Path) -> None:
    """Raise RunError if `out` contains a file that is not part of an export: a push would omit or lose it."""
    if out.is_file():
        raise RunError(f"{out}: is a file; expected a folder")
    if not out.is_dir():
        return
    others = [path.name for path in out.iterdir() if path.name not in EXPORT_FILES]
    if others:
        raise RunError(f"{out}: holds {min(others)}, which belongs to no export; choose another --out")


def model_card(model: PretrainedEncoder, run: Path | None) -> str:
    """Return the text of the model card: front matter for the hub, an example, then tables with one row per fact."""
    weights = sum(weight.numel() for weight in model.weights.values())
    view_seconds = model.mel.samples_of(model.spec.grid.frames) / model.mel.sample_rate_hz

    # The encoder: what it is, and how to call it.
    kind = "an audio encoder" if model.head is None else "an audio classifier"
    lines = front_matter(model.licence, is_classifier=model.head is not None)
    lines += [f"# {model.recipe_name}, {kind}", "", *prediction_lines(model), *usage_lines(model)]
    network = {"model id": model.model_id, "parameters": f"{weights:,}"} | encoder_facts(model)
    lines += card_section("The encoder", network)
    lines += [
        f"The encoder sees {view_seconds:.3f} s at a time; longer sounds go through it in overlapping windows.",
        "",
        GRAPH_PRECISION_NOTE,
        "",
    ]
    lines += card_section("Licence of the weights", {"licence": model.licence or UNSTATED_LICENCE})
    lines += card_section("Mel spec", model.mel.to_json() | {"mean": model.mean, "std": model.std})

    # Provenance: how the encoder was made.
    recipe = model.origin.get("recipe", {})
    training = {key: recipe[key] for key in CARD_RECIPE_FIELDS if key in recipe}
    training |= {"checkpoint": f"step {model.origin.get('step')}"} | model.origin.get("versions", {})
    lines += card_section("Data", model.origin.get("identity", {}))
    lines += card_section("Training", training)

    # The cost of its training, and its scores.
    if run is not None:
        lines += run_lines(run, model.origin["step"])
    return "\n".join(lines).rstrip() + "\n"


def front_matter(licence: str | None, *, is_classifier: bool) -> list[str]:
    """Return the YAML lines with the metadata that the hub lists the model by."""
    task = "audio-classification" if is_classifier else "feature-extraction"
    return [
        "---",
        "library_name: ajepa",
        f"pipeline_tag: {task}",
        "tags: [audio, self-supervised-learning, JEPA]",
        *licence_lines(licence),
        "---",
        "",
    ]


def licence_lines(licence: str | None) -> list[str]:
    """Return the YAML lines of the licence: licences listed by the hub by short name, others as `other` with a name."""
    if licence is None:
        return []
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        return [f"license: {licence}"]
    return ["license: other", f"license_name: {json.dumps(licence)}"]


def prediction_lines(model: PretrainedEncoder) -> list[str]:
    """Return the lines about the classes of a fine-tuned model, with an example in Python; none without a head."""
    if model.head is None:
        return []
    names = model.head.class_names
    shown = ", ".join(names[:SHOWN_CLASSES]) + (" ..." if len(names) > SHOWN_CLASSES else "")
    meaning = "they sum to 1" if model.head.activation == SOFTMAX else "each class by itself"
    return [
        f"This model scores {len(names)} classes: {shown}. Scores are in [0, 1] ({model.head.activation}: {meaning}).",
        "",
        "```python",
        "import ajepa",
        "",
        'model = ajepa.load("THIS FOLDER OR ORG/NAME")',
        'predictions = model.predict(["a.mp3", "b.wav"])',
        "predictions.top(3)                      # [[(class, score), ...], ...]",
        f"predictions.scores_BC                   # float32 [2, {len(names)}], in the order of model.class_names",
        'model.predict("long.wav", hop_seconds=1)[0].spans_W2  # seconds; scores_WC beside them',
        "```",
        "",
        "On the command line: `ajepa-train predict sounds/ --model THIS-FOLDER --out classes.csv`. Its encoder alone:",
        "",
    ]


def usage_lines(model: PretrainedEncoder) -> list[str]:
    """Return the lines about input and output, with an example in Python."""
    mel = model.mel
    features = resolve_features(model.spec, model.features)
    width = features.width(model.spec)
    frame_width = vector_width(column_pooling(features.pooling), features.layer, model.spec)
    column_ms = model.spec.grid.patch_frames * mel.hop_samples / mel.sample_rate_hz * 1e3
    return [
        f"This encoder turns a sound of any length and rate into one vector, and into one every {column_ms:g} ms:",
        "",
        "```python",
        "import ajepa",
        "",
        'model = ajepa.load("THIS FOLDER OR ORG/NAME")',
        'sounds = model.embed(["a.mp3", "b.wav"])',
        f"sounds.clips_BD         # float32 [2, {width}]",
        f"sounds[0].frames_TD     # float32 [T, {frame_width}]",
        "sounds[0].times_ms_T    # centres, ms",
        "```",
        "",
        f"Vectors of `ajepa.load` are {features.description}; its `pooling=` and `layer=` take others. A graph (ONNX, "
        "torch.export) has its own, which its table below names.",
        "",
        f"{WEIGHTS_FILE} needs this package; without it use the ONNX file or the torch program "
        "(`ajepa-train export MODEL --out FOLDER --onnx NAME.onnx --torch-export NAME.pt2`).",
        "",
    ]


def encoder_facts(model: PretrainedEncoder) -> Json:
    """Return the facts about the shape of the network, as text."""
    spec = model.spec
    grid = spec.grid
    return {
        "encoder": f"ViT, width {spec.width}, depth {spec.depth}, heads {spec.heads}, {spec.positions} positions",
        "patches": f"{grid.patch_frames} frames x {grid.patch_bands} bands, "
        f"{grid.cols} columns x {grid.rows} rows",
    }


def run_lines(run: Path, step: int) -> list[str]:
    """Return the lines about the cost of a run and the scores of its checkpoint at `step`, from the run's files."""
    lines = []
    if (run / COMPUTE_FILE).is_file():
        lines += card_section("Compute", json.loads((run / COMPUTE_FILE).read_text()))
    for file in sorted(run.glob(EVALUATION_GLOB)):
        evaluation = json.loads(file.read_text())

        # Scores of another checkpoint do not describe this model.
        if evaluation.get("protocol", {}).get("step") == step:
            lines += evaluation_lines(file.name, evaluation)
    return lines


def evaluation_lines(name: str, evaluation: Json) -> list[str]:
    """Return a table with one row per score of an evaluation, then the protocol of the evaluation."""
    # Scores may have different columns: the table has the columns of all scores.
    rows = [score_cells(score) for score in evaluation.get("scores", ())]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"## Scores ({name})", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [row.get(key, "") for key in columns]
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return [*lines, "", *card_section(f"Protocol ({name})", evaluation.get("protocol", {}))]


def score_cells(score: Json) -> Json:
    """Return the values of a score that fit a table row: plain values, and each metric with its interval."""
    cells = {key: value for key, value in score.items() if isinstance(value, str | int | float)}
    for name, metric in score.get("metrics", {}).items():
        cells[name] = f"{metric['value']:.4g} ({metric['low']:.4g} to {metric['high']:.4g})"
    return cells


def card_section(title: str, facts: Json) -> list[str]:
    """Return a heading and a table of facts; nested values are named by their paths. Empty if there are no facts."""
    if not facts:
        return []
    rows = [f"| {key} | {value} |" for key, value in flatten_to_paths(facts).items()]
    return [f"## {title}", "", "| | |", "| --- | --- |", *rows, ""]
