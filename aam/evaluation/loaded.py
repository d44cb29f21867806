"""A trained model as an object: predictions, vectors and distances of any table, as pandas frames.

A table is a path (.biom, .qza, .tsv), a `biom.Table` or a frame (samples x features). Its feature
ids are DNA, or `sequences` (FASTA or .qza) maps them to it.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from aam.config import OptionalTableOptions, from_dict
from aam.data.dataset import SampleDataset
from aam.data.embedding import Embedding
from aam.data.metadata import Metadata, read_metadata
from aam.data.neighbours import Found
from aam.data.samples import Samples, make_dataset, read_samples
from aam.data.table import FeatureTable
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import add_applicability, of_placed
from aam.evaluation.outputs import in_units, predict_outputs, prediction_frame
from aam.evaluation.placer import Placed, Placer, grafted_tree, require_places, unifrac_by_model
from aam.evaluation.unifrac import unifrac_frame
from aam.learning.device import pick_device
from aam.learning.model_file import read_model
from aam.learning.targets import TargetInfo
from aam.model import Predictor, PretrainedModel


def load(run: str | Path, device: str = "auto", attn_implementation: str = "auto") -> Model:
    """The model of a run's folder, on a device (auto, cpu, cuda or cuda:N)."""
    return Model(Path(run), device, attn_implementation)


class Model:
    """A trained model; `load` makes it."""

    def __init__(self, run: Path, device: str, attn_implementation: str) -> None:
        self.run, self.saved = run, read_model(run)
        self.network = self.saved.build(impl=attn_implementation)
        self.network.to(pick_device(device, attn_implementation))
        self.description = self.saved.description

    # ------------------------------------------------------------------- of a fine-tuned model
    def predict(
        self,
        table: Any,
        metadata: Any = None,
        *,
        sequences: str | Path | None = None,
        rarefy_depth: int | None = None,
        allow_missing: bool = False,
        batch_size: int = 32,
    ) -> Any:
        """Predictions, a frame of one row a sample.

        Args:
            table: it is treated as training treated its own.
            metadata: path or frame of sample metadata, where the model has categorical columns.
            sequences: see above.
            rarefy_depth: reads a sample; None: as in training, 0: counts as they are.
            allow_missing: treat samples without metadata as unknown in every categorical column.
            batch_size: samples computed at once.

        Returns:
            ``predicted``, in the target's units; of classes the name, and ``probability_NAME``.
        """
        if not isinstance(self.network, Predictor):
            raise InputError(
                f"{self.run}: holds a pretrained encoder; predict needs a run of finetune"
            )
        columns = ", ".join(map(repr, self.description["categories"]))
        if metadata is not None and not columns:
            log(f"{_name(metadata)}: not used, the model has no categorical columns")
            metadata = None
        samples = self.read(
            table, metadata, sequences=sequences, rarefy_depth=rarefy_depth,
            allow_missing=allow_missing, keep_unmatched=True,
        )  # fmt: skip
        if columns and metadata is None:
            samples.warnings.append(
                f"the model was trained with {columns}: without --metadata these are unknown, and "
                "predictions are less certain"
            )
        dataset, keys = self.dataset(samples)
        log_facts(samples.facts, samples.warnings)
        rows = np.arange(len(samples.ids))
        outputs = predict_outputs(self.network, dataset, rows, chunk=batch_size)
        return prediction_frame(in_units(outputs, self.target, keys), self.target, samples.ids)

    @property
    def target(self) -> TargetInfo:
        """The column that is predicted."""
        return TargetInfo.from_dict(self.description["target"])

    def read(
        self,
        table: Any,
        metadata: Any = None,
        *,
        rarefy_depth: int | None = None,
        keep_unmatched: bool = False,
        **options: Any,
    ) -> Samples:
        """Samples treated as in training, with facts on how much of them the model knows."""
        data = self.description["data"]
        depth = data["rarefy_depth"] if rarefy_depth is None else rarefy_depth
        samples = _read(
            table, data["seed"], _metadata(metadata), keep_unmatched, rarefy_depth=depth,
            asv_sampling=data["asv_sampling"], **options,
        )  # fmt: skip
        add_applicability(samples, self.saved)
        return samples

    def dataset(self, samples: Samples) -> tuple[SampleDataset, list[str] | None]:
        """Samples as tokens and categories, and what zscore-category knows them by."""
        classes, codes, keys = self.description.get("categories"), None, None
        if classes:
            codes = samples.category_codes(classes)
            if self.target.transform.by_category and samples.metadata is not None:
                keys = samples.category_keys(list(classes))
        options = SimpleNamespace(**self.description["data"])
        return make_dataset(samples, options, categories=codes), keys

    # --------------------------------------------------------- of a model that a tree has taught
    def embed(
        self,
        table: Any,
        asvs: bool = False,
        dimensions: int | None = None,
        *,
        sequences: str | Path | None = None,
        rarefy_depth: int = 0,
        seed: int = 0,
    ) -> Any:
        """Vectors, a frame of one row a sample, or a sequence.

        Args:
            table: counts as they are, or rarefied to `rarefy_depth` reads, drawn by `seed`.
            asvs: of ASVs: ``nearest`` (the known one), ``edits``, ``support`` and ``e0``, ...;
                else of samples: ``faith_pd`` and ``e0``, ...
            dimensions: of a sample's vector; None: as many as pretraining fitted.
            sequences: see above.
            rarefy_depth: 0: counts as they are.
            seed: of the rarefaction.
        """
        import pandas as pd

        if asvs and dimensions is not None:
            raise InputError(
                "--dimensions is for samples; with --asvs a vector is what the encoder has"
            )
        placer, embedding = self.placer, Embedding.from_arrays(self.saved.arrays)
        dimensions = embedding.most if dimensions is None else dimensions
        if dimensions > embedding.most:
            raise InputError(
                f"--dimensions {dimensions}: pretraining fitted {embedding.most}; ask for no more"
            )
        own, near, placed = self._place(table, sequences, rarefy_depth, seed)
        require_places(own, placed)
        if asvs:
            vectors = placer.vectors(own.feature_ids, placed.known, near)
            names = placer.clades.sequences
            known = [names[int(tip)] if tip >= 0 else "" for tip in placed.nearest]
            first = {"nearest": known, "edits": placed.distance, "support": placed.support}
            index = pd.Index(list(own.feature_ids), name="sequence")
        else:
            grafted = grafted_tree(placer.clades, placed, own.feature_ids)
            blocks = embedding.rows(own, placer.clades, grafted, dimensions)
            vectors, faith = (np.concatenate(part) for part in zip(*blocks, strict=True))
            first, index = {"faith_pd": faith}, pd.Index(own.sample_ids, name="sample-id")
        numbers = pd.DataFrame(vectors, index).add_prefix("e")
        return pd.concat([pd.DataFrame(first, index), numbers], axis=1)

    def unifrac(
        self,
        table: Any,
        metric: str = "unweighted",
        *,
        sequences: str | Path | None = None,
        rarefy_depth: int = 0,
        seed: int = 0,
        engine: str = "builtin",
    ) -> Any:
        """Distances of all samples, a square frame, or ``faith_pd`` of each; see `embed`.

        Args:
            table: its new ASVs are placed on the model's tree.
            metric: unweighted, weighted, weighted-normalized or faith-pd.
            sequences: see above.
            rarefy_depth: 0: counts as they are.
            seed: of the rarefaction.
            engine: builtin, or unifrac: the package of that name.
        """
        own, _, placed = self._place(table, sequences, rarefy_depth, seed)
        source = unifrac_by_model(own, self.placer.clades, placed)
        return unifrac_frame(own, source, metric, engine)

    @cached_property
    def placer(self) -> Placer:
        """Places ASVs on the tree that taught the model."""
        if not isinstance(self.network, PretrainedModel):
            raise InputError(
                f"{self.run}: is a run of finetune; give the folder of one of pretrain"
            )
        return Placer.of(self.saved, self.network)

    def _place(
        self, table: Any, sequences: str | Path | None, depth: int, seed: int
    ) -> tuple[FeatureTable, Found, Placed]:
        """A table, the neighbours of its new ASVs, and where all are placed."""
        placer = self.placer
        samples = _read(table, seed, sequences=sequences, rarefy_depth=depth)
        found = placer.find(samples.table.feature_ids)
        placed = placer.place(samples.table.feature_ids, found)
        facts, warnings = of_placed(samples.table, placed)
        log_facts(samples.facts + facts, warnings)
        return samples.table, found[1], placed


def _read(
    table: Any,
    seed: int,
    metadata: Metadata | None = None,
    keep_unmatched: bool = False,
    *,
    sequences: str | Path | None = None,
    **options: Any,
) -> Samples:
    """Samples of a file, or of a table in memory."""
    path = table if isinstance(table, (str, Path)) else None
    values = {"table": path, "sequences": sequences, **options}
    return read_samples(
        from_dict(OptionalTableOptions, values, "aam.load"),
        seed,
        table=None if path else table,
        metadata=metadata,
        keep_unmatched=keep_unmatched,
    )


def _metadata(source: Any) -> Metadata | None:
    """Metadata of a file, or of a frame whose index are sample ids, under the rules of the file."""
    if source is None or isinstance(source, (str, Path)):
        return None if source is None else read_metadata(source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.tsv"
        source.to_csv(path, sep="\t", index_label="sample-id")
        return replace(read_metadata(path), source=_name(source))


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the metadata"
