"""What the commands of ajepa-train share: their options, and the names that the tab key offers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.options import complete_from

# Repeated here because importing the modules that define these names would slow tab completion down; a test checks that
# both lists agree.
PRETRAIN_RECIPE_NAMES = (
    "smoke",
    "small",
    "base",
    "base-s",
    "audio-jepa",
    "audio-jepa-repo",
    "a-jepa",
    "a-jepa-s",
    "a-jepa-l",
)

FINETUNE_RECIPE_NAMES = (
    "audioset-20k",
    "audioset-2m",
    "esc50",
    "speech-commands-v2",
    "speech-commands-v1",
    "voxceleb1-sid",
    "fsd50k",
    "own",
    "own-small",
    "cnn6",
    "convnext",
    "passt",
    "cnn6-small",
    "vit-small",
    "passt-small",
)

TASK_NAMES = (
    "audioset",
    "esc50",
    "fsd50k",
    "speech-commands-v1",
    "speech-commands-v2",
    "voxceleb1-sid",
    "own",
)

CLASSIFIER_KIND_NAMES = ("vit", "cnn6", "convnext", "passt")

# What is read and written.
StoreOption = Annotated[str, typer.Option(help="Feature store, NAME.zarr or s3://...", show_default=False)]

RunOption = Annotated[Path, typer.Option(help="Run folder of pretrain or finetune.", show_default=False)]

NewRunOption = Annotated[Path, typer.Option(help="Run folder to make or carry on.", show_default=False)]

ModelOption = Annotated[
    str, typer.Option(help="Run, exported folder or file, or ORG/NAME of the hub.", show_default=False)
]

CheckpointOption = Annotated[
    str,
    typer.Option("--checkpoint", help="Checkpoint of a run: last, best (by probe), init, or a kept step."),
]

# How tokens become vectors.
PoolingOption = Annotated[
    Literal["mean", "frequency", "moments"] | None,
    typer.Option(
        help="frequency: each row of patches; moments: and its deviation over time. [default: the run's best]"
    ),
]

LayerOption = Annotated[
    str | None,
    typer.Option(
        help="last, mean-K or concat-K (the last K blocks), concat-all, block-N. [default: the run's best]"
    ),
]

# What is trained, and for how long.
PretrainRecipeOption = Annotated[
    str,
    typer.Option(help="Name in `ajepa-train recipes`.", autocompletion=complete_from(PRETRAIN_RECIPE_NAMES)),
]

SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Recipe field, schedule.peak_lr=1e-4; repeats."),
]

StepsOption = Annotated[int | None, typer.Option(min=1, help="Steps. [default: the recipe's]")]

EpochsOption = Annotated[int | None, typer.Option(min=1, help="Epochs. [default: the recipe's]")]

BatchOption = Annotated[
    int | None,
    typer.Option(min=1, help="Clips per step. [default: the recipe's]"),
]

# How a step is computed: the result is the same but for rounding.
MicroBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Clips at once: less memory. [default: all]")
]

DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]

PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(
        metavar="TYPE", help="fp32, bf16, fp16 (CUDA only), or auto: bf16 where the hardware has it."
    ),
]

LoaderOption = Annotated[Literal["dali", "plain"], typer.Option(help="plain: the same batches, slower.")]

RecomputeOption = Annotated[
    bool, typer.Option("--recompute", help="Less memory, up to a third slower, same results.")
]

# Where metrics go, beside the run and TensorBoard. Repeated here, as the names of recipes are.
METRIC_LOGGER_NAMES = ("wandb", "mlflow", "tensorboard")

LoggerOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="wandb, mlflow; repeats.", autocompletion=complete_from(METRIC_LOGGER_NAMES)
    ),
]

# What becomes of a clip that cannot be read.
OnBrokenOption = Annotated[Literal["raise", "skip"], typer.Option(help="skip: another takes its place.")]

# What becomes of a step whose loss or gradient is no number.
OnBadStepOption = Annotated[Literal["stop", "skip"], typer.Option(help="skip: counted, at most 100.")]

# The weights to begin with.
StartCheckpointOption = Annotated[
    str,
    typer.Option("--from-checkpoint", help="last, best, init, or a step."),
]
