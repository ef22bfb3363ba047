"""Addresses: places behind a network, `scheme://...`, that some keys take beside paths of this machine."""

import re

SCHEMES = ("https", "http", "s3", "gs", "hf", "memory")
"""What is read: web servers, object stores, the Hugging Face Hub; `memory` lies within one process."""
_ADDRESS, _ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://"), re.compile(r"(s3|gs|https?|hf):/[^/]")
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")


class Address(str):
    """A file or a folder behind a network. Joined by `/` as a path is."""

    __slots__ = ()

    @property
    def scheme(self) -> str:
        """Of what kind the place is: `s3`, `https`, ..."""
        return self.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Address":
        """The folder that it is in."""
        return Address(self.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self.rstrip('/')}/{name}")


def is_address(text: str) -> bool:
    """Whether a text names a place behind a network, of whatever kind."""
    return _ADDRESS.match(text) is not None


def address(text: str) -> Address:
    """A text as an address.

    Raises:
        ValueError: When it has a password in it, which logs and checkpoints would keep. Which schemes there are is
            asked by whoever opens it.
    """
    if _PASSWORD.search(text):
        raise ValueError(
            f"{_PASSWORD.sub('://...@', text)}: an address may not hold a password: it would stand in logs and run "
            "folders; leave it to the environment or the store's own configuration files"
        )
    return Address(text)


def slash_missing(text: str) -> bool:
    """Whether it is an address that has lost a slash, as one does that was made a path of."""
    return _ONE_SLASH.match(text) is not None
