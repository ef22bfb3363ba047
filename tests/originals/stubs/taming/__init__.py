"""Stands in for the `taming-transformers` package, which the originals import but these tests never run."""
