"""Every option of every command: one typed field with a docstring is the option.

The command line, the TOML file (``--config run.toml``), the saved ``config.toml``, the keywords of
`aam.pretrain` and the documentation are all made from these classes. Option names are the field
names, with dashes on the command line.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from aam.config.groups import (
    STRICT,
    CategoricalOptions,
    Count,
    Device,
    DeviceOptions,
    DistanceOptions,
    FinetunePenaltyOptions,
    IdsFile,
    MetadataFile,
    MetadataOptions,
    ModelFolder,
    ModelOptions,
    Natural,
    NewTableOptions,
    NucleotideOptions,
    OptimizerOptions,
    OptionalTableOptions,
    PenaltyOptions,
    Positive,
    RunOptions,
    Seed,
    Share,
    TableOptions,
    TargetOptions,
    TreeFile,
    TruthOptions,
)
from aam.config.options import (
    flag,
    from_dict,
    nearest,
    options_of,
    read_toml,
    to_dict,
    write_toml,
)
from aam.files import check_file_output, check_input, check_run_output, model_file

__all__ = [
    "COMMON", "CONFIGS", "CategoricalOptions", "DemoConfig", "DeviceOptions", "DistanceOptions",
    "EmbedConfig", "EvaluateConfig", "FinetuneConfig", "FinetunePenaltyOptions", "InspectConfig",
    "MetadataOptions", "ModelOptions", "NucleotideOptions", "OptimizerOptions",
    "OptionalTableOptions", "PenaltyOptions", "PredictConfig", "PretrainConfig", "RunOptions",
    "TableOptions", "TargetOptions", "UnifracConfig", "check_paths", "flag", "from_dict",
    "from_options", "nearest", "options_of", "read_toml", "to_dict", "write_toml",
]  # fmt: skip

# Options that `aam COMMAND --help` shows first, in this order, with those that are required.
COMMON = (
    "table", "sequences", "tree", "metadata", "metadata_column", "model", "pretrained_encoder",
    "output", "output_dir", "overwrite", "resume_from", "config", "metric", "group_column",
    "categorical_columns", "rarefy_depth", "allow_missing", "freeze_base", "encoder", "epochs",
    "batch_size", "max_memory_gb", "lr", "seed", "device", "devices", "precision",
)  # fmt: skip


@dataclass(kw_only=True, config=STRICT)
class PretrainConfig:
    """Options of `aam pretrain`."""

    command: ClassVar[str] = "pretrain"
    data: OptionalTableOptions
    distances: DistanceOptions = field(default_factory=DistanceOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    losses: PenaltyOptions = field(default_factory=PenaltyOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions


@dataclass(kw_only=True, config=STRICT)
class FinetuneConfig:
    """Options of `aam finetune`."""

    command: ClassVar[str] = "finetune"
    data: TableOptions
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    target: TargetOptions
    pretrained_encoder: ModelFolder | None = None
    """Run folder of `pretrain`; its model options are taken over."""
    freeze_base: bool = False
    """Keep the encoder as it is; every distinct ASV is then encoded once for the whole run."""
    count_embedding: Literal["none", "add"] = "none"
    """How ln(count + 1) enters a sample's ASVs."""
    categorical: CategoricalOptions = field(default_factory=CategoricalOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    losses: FinetunePenaltyOptions = field(default_factory=FinetunePenaltyOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions


@dataclass(kw_only=True, config=STRICT)
class PredictConfig(NewTableOptions, DeviceOptions):
    """Options of `aam predict`."""

    command: ClassVar[str] = "predict"
    model: ModelFolder
    """Run folder of `finetune`."""
    output: Path
    """Tab-separated predictions, first column sample-id."""
    metadata: MetadataFile | None = None
    """Sample metadata, if the model uses categorical columns."""
    rarefy_depth: Natural | None = None
    """As in training if not given; 0: use the counts as they are."""
    batch_size: Count = 32
    """Samples a step."""
    allow_missing: bool = False
    """Treat samples without metadata as unknown in every categorical column."""
    overwrite: bool = False
    """Replace an output file that is already there."""


@dataclass(kw_only=True, config=STRICT)
class EvaluateConfig(NewTableOptions, TruthOptions, DeviceOptions):
    """Options of `aam evaluate`."""

    command: ClassVar[str] = "evaluate"
    model: ModelFolder
    """Run folder of `pretrain` or `finetune`."""
    metadata: MetadataFile | None = None
    """Sample metadata (needed for a fine-tuned model)."""
    group_column: str | None = None
    """Metadata column; Mantel r is then also given for pairs of different groups."""
    ids: IdsFile | None = None
    """Samples to evaluate, one id a line; the run's validation samples if not given."""
    all_samples: bool = False
    """Evaluate every sample of the table."""
    rarefy_depth: Natural | None = None
    """As in training if not given; 0: use the counts as they are."""
    output: Path | None = None
    """Write the results as JSON."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    allow_missing: bool = False
    """Go on when some samples have no metadata or distance; what is dropped is counted."""


@dataclass(kw_only=True, config=STRICT)
class InspectConfig:
    """Options of `aam inspect`."""

    command: ClassVar[str] = "inspect"
    data: TableOptions
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    metadata_column: str | None = None
    """Metadata column to predict."""
    distances: DistanceOptions = field(default_factory=DistanceOptions)
    model: ModelFolder | None = None
    """Run folder of `pretrain` or `finetune`: how much of the table it knows."""
    batch_size: Count | None = None
    """Samples a step: 8, or, where a memory option is given, as many as fit."""
    max_memory_gb: Positive | None = None
    """Memory to plan for, GB (10^9 bytes)."""
    max_memory_fraction: Share | None = None
    """The same as a share of what is free."""
    seed: Seed = 0
    """Seed of the split and of rarefaction."""


@dataclass(kw_only=True, config=STRICT)
class UnifracConfig(NewTableOptions):
    """Options of `aam unifrac`."""

    command: ClassVar[str] = "unifrac"
    tree: TreeFile | None = None
    """Newick tree with all of the table's features."""
    model: ModelFolder | None = None
    """Run folder of `pretrain` instead of a tree; it places features that are in no tree."""
    output: Path
    """.h5 (as ssu writes it) or .tsv."""
    metric: Literal["unweighted", "weighted", "weighted-normalized", "faith-pd"] = "unweighted"
    """faith-pd writes one value a sample (.tsv)."""
    engine: Literal["builtin", "unifrac"] = "builtin"
    """What computes them: unifrac is the package of that name (a GPU's, where it finds one)."""
    rarefy_depth: Natural = 0
    """Reads a sample is rarefied to; 0: use the counts as they are."""
    seed: Seed = 0
    """Seed of the rarefaction."""
    drop_missing_tips: bool = False
    """Drop features that are not in the tree; they are counted."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N, with --model."""


@dataclass(kw_only=True, config=STRICT)
class EmbedConfig(NewTableOptions, DeviceOptions):
    """Options of `aam embed`."""

    command: ClassVar[str] = "embed"
    model: ModelFolder
    """Run folder of `pretrain` with a tree."""
    output: Path
    """.tsv or .npz."""
    dimensions: Count | None = None
    """Numbers a sample, half of clades, half of pendant branches; as pretraining fitted, if not."""
    asvs: bool = False
    """Write the ASVs instead: vector, nearest known ASV, its distance, support of the clades."""
    rarefy_depth: Natural = 0
    """Reads a sample is rarefied to; 0: use the counts as they are."""
    seed: Seed = 0
    """Seed of the rarefaction."""
    overwrite: bool = False
    """Replace an output file that is already there."""


@dataclass(kw_only=True, config=STRICT)
class DemoConfig:
    """Options of `aam demo`."""

    command: ClassVar[str] = "demo"
    output_dir: Path = Path("runs/demo")
    """Folder of the demo; an earlier demo there is replaced."""
    samples: Annotated[int, Field(ge=2)] = 240
    """Samples of the simulated community."""
    pretrain_epochs: Count = 60
    """Passes of pretraining over the known ASVs."""
    finetune_steps: Count = 360
    """Steps of fine-tuning."""
    seed: Seed = 0
    """Seed of everything."""


CONFIGS: dict[str, Any] = {
    one.command: one
    for one in (
        PretrainConfig, FinetuneConfig, PredictConfig, EvaluateConfig, InspectConfig,
        UnifracConfig, EmbedConfig, DemoConfig,
    )
}  # fmt: skip


def from_options(command: str, **options: Any) -> Any:
    """Options of a command from keywords, with the names and checks of its command line.

    Raises:
        InputError: an option is unknown, missing or wrong, or a path cannot be used.
    """
    config = from_dict(CONFIGS[command], options, f"aam.{command}")
    check_paths(config)
    return config


def check_paths(config: Any) -> None:
    """Refuse, before anything is read, files that are not there and outputs that cannot be written.

    Raises:
        InputError: names the path, and what was expected.
    """
    run = getattr(config, "run", None)
    for option in options_of(type(config)).values():
        path = option.of(config)
        if path is not None and "file" in option.schema:
            check_input(path, option.schema["file"])
        # A checkpoint has the weights of the encoder that a run began with.
        if path is not None and "model" in option.schema and not (run and run.resume_from):
            model_file(path)
    if run:
        check_run_output(run.output_dir, run.overwrite, run.resume_from)
    elif getattr(config, "output", None):
        check_file_output(config.output, config.overwrite)
