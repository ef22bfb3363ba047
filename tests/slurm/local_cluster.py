"""A Slurm cluster of two nodes on this machine: a controller and two `slurmd` on loopback, in a folder of its own.

The partitions `a100`, `gpu` and `cpu` have nodes that are switched off for ever: they take a job only to say whether it
would fit (`sbatch --test-only`), and stand for clusters with typed GPUs and a CPU partition of small memory. Jobs of
`urgent` preempt those of `all`.

As a program, until Ctrl-C: `sudo python tests/slurm/local_cluster.py /tmp/cluster`, then in another shell
`export SLURM_CONF=/tmp/cluster/slurm.conf` and everything of Slurm works.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
INSTALL_ACCOUNTING = "apt-get install -y --no-install-recommends slurmdbd mariadb-server-core mariadb-client-core"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
INSTALL = "apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_CONF = """
ClusterName=tokscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdParameters=config_overrides
SlurmdTimeout=30
{accounting}
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000 Gres=gpu:1 State=UNKNOWN
NodeName=a[1-4] {away} CPUs=128 RealMemory=1000000 Gres=gpu:a100:8
NodeName=h[1-4] {away} CPUs=192 RealMemory=2000000 Gres=gpu:h100:8
NodeName=c[1-2] {away} CPUs=64 RealMemory=256000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=a100 Nodes=a[1-4] MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=h[1-4] MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=c[1-2] MaxTime=INFINITE State=UP
"""


_DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={storage}
StorageUser=root
StorageLoc=slurm_acct_db
"""


def missing(*, accounting: bool = False) -> str | None:
    """Why no cluster can run here, None when it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: {INSTALL}"
    lacking = [name for name in ACCOUNTING if shutil.which(name, path=_PATH) is None] if accounting else []
    return f"{', '.join(lacking)} not installed: {INSTALL_ACCOUNTING}" if lacking else None


class LocalCluster(AbstractContextManager["LocalCluster"]):
    """Two idle nodes inside the context; nothing of them afterwards, however the context or its process ends."""

    def __init__(self, folder: Path, *, cpus: int = 2, accounting: bool = False, remember: int = 300):
        """Prepare; nothing runs yet.

        Args:
            folder: Of everything, logs and state included.
            cpus: Of each node, whatever the machine has.
            accounting: With `slurmdbd` on a database of its own, so that `sacct` answers.
            remember: Seconds for which the controller knows of jobs that are over.
        """
        self.folder, self._cpus, self._accounting, self._remember = folder.absolute(), cpus, accounting, remember
        self.environ = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environ if name.startswith(("SBATCH_", "TOKSCALE_"))]:
            del self.environ[name]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        conf = self.folder / "slurm.conf"
        host, ports = socket.gethostname(), _free_ports(4)
        away = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} State=CLOUD"
        storage = "AccountingStorageType=accounting_storage/none"
        if self._accounting:
            dbd, database = _free_ports(2)
            storage = "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            storage += f"AccountingStoragePort={dbd}\nAccountingStoragePass={self.folder}/munge.socket"
        values = {"host": host, "folder": self.folder, "ports": ports, "away": away, "cpus": self._cpus}
        conf.write_text(_CONF.format(accounting=f"{storage}\nMinJobAge={self._remember}", **values))
        (self.folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
        # Jobs leave their parents. This one outlives us: it sees its input end, however we do, and ends them.
        keeping = [sys.executable, __file__, "--sweep-after-input", str(self.folder)]
        self._keeper = subprocess.Popen(keeping, stdin=subprocess.PIPE, start_new_session=True)
        try:
            options = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
            files = [
                f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{end}"
                for name, end in options.items()
            ]
            self._start("munged", "--foreground", "--force", *files)
            _until(lambda: (self.folder / "munge.socket").exists(), 30, "munged opens its socket")
            if self._accounting:
                self._start_accounting(host, dbd, database)
            self._start("slurmctld", "-D", "-f", str(conf))
            for node in NODES:
                self._start("slurmd", "-D", "-N", node, "-f", str(conf))
            _until(lambda: self.node_states() == {node: "idle" for node in NODES}, 120, "the nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._daemons):
            process.terminate()
        for process in reversed(self._daemons):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
            self._keeper.wait(30)

    def call(self, *command: str, environ: Mapping[str, str] | None = None, check: bool = True) -> str:
        """What a command of Slurm prints."""
        told = subprocess.run(command, capture_output=True, text=True, env=self.environ | dict(environ or {}))
        if check and told.returncode != 0:
            raise RuntimeError(f"{command} failed with {told.returncode}: {told.stderr}{told.stdout}")
        return told.stdout

    def submit(self, *words: str, environ: Mapping[str, str] | None = None) -> str:
        """`sbatch`; the job's id."""
        return self.call("sbatch", "--parsable", *words, environ=environ).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str, seconds: float = 600) -> dict[str, str]:
        """Wait for the end of a job, requeues included; its fields."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        _until(lambda: self.job(job)["JobState"] in final, seconds, f"job {job} ends", lambda: self.job(job))
        return self.job(job)

    def cancel_all(self) -> None:
        """End every job, and wait until the nodes are free."""
        self.call("scancel", "--user=root")
        _until(lambda: not self.call("squeue", "--noheader").strip(), 60, "no job is left")

    def node_states(self) -> dict[str, str]:
        told = self.call("sinfo", "--Node", "--noheader", "--format=%N %t", check=False)
        return dict(line.split() for line in told.splitlines())

    def _start_accounting(self, host: str, port: int, storage: int) -> None:
        data = self.folder / "database"
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db"]
        subprocess.run(install, check=True, capture_output=True, env=self.environ)
        words = [f"--datadir={data}", f"--socket={self.folder}/database.socket", f"--port={storage}", "--user=root"]
        self._start("mariadbd", "--no-defaults", *words, "--bind-address=127.0.0.1", "--skip-grant-tables")
        _until(lambda: (self.folder / "database.socket").exists(), 60, "the database opens its socket")
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(_DATABASE.format(host=host, folder=self.folder, port=port, storage=storage))
        conf.chmod(0o600)
        self._start("slurmdbd", "-D")

        def added() -> bool:
            self.call("sacctmgr", "--immediate", "add", "cluster", "tokscale", check=False)
            return "tokscale" in self.call("sacctmgr", "--noheader", "list", "cluster", "format=cluster", check=False)

        _until(added, 60, "slurmdbd answers")

    def _start(self, program: str, *words: str) -> None:
        with open(self.folder / f"{program}.out", "ab") as output:
            command = [shutil.which(program, path=_PATH) or program, *words]
            self._daemons.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=self.environ, preexec_fn=_die_with_parent)
            )


def sweep(folder: Path) -> None:
    """End what is left of a cluster: whoever carries its configuration in its environment."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


def _until(condition, seconds: float, what: str, shown=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds:.0f} s: {what} {shown()}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    if sys.argv[1] == "--sweep-after-input":
        sys.stdin.read()
        sweep(Path(sys.argv[2]))
        sys.exit()
    if (why := missing()) is not None:
        sys.exit(why)
    with LocalCluster(Path(sys.argv[1])) as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf", flush=True)
        signal.sigwait([signal.SIGINT, signal.SIGTERM])
