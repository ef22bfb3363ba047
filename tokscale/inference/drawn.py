"""Where drawn images go: files of a folder, tars, or parquet, each with its prompt, its seed and its score.

Images are written unit by unit; equal images give equal bytes, so a unit that is made again replaces itself.
"""

import importlib.util
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from PIL import Image

from tokscale.base.errors import EnvironmentRefused
from tokscale.base.files import atomic_write, read_regular
from tokscale.base.shapes import Tensor, UInt8
from tokscale.base.text import slug
from tokscale.data.raw.shards import RawRecord, RawShard, write_shard
from tokscale.inference.grids import to_pil

DrawnFormat = Literal["folder", "tar", "parquet"]
_ROW_GROUP = 64


@dataclass(frozen=True)
class Drawn:
    """One image and how it was made."""

    number: int
    """In the order of prompts; names the image."""
    prompt: str
    seed: int
    png: bytes = b""
    clip: float | None = None
    """How well it fits its prompt, where a CLIP was asked."""
    sampling: Mapping[str, Any] | None = None
    """Options of a sweep that differ from image to image."""
    file: str = ""
    """Where it lies, relative to the folder."""

    def row(self) -> dict[str, Any]:
        """For a listing: everything but the image."""
        row: dict[str, Any] = {"number": self.number, "file": self.file, "prompt": self.prompt, "seed": self.seed}
        row |= {} if self.clip is None else {"clip": self.clip}
        return row | ({} if self.sampling is None else {"sampling": dict(self.sampling)})


class Sink(Protocol):
    """Takes images unit by unit."""

    def write(self, unit: int, images: Iterable[Drawn]) -> list[dict[str, Any]]:
        """Write the images of a unit as they come, whole or not at all; their rows."""
        ...

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The PNG of a row that was written."""
        ...


class FolderSink(Sink):
    """`0007_a-red-ring.png`, one file an image."""

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, unit: int, images: Iterable[Drawn]) -> list[dict[str, Any]]:
        """See `Sink`."""
        del unit
        rows = []
        for image in images:
            image = replace(image, file=f"{image.number:04d}_{slug(image.prompt) or 'image'}.png")
            with atomic_write(self._folder / image.file) as file:
                file.write(image.png)
            rows.append(image.row())
        return rows

    def read(self, row: Mapping[str, Any]) -> bytes:
        """See `Sink`."""
        return read_regular(self._folder / row["file"])


class TarSink(Sink):
    """`00000.tar` and so on, as `prepare` and img2dataset write them: `.png`, `.txt`, and the rest in `.json`."""

    def __init__(self, folder: Path):
        if importlib.util.find_spec("webdataset") is None:
            raise EnvironmentRefused("format=tar needs webdataset: pip install 'tokscale[train]'")
        self._folder = folder

    def write(self, unit: int, images: Iterable[Drawn]) -> list[dict[str, Any]]:
        """See `Sink`."""
        rows: list[dict[str, Any]] = []
        name = f"{unit:05d}.tar"

        def records() -> Iterator[RawRecord]:
            for image in images:
                rows.append(replace(image, file=name).row())
                meta = {key: value for key, value in rows[-1].items() if key not in ("file", "prompt")}
                yield RawRecord(f"{image.number:09d}", image.png, "png", image.prompt, meta)

        write_shard(self._folder / name, records())
        return rows

    def read(self, row: Mapping[str, Any]) -> bytes:
        """See `Sink`."""
        with RawShard(self._folder / row["file"]) as shard:
            key = f"{row['number']:09d}"
            return shard.image(next(sample for sample in shard.samples if sample.key == key))


class ParquetSink(Sink):
    """`00000.parquet` and so on: `image: {bytes, path}` as the `datasets` library has it, `prompt`, `seed`, ..."""

    def __init__(self, folder: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise EnvironmentRefused("format=parquet needs pyarrow: pip install 'tokscale[parquet]'") from None
        self._folder, self._arrow = folder, pyarrow
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        columns = {
            "image": (image, {"_type": "Image"}),
            "prompt": (pyarrow.string(), {"dtype": "string", "_type": "Value"}),
            "seed": (pyarrow.int64(), {"dtype": "int64", "_type": "Value"}),
            "number": (pyarrow.int64(), {"dtype": "int64", "_type": "Value"}),
            "clip": (pyarrow.float32(), {"dtype": "float32", "_type": "Value"}),
            "sampling": (pyarrow.string(), {"dtype": "string", "_type": "Value"}),
        }
        features = {"info": {"features": {name: feature for name, (_, feature) in columns.items()}}}
        self._schema = pyarrow.schema(
            [(name, kind) for name, (kind, _) in columns.items()], metadata={"huggingface": json.dumps(features)}
        )

    def write(self, unit: int, images: Iterable[Drawn]) -> list[dict[str, Any]]:
        """See `Sink`."""
        rows, waiting = [], []
        name = f"{unit:05d}.parquet"
        with (
            atomic_write(self._folder / name) as file,
            self._arrow.parquet.ParquetWriter(file, self._schema) as writer,
        ):
            for image in images:
                image = replace(image, file=name)
                rows.append(image.row())
                waiting.append(self._cells(image))
                if len(waiting) == _ROW_GROUP:
                    writer.write_table(self._arrow.Table.from_pylist(waiting, self._schema))
                    waiting.clear()
            if waiting:
                writer.write_table(self._arrow.Table.from_pylist(waiting, self._schema))
        return rows

    def read(self, row: Mapping[str, Any]) -> bytes:
        """See `Sink`."""
        from pyarrow.parquet import read_table

        found = read_table(self._folder / row["file"], columns=["image"], filters=[("number", "==", row["number"])])
        return found.column("image")[0].as_py()["bytes"]

    @staticmethod
    def _cells(image: Drawn) -> dict[str, Any]:
        return {
            "image": {"bytes": image.png, "path": f"{image.number:09d}.png"},
            "prompt": image.prompt,
            "seed": image.seed,
            "number": image.number,
            "clip": image.clip,
            "sampling": None if image.sampling is None else json.dumps(dict(image.sampling), sort_keys=True),
        }


def open_sink(kind: DrawnFormat, folder: Path) -> Sink:
    """The sink of a format.

    Raises:
        EnvironmentRefused: When a library that it needs is not installed.
    """
    return {"folder": FolderSink, "tar": TarSink, "parquet": ParquetSink}[kind](folder)


def png_of(pixels: UInt8[Tensor, "channels height width"]) -> bytes:
    """An image as the bytes of a PNG file."""
    file = io.BytesIO()
    to_pil(pixels).save(file, format="PNG")
    return file.getvalue()


def pixels_of(pngs: Sequence[bytes]) -> UInt8[Tensor, "images channels height width"]:
    """Images of one size, read back."""
    found = []
    for png in pngs:
        with Image.open(io.BytesIO(png)) as image:
            array = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            found.append(rearrange(array, "(h w c) -> c h w", h=image.height, w=image.width))
    return torch.stack(found)
