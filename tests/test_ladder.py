"""The list of files is also the order of dependence."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LADDER = [
    "pipeline.errors",
    "pipeline.files",
    "pipeline.remote",
    "pipeline.melspec",
    "pipeline.mel",
    "pipeline.ontology",
    "pipeline.propagation",
    "pipeline.vocabularies",
    "pipeline.tally",
    "pipeline.manifest",
    "pipeline.labels",
    "pipeline.window",
    "pipeline.tar",
    "pipeline.parquet",
    "pipeline.hdf5",
    "pipeline.locators",
    "pipeline.corpus",
    "pipeline.containers",
    "pipeline.ffmpeg",
    "pipeline.decoders",
    "pipeline.audio",
    "pipeline.layouts",
    "pipeline.datasets.segments",
    "pipeline.datasets.audioset",
    "pipeline.datasets.listed",
    "pipeline.datasets.cutting",
    "pipeline.datasets.table",
    "pipeline.datasets.folder",
    "pipeline.datasets.esc50",
    "pipeline.datasets.speech_commands",
    "pipeline.datasets.fsd50k",
    "pipeline.datasets.demo_sounds",
    "pipeline.datasets.demo_files",
    "pipeline.datasets.demo_recordings",
    "pipeline.datasets.demo_clips",
    "pipeline.datasets.demo_debian",
    "pipeline.datasets.demo_broken",
    "pipeline.datasets.demo_lists",
    "pipeline.datasets.demo",
    "pipeline.datasets.catalogue",
    "pipeline.label_inputs",
    "pipeline.label_tables",
    "pipeline.shards",
    "pipeline.tables",
    "pipeline.header",
    "pipeline.exclusions",
    "pipeline.ledger",
    "pipeline.mirror",
    "pipeline.cache",
    "pipeline.reading",
    "pipeline.store",
    "pipeline.shardmaker",
    "pipeline.engines",
    "pipeline.cluster",
    "pipeline.blocks",
    "pipeline.finalise",
    "pipeline.upkeep",
    "pipeline.build",
    "pipeline.forecast",
    "pipeline.on_the_fly",
    "pipeline.parity",
    "pipeline.verify",
    "pipeline.repair",
    "pipeline.sampling",
    "pipeline.order",
    "pipeline.mixing",
    "pipeline.holdout",
    "pipeline.joined",
    "pipeline.weights",
    "pipeline.augment",
    "pipeline.loader",
    "pipeline.readahead",
    "pipeline.dali",
    "pipeline.pace",
    "pipeline.report",
    "pipeline.audit_copies",
    "pipeline.audit_implied",
    "pipeline.audit_pairs",
    "pipeline.audit_rows",
    "pipeline.audit",
    "pipeline.audit_findings",
    "pipeline.audit_text",
    "pipeline.markup",
    "pipeline.pictures",
    "pipeline.charts",
    "pipeline.classes_page",
    "pipeline.audit_page",
    "pipeline.page",
    "pipeline.inspection",
    "pipeline.audit_exclude",
    "pipeline.audit_command",
    "pipeline.doctor",
    "pipeline.command_line",
    "pipeline.build_commands",
    "pipeline.store_commands",
    "pipeline.cli",
    "ajepa.patches",
    "ajepa.masking",
    "ajepa.schedules",
    "ajepa.curriculum",
    "ajepa.attention",
    "ajepa.blocks",
    "ajepa.vit",
    "ajepa.pooling",
    "ajepa.jepa",
    "ajepa.ranking",
    "ajepa.metrics",
    "ajepa.bootstrap",
    "ajepa.optimiser",
    "ajepa.recipes",
    "ajepa.overrides",
    "ajepa.memory",
    "ajepa.listing",
    "ajepa.run",
    "ajepa.training_set",
    "ajepa.devices",
    "ajepa.loop",
    "ajepa.pretrain",
    "ajepa.features",
    "ajepa.partition",
    "ajepa.probes",
    "ajepa.attentive",
    "ajepa.evaluation",
    "ajepa.evaluate",
    "ajepa.doctor",
    "ajepa.mask_picture",
    "ajepa.report",
    "ajepa.cli",
]


def file_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def imports_of(module: str) -> set[str]:
    """Every module of the project that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", LADDER)
def test_a_module_imports_only_from_the_rungs_above_it(module):
    """Who reads a file needs to know only the files before it."""
    assert imports_of(module) & set(LADDER) <= set(LADDER[: LADDER.index(module)])


def test_every_file_has_its_rung():
    """A file that is not listed would be held to nothing."""
    there = {p for package in ("pipeline", "ajepa") for p in (ROOT / package).rglob("*.py")}
    assert {file_of(module) for module in LADDER} == {path for path in there if path.name != "__init__.py"}


@pytest.mark.parametrize("module", LADDER)
def test_a_file_can_be_held_in_the_head(module):
    """Three hundred lines at most (the style's limit)."""
    assert len(file_of(module).read_text().splitlines()) <= 300
