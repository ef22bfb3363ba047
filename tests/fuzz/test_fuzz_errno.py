"""A file system that refuses: every error number at every operation, under the command line."""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_exports
import tiny_pipeline
from fuzzing import cases, fresh, run
from hypothesis import given
from hypothesis import strategies as st

from tokscale import cli

OPERATIONS = (
    "open",
    "stat",
    "mkdir",
    "replace",
    "rename",
    "unlink",
    "listdir",
    "scandir",
    "fsync",
    "pread",
    "preadv",
    "write",
)
NAMES = """
EACCES EPERM EROFS ENOSPC EDQUOT EIO ENOENT ENOTDIR EEXIST EISDIR ENAMETOOLONG ESTALE EMFILE ENFILE ELOOP EBUSY ETXTBSY
EINVAL ENOSYS EOPNOTSUPP EFBIG ENODEV ENXIO ETIMEDOUT EAGAIN EREMOTEIO ENOMEM ENOTEMPTY EXDEV
"""
NUMBERS = [getattr(errno, name) for name in NAMES.split()]


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    tiny_pipeline.make_inputs(folder)
    tiny_exports.make_exports(folder / "exports")
    words = [f"data_dir={folder}/data", f"image_tokenizer={folder}/image_tokenizer", road_model()]
    words += [f"text_tokenizer={folder}/text_tokenizer", f"run_dir={folder}/run", "loop.total_steps=1", "batch_size=8"]
    assert cli.main(["train", *words]) == 0
    assert cli.main(["prepare", f"data_dir={folder}/raw", "source.count=8", "shard_samples=4", "preview=0"]) == 0
    return folder


def road_model() -> str:
    return f"model={{{', '.join(f'{key}: {value}' for key, value in tiny_pipeline.MODEL.items())}}}"


class Refusing:
    """Lets an operation on paths below a folder fail once, or from then on."""

    def __init__(self, folder: Path, operation: str, number: int, after: int, lasts: bool):
        self.folder, self.operation, self.number, self.left, self.lasts = str(folder), operation, number, after, lasts

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if arguments and self._ours(arguments[0]):
                self.left -= 1
                if self.left < 0 and (self.lasts or self.left == -1):
                    raise OSError(self.number, os.strerror(self.number), arguments[0])
            return real(*arguments, **options)

        return call

    def _ours(self, where: Any) -> bool:
        if isinstance(where, int):
            return self.operation in ("fsync", "pread", "preadv", "write")
        return isinstance(where, str | os.PathLike) and os.fspath(where).startswith(self.folder)


@cases(120)
@given(data=st.data())
def test_any_error_of_the_file_system_in_any_stage(road, tmp_path, capsys, data):
    work = fresh(tmp_path)
    shutil.copytree(road / "run", work / "run")
    shutil.copytree(road / "exports/dalle", work / "export")
    beside = [f"{kind}_tokenizer={road}/{kind}_tokenizer" for kind in ("image", "text")]
    stage, *words = data.draw(
        st.sampled_from(
            [
                ("sample", f"export={work}/export", "prompts=x", f"out={work}/out"),
                ("export", f"out={work}/out"),
                ("status",),
                ("prepare", f"data_dir={work}/data", "source.count=6", "shard_samples=3", "preview=4"),
                ("tokenize", f"data_dir={work}/data", f"raw={road}/raw/raw", *beside, "encode_batch=4"),
                ("train", f"data_dir={road}/data", *beside, road_model(), "loop.total_steps=2", "on_change=record"),
            ]
        )
    )
    operation = data.draw(st.sampled_from(OPERATIONS))
    refusing = Refusing(
        work,
        operation,
        data.draw(st.sampled_from(NUMBERS)),
        data.draw(st.integers(0, 30)),
        data.draw(st.booleans()),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, operation, refusing.wrap(getattr(os, operation)))
        if operation == "open":
            patch.setattr(builtins, "open", refusing.wrap(open))
            patch.setattr(io, "open", refusing.wrap(io.open))
        run(capsys, stage, f"run_dir={work}/run", *words)
