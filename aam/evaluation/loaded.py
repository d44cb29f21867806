"""A trained model as an object: predictions, vectors and distances of any table, as pandas frames.

A table is a path (.biom, .qza, .tsv), a `biom.Table` or a frame (samples x features) whose feature
ids are DNA. Options of tables: ``sequences`` (FASTA or .qza) maps hashed ids to DNA;
``rarefy_depth`` is the reads a sample is rarefied to, 0: none; ``on_disk`` and ``index_dir`` are
those of `aam pretrain`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from aam.config import OptionalTableOptions, from_dict
from aam.data.dataset import SampleDataset
from aam.data.embedding import Embedding
from aam.data.neighbours import Found
from aam.data.samples import Samples, read_samples
from aam.data.table import FeatureTable
from aam.errors import InputError, log, log_facts
from aam.evaluation.applicability import add_applicability, applicability
from aam.evaluation.outputs import in_units, predict_outputs, prediction_frame
from aam.evaluation.placer import Placed, Placer, require_places, sample_vectors, unifrac_by_model
from aam.evaluation.unifrac import unifrac_frame
from aam.learning.device import pick_device
from aam.learning.model_file import read_model
from aam.learning.targets import TargetInfo
from aam.model import Predictor, PretrainedModel

if TYPE_CHECKING:
    import pandas as pd


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

    def predict(
        self, table: Any, metadata: Any = None, *, batch_size: int = 32, **options: Any
    ) -> pd.DataFrame:
        """What a fine-tuned model predicts, a row a sample.

        ``predicted`` is in the target's units; of classes it is the name, and ``probability_NAME``
        follow. The table is treated as in training, also rarefied, unless `options` say otherwise:
        those of tables, and ``allow_missing``, with which samples without metadata are unknown in
        every categorical column. `metadata` is a path or a frame, for a model that has such
        columns; `batch_size` samples are computed at once.
        """
        if not isinstance(self.network, Predictor):
            raise InputError(
                f"{self.run}: holds a pretrained encoder; predict needs a run of finetune"
            )
        columns = ", ".join(map(repr, self.description["categories"]))
        if metadata is not None and not columns:
            name = metadata if isinstance(metadata, (str, Path)) else "the metadata"
            log(f"{name}: not used, the model has no categorical columns")
            metadata = None
        samples = self.read(table, metadata, keep_unmatched=True, **options)
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
        """The column that a fine-tuned model predicts."""
        return TypeAdapter(TargetInfo).validate_python(self.description["target"])

    def read(
        self, table: Any, metadata: Any = None, *, rarefy_depth: int | None = None, **more: Any
    ) -> Samples:
        """Samples treated as in training, with facts on how much of them the model knows."""
        data = self.description["data"]
        more["rarefy_depth"] = data["rarefy_depth"] if rarefy_depth is None else rarefy_depth
        more["asv_sampling"] = data["asv_sampling"]
        samples = _read(table, data["seed"], metadata, **more)
        add_applicability(samples, self.saved)
        return samples

    def dataset(self, samples: Samples) -> tuple[SampleDataset, np.ndarray | None]:
        """Samples as tokens and categories, and what zscore-category knows them by."""
        classes, codes, keys = self.description.get("categories"), None, None
        if classes:
            codes = samples.category_codes(classes)
            if self.target.transform.by_category and samples.metadata is not None:
                keys = samples.category_keys(list(classes))
        options = SimpleNamespace(**self.description["data"])
        return samples.dataset(options, categories=codes), keys

    def embed(
        self, table: Any, asvs: bool = False, dimensions: int | None = None, **options: Any
    ) -> pd.DataFrame:
        """Vectors by a model that a tree taught: ``faith_pd`` and ``e0``, ... of each sample.

        With `asvs` of each sequence: ``nearest`` (the known one), ``edits`` (to it), ``support``
        (mean probability of its clades) and ``e0``, .... `dimensions` is the length of a sample's
        vector; as pretraining fitted it if not given. `options` are those of tables, and ``seed``
        of the rarefaction.
        """
        import pandas as pd

        if asvs and dimensions is not None:
            raise InputError(
                "--dimensions is for samples; with --asvs a vector is what the encoder has"
            )
        placer, embedding = self.placer, Embedding(self.saved.arrays["embedding.directions"])
        dimensions = embedding.most if dimensions is None else dimensions
        if dimensions > embedding.most:
            raise InputError(
                f"--dimensions {dimensions}: pretraining fitted {embedding.most}; ask for no more"
            )
        own, near, placed = self._place(table, **options)
        require_places(own, placed)
        if not asvs:
            return sample_vectors(placer, own, placed, embedding, dimensions)
        names = placer.clades.sequences
        nearest = [names[int(tip)] if tip >= 0 else "" for tip in placed.nearest]
        first = {"nearest": nearest, "edits": placed.distance, "support": placed.support}
        vectors = pd.DataFrame(placer.vectors(own.feature_ids, placed.known, near)).add_prefix("e")
        frame = pd.concat([pd.DataFrame(first), vectors], axis=1)
        return frame.set_index(pd.Index(list(own.feature_ids), name="sequence"))

    def unifrac(
        self, table: Any, metric: str = "unweighted", *, engine: str = "builtin", **options: Any
    ) -> pd.DataFrame:
        """Distances of all samples on the model's tree, a square frame; or ``faith_pd`` of each.

        `metric` is unweighted, weighted, weighted-normalized or faith-pd; `engine` is builtin, or
        unifrac: the package of that name. `options` are as in `embed`.
        """
        own, _, placed = self._place(table, **options)
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
        self, table: Any, *, rarefy_depth: int = 0, seed: int = 0, **options: Any
    ) -> tuple[FeatureTable, Found, Placed]:
        """A table, the neighbours of its new ASVs, and where all are placed."""
        placer = self.placer
        samples = _read(table, seed, rarefy_depth=rarefy_depth, **options)
        found = placer.find(samples.table.feature_ids)
        facts, warnings = applicability(samples.table, *found)
        log_facts(samples.facts + facts, warnings)
        return samples.table, found[1], placer.place(samples.table.feature_ids, found)


def _read(
    table: Any, seed: int, metadata: Any = None, keep_unmatched: bool = False, **options: Any
) -> Samples:
    """Samples of a file, or of a table in memory."""
    path = table if isinstance(table, (str, Path)) else None
    return read_samples(
        from_dict(OptionalTableOptions, {"table": path, **options}, "aam.load"),
        seed,
        table=None if path else table,
        metadata=metadata,
        keep_unmatched=keep_unmatched,
    )
