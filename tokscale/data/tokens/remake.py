"""The commands that make token shards, or what lies beside them, again: ways out of messages about a folder of them."""

import re
import shlex
from pathlib import Path

from tokscale.base.address import Address, is_address


def folder_of(shard: str) -> Path | Address:
    """The folder that a shard lies in."""
    return Address(shard).parent if is_address(shard) else Path(shard).parent


def again(folder: Path | Address, *words: str) -> str:
    """`tokscale tokenize` for a folder, between backticks; what lies behind an address is made elsewhere.

    Args:
        folder: Of token shards. Units are made for all buckets together, so of a bucket's folder it is the one above;
            states of captions are embedded bucket by bucket.
        words: As `action=finalise`.
    """
    if isinstance(folder, Address):
        return f"{shlex.join(['tokscale', 'tokenize', *words])} where {folder} was made"
    if "action=embed" not in words and re.fullmatch(r"\d+x\d+", folder.name) and (folder.parent / "plan").exists():
        folder = folder.parent
    return f"`{shlex.join(['tokscale', 'tokenize', *words, f'tokens={folder}'])}`"


def repair(folder: Path | Address, *words: str) -> str:
    """What to run when bytes are damaged or gone; `words` for what makes them again."""
    return f"run {again(folder, 'action=verify', 'repair=true')}, then {again(folder, *words)}"
