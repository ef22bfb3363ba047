"""What lies in a folder of images: which files are samples, and which captions and classes are theirs."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokscale.base.errors import DataError
from tokscale.data.raw.paths import is_hidden
from tokscale.data.raw.shards import IMAGE_ENDINGS

CAPTION_ENDINGS = ("txt", "caption", "json")


@dataclass
class Listing:
    """The files of a folder, relative to it."""

    images: list[Path] = field(default_factory=list)
    """In order of their names, folder by folder."""
    captions: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """By key: an image's path without its ending."""
    keys: dict[Path, str] = field(default_factory=dict)
    """Of each image."""
    links: list[Path] = field(default_factory=list)
    """Folders behind links that were not followed."""
    other: int = 0
    """Files that are neither."""


def list_folder(root: Path, *, image_pattern: str | None, caption_files: Sequence[str], follow_links: bool) -> Listing:
    """Look through a folder, however deep.

    Args:
        root: The folder.
        image_pattern: What image files are called, such as `{key}.input.jpg`; by default every image is one, and its
            key is its name up to the ending.
        caption_files: Endings or patterns of caption files, the most wanted first.
        follow_links: Enter folders behind links.

    Raises:
        DataError: When there is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set source.path to a folder of images and .txt files")
    found = Listing()
    wanted = re.compile(_as_expression(image_pattern)) if image_pattern else None
    captions = [re.compile(_as_expression(name if "{" in name else f"{{key}}.{name}"), re.I) for name in caption_files]
    ranks: dict[Path, int] = {}
    for path in _files(root, follow_links, found.links):
        key = _image_key(path, wanted)
        if key is not None:
            found.images.append(path)
            found.keys[path] = key
            continue
        rank, key = _caption_key(path, captions)
        if key is None:
            found.other += 1
            continue
        ranks[path] = rank
        found.captions[key].append(path)
    for paths in found.captions.values():
        paths.sort(key=lambda path: (ranks[path], str(path)))
    _adopt(found)
    return found


def class_of(path: Path) -> str | None:
    """The class folder of an image: the first below the root."""
    return path.parts[0] if len(path.parts) > 1 else None


def _files(root: Path, follow_links: bool, links: list[Path]) -> Iterator[Path]:
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=follow_links):
        kept = []
        for name in sorted(subfolders):
            path = Path(folder, name)
            if is_hidden(name):
                continue
            if path.is_symlink():
                real = os.path.realpath(path)
                if not follow_links or real in seen:  # a link to a folder above it would never end
                    links.append(path.relative_to(root))
                    continue
                seen.add(real)
            kept.append(name)
        subfolders[:] = kept
        for name in sorted(names):
            if not is_hidden(name):
                yield Path(folder, name).relative_to(root)


def _image_key(path: Path, wanted: re.Pattern[str] | None) -> str | None:
    if wanted is None:
        is_image = path.suffix.lower().removeprefix(".") in IMAGE_ENDINGS
        return str(path.with_suffix("")) if is_image else None
    match = wanted.fullmatch(path.name)
    return str(path.with_name(match["key"])) if match else None


def _caption_key(path: Path, captions: Sequence[re.Pattern[str]]) -> tuple[int, str | None]:
    for rank, pattern in enumerate(captions):
        if match := pattern.fullmatch(path.name):
            return rank, str(path.with_name(match["key"]))
    return 0, None


def _adopt(found: Listing) -> None:
    """`x.png.txt` is the caption of `x.png`, too."""
    for path, key in found.keys.items():
        if str(path) != key and (named := found.captions.pop(str(path), None)):
            found.captions[key] += named


def _as_expression(pattern: str) -> str:
    before, _, after = pattern.partition("{key}")
    return f"{re.escape(before)}(?P<key>.+){re.escape(after)}"
