"""What an untrusted file, a shared folder and the network may not do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokscale.base.files import write_json
from tokscale.checkpoint.config import CheckpointConfig
from tokscale.checkpoint.store import CheckpointStore
from tokscale.checkpoint.testing import Flat, alone, tensors

PACKAGE = Path(__file__).parents[2] / "tokscale"
PIPELINE = """
import ipaddress, socket, sys

def guard(event, arguments):
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        return
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = host[0] if isinstance(host, tuple) else host
    if event != "socket.getaddrinfo" and arguments[0].family == socket.AF_UNIX:
        return
    if host in (None, "", "localhost", socket.gethostname()) or ipaddress.ip_address(host).is_loopback:
        return
    raise PermissionError(f"{event}: {host} is not this machine")

sys.addaudithook(guard)
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except PermissionError:
    print("guarded")
from tokscale import cli
run = ["run_dir=run", "data_dir=data"]
model = "{kind: dalle, dim: 16, depth: 1, heads: 2, dim_head: 8, text_seq_len: 16}"
tokenizer = "{kind: dvae, image_size: 16, num_layers: 1, num_tokens: 16, codebook_dim: 4, hidden_dim: 4}"
short = ["batch_size=8", "loop={total_steps: 2}"]
for words in (
    ["prepare", "source={kind: shapes, count: 16}"],
    ["train-tokenizer", f"tokenizer={tokenizer}", "text={kind: bpe, vocab_size: 280}", "quality.images=4", *short],
    ["tokenize"],
    ["train", f"model={model}", *short],
    ["export"],
    ["sample", 'prompts=["a small red circle"]'],
    ["status"],
):
    code = cli.main([*words, *run])
    assert code == 0, (words, code)
print("done")
"""


def test_the_whole_pipeline_needs_nothing_but_this_machine(tmp_path):
    done = subprocess.run([sys.executable, "-c", PIPELINE], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("guarded") and done.stdout.rstrip().endswith("done")


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """Every call of a method of that name in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", node))
    return found


def test_no_model_of_a_library_may_bring_code_of_its_own():
    found = calls("from_pretrained")
    assert found
    for where, call in found:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", where
        assert said.get("local_files_only") == "True", where


def test_pickles_are_read_by_the_unpickler_that_calls_nothing():
    ours = {"dist/testing.py"}  # what a test's ranks hand to each other
    for where, call in calls("load"):
        if ast.unparse(call.func) == "torch.load" and where.partition(":")[0] not in ours:
            assert "weights_only=True" in ast.unparse(call), where


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_what_a_run_writes_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(), alone()).save(1, {"model": Flat(tensors())}, {})
        write_json(tmp_path / "exit.json", {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4 and {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~mask}
