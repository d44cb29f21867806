"""Files in, tokens and distances out: tables, metadata, trees, splits and ragged batches."""

from aam.data.dataset import Batch, SampleDataset
from aam.data.facts import DataFact
from aam.data.matching import match_ids
from aam.data.metadata import Metadata, read_metadata, require_values
from aam.data.sequences import tokenize
from aam.data.splits import Split, leaking_columns, split_samples
from aam.data.table import FeatureTable, rarefy, read_table

__all__ = [
    "Batch",
    "DataFact",
    "FeatureTable",
    "Metadata",
    "SampleDataset",
    "Split",
    "leaking_columns",
    "match_ids",
    "rarefy",
    "read_metadata",
    "read_table",
    "require_values",
    "split_samples",
    "tokenize",
]
