"""Shards behind a network: asked for in parts, tried again, kept in local copies of a bounded size."""
