"""Groups of options that commands share, and the types of their values.

One typed field with a docstring is one option; its limits stand in its type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from aam.config.options import Options
from aam.errors import InputError


def _field(pattern: str | None = None, **known: Any) -> Any:
    """What `aam.options` knows of a type: the kind of file, whether it is a model, its values."""
    return Field(pattern=pattern, json_schema_extra=known)


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63), _field(expected="a whole number, at least 0")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Level = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
TableFile = Annotated[Path, _field(file="a feature table (.biom, .qza or .tsv)")]
SequenceFile = Annotated[Path, _field(file="FASTA or .qza with the features' sequences")]
TreeFile = Annotated[Path, _field(file="a Newick tree (or .qza)")]
MatrixFile = Annotated[Path, _field(file="a distance matrix")]
MetadataFile = Annotated[Path, _field(file="sample metadata as TSV")]
IdsFile = Annotated[Path, _field(file="one id a line")]
ModelFolder = Annotated[Path, _field(model=True)]
Device = Annotated[str, _field(r"^(auto|cpu|cuda(:\d+)?)$", expected="auto, cpu, cuda or cuda:N")]
Metric = Literal[
    "loss", "unifrac_loss", "clade_loss", "clade_jaccard", "mantel_r", "distance_mae",
    "nucleotide_loss", "nucleotide_accuracy",
    "target_loss", "r2", "mae", "accuracy", "balanced_accuracy", "auc",
]  # fmt: skip


class NewTableOptions(Options):
    """A feature table."""

    table: TableFile
    """Feature table: BIOM 2.1 or 1.0, .qza or .tsv. Feature ids are the DNA sequences."""
    sequences: SequenceFile | None = None
    """FASTA or .qza that maps hashed feature ids to their sequences."""


class TableOptions(NewTableOptions):
    """The feature table and what becomes of it before training."""

    rarefy_depth: Natural = 5000
    """Reads drawn of each sample; smaller samples are dropped. 0: use the counts as they are."""
    max_bp: Count = 150
    """Longest sequence; what is cut is counted."""
    token_limit: Count = 1024
    """Most ASVs of one sample; what is left out is counted."""
    asv_sampling: Literal["abundance", "first", "random"] = "abundance"
    """Which ASVs a sample with more than the limit keeps."""
    allow_missing: bool = False
    """Go on when some samples have no metadata or distance; what is dropped is counted."""
    on_disk: Literal["auto", "always", "never"] = "auto"
    """Read counts and sequences from an index on disk, built once; auto: of large HDF5 tables."""
    index_dir: Path | None = None
    """Folder of that index; beside the table if not given."""


class OptionalTableOptions(TableOptions):
    """The feature table and what becomes of it before training."""

    table: TableFile | None = None  # type: ignore[assignment]  # wider than the base's on purpose
    """Feature table: BIOM 2.1 or 1.0, .qza or .tsv. Feature ids are the DNA sequences. Without
    one, --sequences and --tree teach alone: a FASTA (or .qza) whose ids are tips of the tree."""


class TruthOptions(Options):
    """True distances between samples."""

    tree: TreeFile | None = None
    """Newick tree whose tips are the table's features (or their ids)."""
    unifrac_matrix: MatrixFile | None = None
    """Precomputed distances (.h5 of ssu, .tsv, or .npy with ids) instead of a tree."""
    unifrac_matrix_ids: IdsFile | None = None
    """Sample ids of a .npy matrix, one a line, in its order."""
    drop_missing_tips: bool = False
    """Drop features that are not in the tree; they are counted."""


class DistanceOptions(TruthOptions):
    """What teaches: a tree, or distances between samples."""

    distance: Literal["bray-curtis", "jaccard", "aitchison"] | None = None
    """Distances of the table itself instead of a tree."""


class MetadataOptions(Options):
    """Sample metadata and the parts it is split into."""

    metadata: MetadataFile | None = None
    """Sample metadata, tab separated, by QIIME 2's rules."""
    group_column: str | None = None
    """Metadata column (for example the subject) whose values never cross the split."""
    validation_fraction: Level = 0.2
    """Share of the samples held out for validation."""
    train_ids: IdsFile | None = None
    """Samples to train on, one id a line, instead of a drawn split."""
    validation_ids: IdsFile | None = None
    """Samples to validate on, one id a line; with --train-ids the rest of the table is unused."""


class ModelOptions(Options):
    """The shape of the encoder."""

    encoder: Literal["transformer", "wide"] = "transformer"
    """transformer: a wide path that a transformer joins; wide: without it, for UniFrac alone."""
    embedding_dim: Count = 128
    """Width of an ASV's vector and of every stack."""
    wide_dim: Count = 512
    """Width of the wide path."""
    num_heads: Count = 4
    """Attention heads."""
    num_layers: Count = 2
    """Layers of each stack (nucleotides, samples, target, counts)."""
    ffn_dim: Count | None = None
    """Width of the feed-forward part; 4 x embedding-dim if not given."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout of the stacks; none where distances between samples are computed."""

    def __post_init__(self) -> None:
        dim, heads = self.embedding_dim, self.num_heads
        if dim % heads:
            raise InputError(f"--embedding-dim {dim}: expected a multiple of --num-heads {heads}")


class CategoricalOptions(Options):
    """Categorical covariates."""

    categorical_columns: tuple[str, ...] = ()
    """Metadata columns whose values the predictor is told."""
    categorical_embed_dim: Count = 16
    """Width of each column's embedding."""
    categorical_fusion: Literal["concat", "add"] = "concat"
    """concat: W[h; c] at every position; add: h + Wc."""


class TargetOptions(Options):
    """What is predicted, and how."""

    metadata_column: str
    """Metadata column to predict."""
    task: Literal["auto", "regression", "classification"] = "auto"
    """auto: classification if the column holds text."""
    target_transform: Literal[
        "none", "minmax", "zscore", "zscore-category", "log-minmax", "log-zscore"
    ] = "zscore"
    """Transform of a numeric target, fitted on the training part and inverted in predictions."""
    target_loss: Literal["smooth-l1", "mse", "mae", "quantile", "asymmetric"] = "smooth-l1"
    """Loss of a numeric target."""
    quantile: Level = 0.5
    """Level of the quantile loss; weight of under-prediction in the asymmetric loss."""
    class_weights: bool = False
    """Weight classes by the inverse of their frequency."""
    target_head: Literal["linear", "mlp", "linear+mlp"] = "linear"
    """Last step from the pooled sample to the prediction."""


class NucleotideOptions(Options):
    """Masked nucleotides."""

    nucleotide_penalty: Weight = 1.0
    """Weight of the masked-nucleotide loss."""
    mask_strategy: Literal["random", "span"] = "random"
    """Mask single nucleotides, or runs of 3 to 5."""
    mask_probability: Level = 0.15
    """Share of the nucleotides that is masked."""
    masked_share: Share = 0.25
    """Share of a step's distinct ASVs of which nucleotides are masked."""


class PenaltyOptions(NucleotideOptions):
    """Weight of each loss in the total; a loss with weight 0 is not computed."""

    unifrac_penalty: Weight = 1.0
    """Weight of what the tree (memberships in its clades) or the distances teach."""


class FinetunePenaltyOptions(NucleotideOptions):
    """Weight of each loss in the total; a loss with weight 0 is not computed."""

    nucleotide_penalty: Weight = 0.0
    target_penalty: Weight = 1.0
    """Weight of the target's loss."""
    count_penalty: Weight = 0.0
    """Weight of the count loss: divergence of predicted from true relative abundances, in nats."""


class OptimizerOptions(Options):
    """How weights are changed."""

    batch_size: Count | None = None
    """Samples a step: 8, or, where a memory option is given, as many as fit; with a tree ASVs
    a step, about 16,384 nucleotides. With --effective-batch-size: most of a micro-batch."""
    effective_batch_size: Annotated[int, Field(ge=2)] | None = None
    """Samples (with a tree ASVs) a step whatever the memory: computed in micro-batches, exactly."""
    max_memory_gb: Positive | None = None
    """Memory to fill, GB (10^9 bytes), of each device, or of the process on a CPU."""
    max_memory_fraction: Share | None = None
    """The same as a share of what is free at the start; 0.85 if neither is given."""
    oversize: Literal["chunk", "error", "subsample"] = "chunk"
    """A sample too large for memory: in micro-batches (exact), an error, or the ASVs that fit."""
    epochs: Count | None = None
    """Passes over the training samples, if not given 20 (finetune) or 40 (pretrain); with a tree
    over the training ASVs, as many as see 30 million nucleotides, but 3 to 60."""
    max_steps: Count | None = None
    """End after this many steps, whatever the epochs say."""
    lr: Positive | None = None
    """Highest learning rate; if not given 6e-4 (finetune), 1e-3 (distances) or 4e-3 (a tree)."""
    weight_decay: Weight = 0.01
    """Decay of weight matrices (never of norms, biases and embeddings)."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the run in which the learning rate rises; a cosine follows."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    early_stopping: Natural = 0
    """End after this many validations without a better best-metric; 0: never."""
    best_metric: Metric | None = None
    """Chooses the best checkpoint; clade_jaccard, mantel_r, r2 or balanced_accuracy by default."""
    validate_every: Count | None = None
    """Epochs from one validation to the next: 1 if not given, with a tree a tenth of them."""


class DeviceOptions(Options):
    """What a command computes on."""

    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    attn_implementation: Literal["auto", "math", "sdpa", "triton", "cpu"] = "auto"
    """Attention kernels; an explicit choice never falls back."""


class RunOptions(DeviceOptions):
    """Where a run writes, and what it runs on."""

    output_dir: Path
    """Folder of the run."""
    overwrite: bool = False
    """Replace a run that is already there."""
    resume_from: Path | None = None
    """Run folder or checkpoint to continue; auto: what is in --output-dir, if there is a run."""
    checkpoint_minutes: Positive = 10.0
    """Longest time between two checkpoints."""
    memory_profile: bool = False
    """Write what takes the memory of a step, as a table and a figure."""
    seed: Seed = 0
    """Seed of the split, rarefaction, initial weights, order and masks."""
    devices: Count = 1
    """Devices (processes on a CPU) of this machine that share every step."""
    data_parallel: bool = False
    """Use all GPUs of this machine."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What several devices hold: all of the model, or a part of its weights each."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Precision of the model's products; weights, sums and the optimizer stay in 32 bits."""
    tf32: bool = False
    """Let NVIDIA and AMD devices round the factors of float32 products to 19 bits."""
    gradient_checkpointing: bool = True
    """Keep only each layer's input for the backward pass and recompute the rest."""
    compile_model: bool = False
    """Compile the model with torch.compile."""
    tensorboard: bool = True
    """Write TensorBoard logs beside metrics.csv."""
    config: Path | None = None
    """TOML file with any of these options; the command line wins over it."""
