"""How what lies behind an address is read."""

import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from tokscale.base.config import Config, PathKey


class RemoteConfig(Config):
    """How shards behind an address are read; without an address nothing here is used. Changes nothing of the result."""

    cache: PathKey | None = None
    """Folder of local copies, which all processes of a machine share and a later run finds again; by default one of
    the user's own in the machine's temporary folder."""
    cache_gb: float = Field(default=50.0, gt=0)
    """About how much the local copies may take, in 10^9 bytes; the oldest make room. A shard that is in work stays."""
    connections: int = Field(default=8, ge=1)
    """Requests at a time, of each process."""
    tries: int = Field(default=8, ge=1)
    """How often a request is made before its failure counts."""
    retry_seconds: float = Field(default=0.5, ge=0)
    """Pause before the second try; it doubles with each, up to half a minute."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds without a byte after which a request has failed."""
    options: dict[str, Any] = {}
    """For fsspec's file system of that kind: `{anon: true}` for a public bucket, `{endpoint_url: https://...}` for a
    store of one's own. No passwords: these words are kept in run folders."""

    @property
    def cache_folder(self) -> Path:
        """`cache`, or its default."""
        return self.cache or Path(tempfile.gettempdir()) / f"tokscale-{os.getuid()}"
