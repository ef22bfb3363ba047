"""Loads the CUDA device that is not there, before torch is imported; see README.md."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> str | None:
    """Build the guard, or take the one that was built before, and load it; why not, or None.

    PyTorch asks for its hooks once, when it is imported, so a process that has imported it already is too late.
    """
    if "torch" in sys.modules:
        return "it must be loaded before torch: run tests/fake_cuda in a process of its own"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    if not (torch / "include" / "ATen").is_dir():
        return "this build of torch has no C++ headers"
    libraries = [torch / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    if (torch / "lib" / "libtorch_cuda.so").exists() or not all(path.exists() for path in libraries):
        return "it stands in for CUDA in a CPU build of torch for Linux alone"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "there is no C++ compiler (g++, or the one that $CXX names)"
    built = _build(compiler, torch)
    if isinstance(built, str):
        return built
    for path in (*libraries, built):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return None


def _build(compiler: str, torch: Path) -> Path | str:
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes() + compiler.encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"tokscale-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        return f"{folder} belongs to somebody else"
    built = folder / f"{key[:16]}.so"
    if built.exists():
        return built
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new = Path(scratch) / built.name
        command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{torch}/include", str(SOURCE), "-o", str(new)]
        run = subprocess.run(
            [*command, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"], capture_output=True, text=True, check=False
        )
        if run.returncode:
            return f"{compiler} does not build it: {run.stderr.strip().splitlines()[-1]}"
        new.replace(built)  # at once: several processes may build
    return built
