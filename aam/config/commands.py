"""The options of each command: its own, and groups that it shares with others."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from aam.config import groups
from aam.config.options import Options, check, from_dict
from aam.errors import InputError


class PretrainConfig(Options):
    """Options of `aam pretrain`."""

    command: ClassVar[str] = "pretrain"
    data: groups.OptionalTableOptions
    distances: groups.DistanceOptions = field(default_factory=groups.DistanceOptions)
    metadata: groups.MetadataOptions = field(default_factory=groups.MetadataOptions)
    model: groups.ModelOptions = field(default_factory=groups.ModelOptions)
    losses: groups.PenaltyOptions = field(default_factory=groups.PenaltyOptions)
    optimizer: groups.OptimizerOptions = field(default_factory=groups.OptimizerOptions)
    run: groups.RunOptions

    def check(self) -> None:
        """Refuse options that mean nothing together."""
        table, tree = self.data.table, self.distances.tree
        other = self.distances.unifrac_matrix or self.distances.distance
        problem = None
        if not (self.losses.unifrac_penalty or self.losses.nucleotide_penalty):
            problem = "--unifrac-penalty and --nucleotide-penalty are both 0: nothing to learn"
        elif tree and other:
            problem = (
                "give one of --tree, --unifrac-matrix and --distance: what samples are compared by"
            )
        elif not table and (other or self.metadata.metadata):
            problem = "pretrain needs --table for --unifrac-matrix, --distance and --metadata"
        elif not table and not (tree and self.data.sequences):
            problem = (
                "pretrain needs --table, or --sequences with --tree to learn from a reference alone"
            )
        if problem:
            raise InputError(problem)


class FinetuneConfig(Options):
    """Options of `aam finetune`."""

    command: ClassVar[str] = "finetune"
    data: groups.TableOptions
    metadata: groups.MetadataOptions = field(default_factory=groups.MetadataOptions)
    target: groups.TargetOptions
    pretrained_encoder: groups.ModelFolder | None = None
    """Run folder of `pretrain`; its model options are taken over."""
    freeze_base: bool = False
    """Keep the encoder as it is; every distinct ASV is then encoded once for the whole run."""
    count_embedding: Literal["none", "add"] = "none"
    """How ln(count + 1) enters a sample's ASVs."""
    categorical: groups.CategoricalOptions = field(default_factory=groups.CategoricalOptions)
    model: groups.ModelOptions = field(default_factory=groups.ModelOptions)
    losses: groups.FinetunePenaltyOptions = field(default_factory=groups.FinetunePenaltyOptions)
    optimizer: groups.OptimizerOptions = field(default_factory=groups.OptimizerOptions)
    run: groups.RunOptions

    def check(self) -> None:
        """Refuse options that mean nothing together."""
        column, columns = self.target.metadata_column, self.categorical.categorical_columns
        problem = None
        if self.metadata.metadata is None:
            problem = "finetune needs --metadata, which holds the --metadata-column"
        elif self.freeze_base and not (self.pretrained_encoder or self.run.resume_from):
            problem = "--freeze-base needs --pretrained-encoder: a fresh encoder must train"
        elif self.freeze_base and self.losses.nucleotide_penalty:
            problem = "--freeze-base leaves nothing for --nucleotide-penalty to train"
        elif not self.losses.target_penalty:
            problem = "--target-penalty 0: nothing would learn to predict the column"
        elif column in columns:
            problem = f"--categorical-columns: {column!r} is the target itself"
        elif self.target.target_transform == "zscore-category" and not columns:
            problem = "--target-transform zscore-category needs --categorical-columns"
        if problem:
            raise InputError(problem)


class PredictConfig(groups.NewTableOptions, groups.DeviceOptions):
    """Options of `aam predict`."""

    command: ClassVar[str] = "predict"
    model: groups.ModelFolder
    """Run folder of `finetune`."""
    output: Path
    """Tab-separated predictions, first column sample-id."""
    metadata: groups.MetadataFile | None = None
    """Sample metadata, if the model uses categorical columns."""
    rarefy_depth: groups.Natural | None = None
    """As in training if not given; 0: use the counts as they are."""
    batch_size: groups.Count = 32
    """Samples a step."""
    allow_missing: bool = False
    """Treat samples without metadata as unknown in every categorical column."""
    overwrite: bool = False
    """Replace an output file that is already there."""


class EvaluateConfig(groups.NewTableOptions, groups.TruthOptions, groups.DeviceOptions):
    """Options of `aam evaluate`."""

    command: ClassVar[str] = "evaluate"
    model: groups.ModelFolder
    """Run folder of `pretrain` or `finetune`."""
    metadata: groups.MetadataFile | None = None
    """Sample metadata (needed for a fine-tuned model)."""
    group_column: str | None = None
    """Metadata column; Mantel r is then also given for pairs of different groups."""
    ids: groups.IdsFile | None = None
    """Samples to evaluate, one id a line; the run's validation samples if not given."""
    all_samples: bool = False
    """Evaluate every sample of the table."""
    rarefy_depth: groups.Natural | None = None
    """As in training if not given; 0: use the counts as they are."""
    output: Path | None = None
    """Write the results as JSON."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    allow_missing: bool = False
    """Go on when some samples have no metadata or distance; what is dropped is counted."""


class InspectConfig(Options):
    """Options of `aam inspect`."""

    command: ClassVar[str] = "inspect"
    data: groups.TableOptions
    metadata: groups.MetadataOptions = field(default_factory=groups.MetadataOptions)
    metadata_column: str | None = None
    """Metadata column to predict."""
    distances: groups.DistanceOptions = field(default_factory=groups.DistanceOptions)
    model: groups.ModelFolder | None = None
    """Run folder of `pretrain` or `finetune`: how much of the table it knows."""
    batch_size: groups.Count | None = None
    """Samples a step: 8, or, where a memory option is given, as many as fit."""
    max_memory_gb: groups.Positive | None = None
    """Memory to plan for, GB (10^9 bytes)."""
    max_memory_fraction: groups.Share | None = None
    """The same as a share of what is free."""
    seed: groups.Seed = 0
    """groups.Seed of the split and of rarefaction."""


class UnifracConfig(groups.NewTableOptions):
    """Options of `aam unifrac`."""

    command: ClassVar[str] = "unifrac"
    tree: groups.TreeFile | None = None
    """Newick tree with all of the table's features."""
    model: groups.ModelFolder | None = None
    """Run folder of `pretrain` instead of a tree; it places features that are in no tree."""
    output: Path
    """.h5 (as ssu writes it) or .tsv."""
    metric: Literal["unweighted", "weighted", "weighted-normalized", "faith-pd"] = "unweighted"
    """faith-pd writes one value a sample (.tsv)."""
    engine: Literal["builtin", "unifrac"] = "builtin"
    """What computes them: unifrac is the package of that name (a GPU's, where it finds one)."""
    rarefy_depth: groups.Natural = 0
    """Reads a sample is rarefied to; 0: use the counts as they are."""
    seed: groups.Seed = 0
    """groups.Seed of the rarefaction."""
    drop_missing_tips: bool = False
    """Drop features that are not in the tree; they are counted."""
    overwrite: bool = False
    """Replace an output file that is already there."""
    device: groups.Device = "auto"
    """auto, cpu, cuda or cuda:N, with --model."""

    def check(self) -> None:
        """Refuse options that mean nothing together."""
        if (self.tree is None) == (self.model is None):
            raise InputError("give either --tree or --model: what places the table's features")
        kinds = (".tsv",) if self.metric == "faith-pd" else (".h5", ".tsv")
        if self.output.suffix.lower() not in kinds:
            raise InputError(
                f"{self.output}: unknown extension {self.output.suffix!r} for {self.metric}; "
                f"write to {' or '.join(kinds)}"
            )


class EmbedConfig(groups.NewTableOptions, groups.DeviceOptions):
    """Options of `aam embed`."""

    command: ClassVar[str] = "embed"
    model: groups.ModelFolder
    """Run folder of `pretrain` with a tree."""
    output: Path
    """.tsv or .npz."""
    dimensions: groups.Count | None = None
    """Numbers a sample, half of clades, half of pendant branches; as pretraining fitted, if not."""
    asvs: bool = False
    """Write the ASVs instead: vector, nearest known ASV, its distance, support of the clades."""
    rarefy_depth: groups.Natural = 0
    """Reads a sample is rarefied to; 0: use the counts as they are."""
    seed: groups.Seed = 0
    """groups.Seed of the rarefaction."""
    overwrite: bool = False
    """Replace an output file that is already there."""

    def check(self) -> None:
        """Refuse options that mean nothing together."""
        if self.output.suffix.lower() not in (".tsv", ".npz"):
            raise InputError(f"{self.output}: write to .tsv or .npz")


class DemoConfig(Options):
    """Options of `aam demo`."""

    command: ClassVar[str] = "demo"
    output_dir: Path = Path("runs/demo")
    """Folder of the demo; an earlier demo there is replaced."""
    samples: Annotated[int, Field(ge=2)] = 240
    """Samples of the simulated community."""
    pretrain_epochs: groups.Count = 60
    """Passes of pretraining over the known ASVs."""
    finetune_steps: groups.Count = 360
    """Steps of fine-tuning."""
    seed: groups.Seed = 0
    """groups.Seed of everything."""


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
    check(config)
    return config
