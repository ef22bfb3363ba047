"""Two hosts without Slurm, played by two addresses of this machine: ranks, logs, `exit.json` and resuming are alike."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_pipeline

from tokscale.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOSTS = ("127.0.0.1", "127.0.0.2")
VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.make_inputs(folder)
    return folder


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def words(pipeline: Path, run_dir: Path, *more: str) -> list[str]:
    model = ", ".join(f"{key}: {value}" for key, value in tiny_pipeline.MODEL.items())
    return [
        f"run_dir={run_dir}",
        f"data_dir={pipeline}/data",
        f"image_tokenizer={pipeline}/image_tokenizer",
        f"text_tokenizer={pipeline}/text_tokenizer",
        f"model={{{model}}}",
        "batch_size=8",
        "loop={total_steps: 6, log_every: 1}",
        *more,
    ]


def deepspeed(host: int, port: str, folder: Path) -> list[str]:
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in HOSTS))
    place = ["--no_ssh", "--node_rank", str(host), "--master_addr", HOSTS[0], "--master_port", port]
    return [str(BIN / "deepspeed"), "--hostfile", str(hostfile), *place, str(ROOT / "launch/train.py")]


def torchrun(host: int, port: str, folder: Path) -> list[str]:
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host)]
    return [
        str(BIN / "torchrun"),
        *place,
        "--master-addr",
        HOSTS[0],
        "--master-port",
        port,
        str(ROOT / "launch/train.py"),
    ]


def torchrun_module(host: int, port: str, folder: Path) -> list[str]:
    return [*torchrun(host, port, folder)[:-1], "-m", "tokscale", "train"]


def torchrun_rendezvous(host: int, port: str, folder: Path) -> list[str]:
    del host  # the agents find out by themselves who is which
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", folder.name]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0]}:{port}"]
    return [str(BIN / "torchrun"), *place, *meeting, str(ROOT / "launch/train.py")]


def launched(launcher, folder: Path, keys: list[str]) -> list[int]:
    """Start the launcher once for each host, as an operator would; the exit codes."""
    port = free_port()
    env = os.environ | VARIABLES | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    processes = [subprocess.Popen([*launcher(host, port, folder), *keys], env=env) for host in range(len(HOSTS))]
    try:
        return [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    "launcher",
    [deepspeed, torchrun, torchrun_module, torchrun_rendezvous],
    ids=["deepspeed", "torchrun", "torchrun-m-tokscale", "torchrun-rendezvous"],
)
def test_two_hosts_train_stop_and_go_on(pipeline, tmp_path, launcher):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    codes = launched(launcher, tmp_path, words(pipeline, run_dir))
    assert any(codes)  # what a launcher says of 75 is its own affair, so it is left in the folder
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    assert launched(launcher, tmp_path, words(pipeline, run_dir)) == [0, 0]
    assert_two_hosts_trained(run_dir)


def assert_two_hosts_trained(run_dir: Path) -> None:
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (run_dir / "logs").glob("rank_*")} == {"rank_0000.log", "rank_0001.log"}
    assert json.loads((run_dir / "env.json").read_text())["nodes"] == 2


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder with an `ssh` that reaches both hosts: a daemon of our own with keys of our own."""
    daemon = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if daemon is None or shutil.which("pdsh") is None:
        pytest.skip("sshd or pdsh is not installed: apt-get install openssh-server pdsh")
    # Not below pytest's folders: sshd wants short paths that only we may write.
    folder = Path(tempfile.mkdtemp(prefix="sshd-"))
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "sshd_config").write_text(
        "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
        + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n Port {port}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {folder}/known\n StrictHostKeyChecking no\n LogLevel ERROR\n"
    )
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "ssh").chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with subprocess.Popen([daemon, "-D", "-e", "-f", str(folder / "sshd_config")]) as running:
        try:
            deadline = time.monotonic() + 120
            while subprocess.run([folder / "ssh", HOSTS[1], "true"], capture_output=True).returncode:
                assert running.poll() is None and time.monotonic() < deadline, "sshd does not answer"
                time.sleep(0.1)
            yield folder
        finally:
            running.terminate()
    shutil.rmtree(folder)


def test_one_deepspeed_command_starts_both_hosts_over_ssh(pipeline, tmp_path, reachable):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    # Of our variables DeepSpeed sends PYTHON* and what this file names to the other hosts.
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in VARIABLES.items()))
    command = [str(BIN / "deepspeed"), "--hostfile", str(tmp_path / "hosts"), "--master_port", free_port()]
    command += [str(ROOT / "launch/train.py"), *words(pipeline, run_dir)]
    env = os.environ | VARIABLES | {"PATH": f"{reachable}:{BIN}:{os.environ['PATH']}"}
    codes, left = [], []
    for _ in range(2):
        codes.append(subprocess.run(command, env=env, cwd=tmp_path, timeout=400).returncode)
        left.append(json.loads((run_dir / "exit.json").read_text())["code"])
    assert left == [75, 0] and codes[0] != 0 and codes[1] == 0
    assert_two_hosts_trained(run_dir)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed: apt-get install openmpi-bin")
def test_mpirun(pipeline, tmp_path):
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-np",
        "2",
        sys.executable,
        str(ROOT / "launch/train.py"),
    ]
    env = os.environ | VARIABLES | {"MASTER_PORT": free_port()}
    assert subprocess.run([*command, *words(pipeline, tmp_path / "run")], env=env).returncode == 0
    assert len(read_metrics(tmp_path / "run")) == 6 and (tmp_path / "run/logs/rank_0001.log").exists()
