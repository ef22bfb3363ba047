"""Which names are data."""


def is_hidden(path: str) -> bool:
    """Whether a file is none of the data: hidden, or in a hidden folder, or what a Mac or an editor left beside it.

    `._name` and `__MACOSX` come of archives made on a Mac, `.ipynb_checkpoints` of notebooks; `.png` has no name.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
