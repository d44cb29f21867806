"""Files in, tokens and distances out: tables, metadata, trees, splits and ragged batches."""
