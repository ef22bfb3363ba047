"""Stands in for the module that setuptools 82 removed; the originals only ask for a version."""

from importlib.metadata import distribution as get_distribution

__all__ = ["get_distribution"]
