"""Options that several commands share, in groups; a typed field with a docstring is an option."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DistanceMetric = Literal["unweighted", "weighted", "weighted-normalized", "faith-pd"]
TargetTransform = Literal["none", "minmax", "zscore", "zscore-category", "log-minmax", "log-zscore"]
TableDistance = Literal["bray-curtis", "jaccard", "aitchison"]
BestMetric = Literal[
    "loss", "unifrac_loss", "clade_loss", "clade_jaccard", "mantel_r", "distance_mae",
    "nucleotide_loss", "nucleotide_accuracy",
    "target_loss", "r2", "mae", "accuracy", "balanced_accuracy", "auc",
]  # fmt: skip


@dataclass(kw_only=True)
class TableOptions:
    """The feature table and what becomes of it before training."""

    table: Path
    """Feature table: BIOM 2.1 or 1.0, .qza or .tsv. Feature ids are the DNA sequences."""
    sequences: Path | None = None
    """FASTA or .qza that maps hashed feature ids to their sequences."""
    rarefy_depth: int = 5000
    """Reads a sample is rarefied to, without replacement; smaller samples are dropped and
    counted. 0: use the counts as they are."""
    max_bp: int = 150
    """Longest sequence; what is cut is counted."""
    token_limit: int = 1024
    """Most ASVs of one sample; what is left out is counted."""
    asv_sampling: Literal["abundance", "first", "random"] = "abundance"
    """Which ASVs a sample with more than the limit keeps."""
    allow_missing: bool = False
    """Go on when some samples have no metadata or distance; what is dropped is counted."""
    on_disk: Literal["auto", "always", "never"] = "auto"
    """Keep the counts and sequences in an index on disk, built once, instead of in memory; auto:
    large HDF5 tables only."""
    index_dir: Path | None = None
    """Folder of that index; beside the table if not given."""


@dataclass(kw_only=True)
class OptionalTableOptions(TableOptions):
    """The feature table and what becomes of it before training."""

    table: Path | None = None  # type: ignore[assignment]  # wider than the base's on purpose
    """Feature table: BIOM 2.1 or 1.0, .qza or .tsv. Feature ids are the DNA sequences. Without
    one, --sequences and --tree teach alone: a FASTA (or .qza) whose ids are tips of the tree."""


@dataclass(kw_only=True)
class DistanceOptions:
    """What teaches: a tree, or distances between samples."""

    tree: Path | None = None
    """Newick tree whose tips are the table's features (or their ids)."""
    unifrac_matrix: Path | None = None
    """Precomputed distances (.h5 of ssu, .tsv, or .npy with ids) instead of a tree."""
    unifrac_matrix_ids: Path | None = None
    """Sample ids of a .npy matrix, one a line, in its order."""
    distance: TableDistance | None = None
    """Distances of the table itself instead of a tree."""
    drop_missing_tips: bool = False
    """Drop features that are not in the tree; they are counted."""


@dataclass(kw_only=True)
class MetadataOptions:
    """Sample metadata and the parts it is split into."""

    metadata: Path | None = None
    """Sample metadata, tab separated, by QIIME 2's rules."""
    group_column: str | None = None
    """Metadata column (for example the subject) whose values never cross the split."""
    validation_fraction: float = 0.2
    """Share of the samples held out for validation."""
    train_ids: Path | None = None
    """Samples to train on, one id a line, instead of a drawn split."""
    validation_ids: Path | None = None
    """Samples to validate on, one id a line; with --train-ids the rest of the table is unused."""


@dataclass(kw_only=True)
class ModelOptions:
    """The shape of the encoder."""

    encoder: Literal["transformer", "wide"] = "transformer"
    """transformer: a wide path that a transformer joins; wide: the wide path alone, which is
    trained in a fraction of the time, for those who only want UniFrac."""
    embedding_dim: int = 128
    """Width of an ASV's vector and of every stack."""
    wide_dim: int = 512
    """Width of the wide path."""
    num_heads: int = 4
    """Attention heads."""
    num_layers: int = 2
    """Layers of each stack (nucleotides, samples, target, counts)."""
    ffn_dim: int | None = None
    """Width of the feed-forward part; 4 x embedding-dim if not given."""
    dropout: float = 0.1
    """Dropout of the stacks; none where distances between samples are computed."""


@dataclass(kw_only=True)
class CategoricalOptions:
    """Categorical covariates."""

    categorical_columns: tuple[str, ...] = ()
    """Metadata columns whose values the predictor is told."""
    categorical_embed_dim: int = 16
    """Width of each column's embedding."""
    categorical_fusion: Literal["concat", "add"] = "concat"
    """concat: W[h; c] at every position; add: h + Wc."""


@dataclass(kw_only=True)
class TargetOptions:
    """What is predicted, and how."""

    metadata_column: str
    """Metadata column to predict."""
    task: Literal["auto", "regression", "classification"] = "auto"
    """auto: classification if the column holds text."""
    target_transform: TargetTransform = "zscore"
    """Transform of a numeric target, fitted on the training part and inverted in predictions."""
    target_loss: Literal["smooth-l1", "mse", "mae", "quantile", "asymmetric"] = "smooth-l1"
    """Loss of a numeric target."""
    quantile: float = 0.5
    """Level of the quantile loss; weight of under-prediction in the asymmetric loss."""
    class_weights: bool = False
    """Weight classes by the inverse of their frequency."""
    target_head: Literal["linear", "mlp", "linear+mlp"] = "linear"
    """Last step from the pooled sample to the prediction."""


@dataclass(kw_only=True)
class NucleotideOptions:
    """Masked nucleotides."""

    nucleotide_penalty: float = 1.0
    """Weight of the masked-nucleotide loss."""
    mask_strategy: Literal["random", "span"] = "random"
    """Mask single nucleotides, or runs of 3 to 5."""
    mask_probability: float = 0.15
    """Share of the nucleotides that is masked."""
    masked_share: float = 0.25
    """Share of a step's distinct ASVs of which nucleotides are masked."""


@dataclass(kw_only=True)
class PenaltyOptions(NucleotideOptions):
    """Weight of each loss in the total; a loss with weight 0 is not computed."""

    unifrac_penalty: float = 1.0
    """Weight of what the tree (memberships in its clades) or the distances teach."""


@dataclass(kw_only=True)
class FinetunePenaltyOptions(NucleotideOptions):
    """Weight of each loss in the total; a loss with weight 0 is not computed."""

    target_penalty: float = 1.0
    """Weight of the target's loss."""
    count_penalty: float = 0.0
    """Weight of the count loss: divergence of predicted from true relative abundances, in nats."""
    nucleotide_penalty: float = 0.0
    """Weight of the masked-nucleotide loss."""


@dataclass(kw_only=True)
class OptimizerOptions:
    """How weights are changed."""

    batch_size: int | None = None
    """Samples a step: 8, or, where a memory option is given, as many as fit; with a tree ASVs
    a step, about 16,384 nucleotides. With --effective-batch-size: most of one of its pieces."""
    effective_batch_size: int | None = None
    """Samples (with a tree ASVs) a step whatever the memory: it is computed in pieces that fit,
    and the loss and its gradient are exactly those of the whole."""
    max_memory_gb: float | None = None
    """Memory to fill, GB (10^9 bytes): of the device, or of the process on a CPU; for each
    device where there are several."""
    max_memory_fraction: float | None = None
    """The same as a share of what is free at the start; 0.85 if neither is given."""
    oversize: Literal["chunk", "error", "subsample"] = "chunk"
    """A sample too large for the memory is computed in pieces (exact), is an error, or keeps
    only the ASVs that fit."""
    epochs: int | None = None
    """Passes over the training samples, if not given 20 (finetune) or 40 (pretrain); with a tree
    over the training ASVs, as many as see 30 million nucleotides, but 3 to 60."""
    max_steps: int | None = None
    """End after this many steps, whatever the epochs say."""
    lr: float | None = None
    """Highest learning rate; if not given 6e-4 (finetune), 1e-3 (distances) or 4e-3 (a tree)."""
    weight_decay: float = 0.01
    """Decay of weight matrices (never of norms, biases and embeddings)."""
    warmup_fraction: float = 0.05
    """Share of the run in which the learning rate rises; a cosine follows."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    early_stopping: int = 0
    """End after this many validations without a better best-metric; 0: never."""
    best_metric: BestMetric | None = None
    """Validation metric that chooses the best checkpoint; by default clade_jaccard or
    mantel_r (pretrain), r2 or balanced_accuracy (finetune)."""
    validate_every: int | None = None
    """Epochs from one validation to the next: 1 if not given, with a tree a tenth of them."""


@dataclass(kw_only=True)
class RunOptions:
    """Where a run writes, and what it runs on."""

    output_dir: Path
    """Folder of the run."""
    overwrite: bool = False
    """Replace a run that is already there."""
    resume_from: Path | None = None
    """Folder of a run (or one of its checkpoints) to continue; auto: the run in --output-dir if
    there is one, else a new one (for jobs that are queued again)."""
    checkpoint_minutes: float = 10.0
    """Longest time between two checkpoints."""
    memory_profile: bool = False
    """Write what takes the memory of a step, as a table and a figure."""
    seed: int = 0
    """Seed of the split, rarefaction, initial weights, order and masks."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    devices: int = 1
    """Devices (processes on a CPU) of this machine that share every step."""
    data_parallel: bool = False
    """Use all GPUs of this machine."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What several devices hold: all of the model, or a part of its weights each."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Precision of the model's products; weights, sums and the optimizer stay in 32 bits."""
    tf32: bool = False
    """Let NVIDIA and AMD devices round the factors of float32 products to 19 bits."""
    attn_implementation: Literal["auto", "math", "sdpa", "triton", "cpu"] = "auto"
    """Attention kernels; an explicit choice never falls back."""
    gradient_checkpointing: bool = True
    """Keep only each layer's input for the backward pass and recompute the rest."""
    compile_model: bool = False
    """Compile the model with torch.compile."""
    tensorboard: bool = True
    """Write TensorBoard logs beside metrics.csv."""
    config: Path | None = None
    """TOML file with any of these options; the command line wins over it."""
