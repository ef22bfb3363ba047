"""Raw image shards, token shards, manifests, and the loader whose state is a position."""

from tokscale.data.tokens.blocks import unpack_blocks

__all__ = ["unpack_blocks"]
