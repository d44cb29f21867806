"""The whole pre-norm transformer encoder layer on ragged sequences."""
