"""The vocabulary every other layer speaks. Knows no rank, no file format and no model."""
