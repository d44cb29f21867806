"""Every option of every command: one typed field with a docstring is the option.

The command line, the TOML file (``--config run.toml``), the saved ``config.toml`` and the
documentation are all made from these classes. Option names are the field names with dashes.
The groups that commands share are in `aam.option_groups`; reading and writing is in
`aam.option_files`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from aam.errors import InputError
from aam.option_files import (
    check_limits,
    from_dict,
    leaves,
    merge,
    read_toml,
    to_dict,
    write_toml,
)
from aam.option_groups import (
    BestMetric,
    CategoricalOptions,
    DistanceMetric,
    DistanceOptions,
    FinetunePenaltyOptions,
    MetadataOptions,
    ModelOptions,
    NucleotideOptions,
    OptimizerOptions,
    OptionalTableOptions,
    PenaltyOptions,
    RunOptions,
    TableOptions,
    TargetOptions,
    TargetTransform,
)


@dataclass(kw_only=True)
class PretrainConfig:
    """Learn a tree's clades (or distances between samples) and masked nucleotides."""

    command: ClassVar[str] = "pretrain"
    data: OptionalTableOptions
    distances: DistanceOptions = field(default_factory=DistanceOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    losses: PenaltyOptions = field(default_factory=PenaltyOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions


@dataclass(kw_only=True)
class FinetuneConfig:
    """Train a predictor of a metadata column, from a pretrained encoder or from scratch."""

    command: ClassVar[str] = "finetune"
    data: TableOptions
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    target: TargetOptions
    pretrained_encoder: Path | None = None
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


@dataclass(kw_only=True)
class PredictConfig:
    """Predict with a fine-tuned model: in the target's units, or class names and probabilities."""

    command: ClassVar[str] = "predict"
    model: Path
    """Run folder of `finetune`."""
    table: Path
    """Feature table."""
    output: Path
    """Tab-separated predictions, first column sample-id."""
    metadata: Path | None = None
    """Sample metadata, if the model uses categorical columns."""
    sequences: Path | None = None
    """FASTA or .qza that maps hashed feature ids to their sequences."""
    rarefy_depth: int | None = None
    """As in training if not given; 0: use the counts as they are."""
    batch_size: int = 32
    """Samples a step."""
    allow_missing: bool = False
    """Treat samples without metadata as unknown in every categorical column."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    attn_implementation: Literal["auto", "math", "sdpa", "triton", "cpu"] = "auto"
    """Attention kernels; an explicit choice never falls back."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Measure a run (pretrained or fine-tuned) on samples with known truth."""

    command: ClassVar[str] = "evaluate"
    model: Path
    """Run folder of `pretrain` or `finetune`."""
    table: Path
    """Feature table."""
    metadata: Path | None = None
    """Sample metadata (needed for a fine-tuned model)."""
    tree: Path | None = None
    """Newick tree with all of the table's features: the truth about a pretrained model."""
    unifrac_matrix: Path | None = None
    """Precomputed unweighted distances instead of a tree."""
    unifrac_matrix_ids: Path | None = None
    """Sample ids of a .npy matrix, one a line, in its order."""
    drop_missing_tips: bool = False
    """Drop features that are not in the tree; they are counted."""
    group_column: str | None = None
    """Metadata column; Mantel r is then also given for pairs of different groups."""
    sequences: Path | None = None
    """FASTA or .qza that maps hashed feature ids to their sequences."""
    ids: Path | None = None
    """Samples to evaluate, one id a line; the run's validation samples if not given."""
    all_samples: bool = False
    """Evaluate every sample of the table."""
    rarefy_depth: int | None = None
    """As in training if not given; 0: use the counts as they are."""
    output: Path | None = None
    """Write the results as JSON."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    allow_missing: bool = False
    """Go on when some samples have no metadata or distance; what is dropped is counted."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    attn_implementation: Literal["auto", "math", "sdpa", "triton", "cpu"] = "auto"
    """Attention kernels; an explicit choice never falls back."""


@dataclass(kw_only=True)
class InspectConfig:
    """Dry run: what is in the files, how ids match, lengths, classes, shared ASVs, step cost."""

    command: ClassVar[str] = "inspect"
    data: TableOptions
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    metadata_column: str | None = None
    """Metadata column to predict."""
    distances: DistanceOptions = field(default_factory=DistanceOptions)
    model: Path | None = None
    """Run folder of `pretrain` or `finetune`: how much of the table it knows."""
    batch_size: int | None = None
    """Samples a step: 8, or, where a memory option is given, as many as fit."""
    max_memory_gb: float | None = None
    """Memory to plan for, GB (10^9 bytes)."""
    max_memory_fraction: float | None = None
    """The same as a share of what is free."""
    seed: int = 0
    """Seed of the split and of rarefaction."""


@dataclass(kw_only=True)
class UnifracConfig:
    """UniFrac distances between all samples of a table, by a tree or by a pretrained model."""

    command: ClassVar[str] = "unifrac"
    table: Path
    """Feature table."""
    tree: Path | None = None
    """Newick tree with all of the table's features."""
    model: Path | None = None
    """Run folder of `pretrain` instead of a tree; it places features that are in no tree."""
    output: Path
    """.h5 (as ssu writes it) or .tsv."""
    metric: DistanceMetric = "unweighted"
    """faith-pd writes one value a sample (.tsv)."""
    sequences: Path | None = None
    """FASTA or .qza that maps hashed feature ids to their sequences."""
    rarefy_depth: int = 0
    """Reads a sample is rarefied to; 0: use the counts as they are."""
    seed: int = 0
    """Seed of the rarefaction."""
    drop_missing_tips: bool = False
    """Drop features that are not in the tree; they are counted."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N, with --model."""


@dataclass(kw_only=True)
class EmbedConfig:
    """One vector a sample (or an ASV) by a pretrained model; no tree is needed."""

    command: ClassVar[str] = "embed"
    model: Path
    """Run folder of `pretrain` with a tree."""
    table: Path
    """Feature table."""
    output: Path
    """.tsv or .npz."""
    dimensions: int | None = None
    """Numbers a sample, beside its Faith PD: half of them clades projected, half a sketch of the
    pendant branches. As many as pretraining fitted if not given."""
    asvs: bool = False
    """Write the ASVs instead: vector, nearest known ASV, its distance, support of the clades."""
    sequences: Path | None = None
    """FASTA or .qza that maps hashed feature ids to their sequences."""
    rarefy_depth: int = 0
    """Reads a sample is rarefied to; 0: use the counts as they are."""
    seed: int = 0
    """Seed of the rarefaction."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    attn_implementation: Literal["auto", "math", "sdpa", "triton", "cpu"] = "auto"
    """Attention kernels; an explicit choice never falls back."""


@dataclass(kw_only=True)
class DemoConfig:
    """Make a small community, pretrain, fine-tune, predict and write a report."""

    command: ClassVar[str] = "demo"
    output_dir: Path = Path("runs/demo")
    """Folder of the demo; an earlier demo there is replaced."""
    samples: int = 240
    """Samples of the simulated community."""
    pretrain_epochs: int = 60
    """Passes of pretraining over the known ASVs."""
    finetune_steps: int = 360
    """Steps of fine-tuning."""
    seed: int = 0
    """Seed of everything."""


Config = (
    PretrainConfig
    | FinetuneConfig
    | PredictConfig
    | EvaluateConfig
    | InspectConfig
    | UnifracConfig
    | EmbedConfig
    | DemoConfig
)


def check(config: Config) -> None:
    """Check what can be checked of options without reading a file.

    Raises:
        InputError: names the option, its value and what is allowed.
    """
    check_limits(config)
    model = getattr(config, "model", None)
    if isinstance(model, ModelOptions) and model.embedding_dim % model.num_heads:
        raise InputError(
            f"--embedding-dim {model.embedding_dim}: expected a multiple of --num-heads "
            f"{model.num_heads}"
        )


__all__ = [
    "BestMetric", "CategoricalOptions", "Config", "DemoConfig", "DistanceMetric",
    "DistanceOptions", "EmbedConfig", "EvaluateConfig", "FinetuneConfig", "FinetunePenaltyOptions",
    "InspectConfig", "MetadataOptions", "ModelOptions", "NucleotideOptions",
    "OptimizerOptions", "OptionalTableOptions", "PenaltyOptions",
    "PredictConfig", "PretrainConfig", "RunOptions", "TableOptions", "TargetOptions",
    "TargetTransform", "UnifracConfig", "check", "from_dict", "leaves", "merge", "read_toml",
    "to_dict", "write_toml",
]  # fmt: skip
