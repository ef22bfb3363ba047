"""Which names are data."""

_LEFT_BEHIND = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"})
"""In small letters: what machines leave beside people's files."""


def is_hidden(path: str) -> bool:
    """Whether a file is none of the data: hidden, or in a hidden folder, or what a Mac or an editor left beside it.

    `._name` and `__MACOSX` come of archives made on a Mac, `.ipynb_checkpoints` of notebooks, `Thumbs.db` of Windows,
    `@eaDir` of a file server; `.png` has no name.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part.lower() in _LEFT_BEHIND for part in parts)
