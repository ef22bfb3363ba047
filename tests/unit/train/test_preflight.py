"""What is wrong with a machine is found before training, and said with the machine's name."""

import dataclasses
import time

import pytest
import torch

from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import NodesRefusedError
from tokscale.dist.testing import run_ranks
from tokscale.train import preflight as module
from tokscale.train import probes
from tokscale.train.preflight import (
    Finding,
    PreflightConfig,
    available_memory,
    check_host_memory,
    code_fingerprint,
    device_problems,
    differences,
    free_space,
    judge_findings,
    package_versions,
    preflight,
    read_health,
    unreadable,
)
from tokscale.train.probes import exchanges, product, ring_pairs

# Of a machine with one faulty GPU, shortened; the layout is that of driver 570.
REPORT = """
==============NVSMI LOG==============
Driver Version                            : 570.86
Attached GPUs                             : 2
GPU 00000000:18:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    GPU Recovery Action                   : None
    ECC Errors
        Volatile
            SRAM Correctable              : 3
            SRAM Uncorrectable Parity     : 0
            DRAM Uncorrectable            : 0
        Aggregate
            DRAM Uncorrectable            : 5
    Remapped Rows
        Pending                           : No
        Remapping Failure Occurred        : No
GPU 00000000:2A:00.0
    GPU Recovery Action                   : Reset
    ECC Errors
        Volatile
            DRAM Uncorrectable            : 2
        Aggregate
            DRAM Uncorrectable            : 2
    Remapped Rows
        Pending                           : Yes
        Remapping Failure Occurred        : No
"""


def finding(rank: int, **values) -> Finding:
    fields = {"identity": {"code": "a" * 64}, "clock": 1000.0, "seconds": 0.1, "problems": []} | values
    return Finding(rank, f"n{rank}", **fields)


def test_a_report_of_nvidia_smi_is_read_for_what_is_wrong_now():
    assert read_health(REPORT) == [
        "GPU 00000000:2A:00.0: GPU Recovery Action: Reset",
        "GPU 00000000:2A:00.0: ECC Errors / Volatile / DRAM Uncorrectable: 2",
        "GPU 00000000:2A:00.0: Remapped Rows / Pending: Yes",
    ]


def test_a_machine_without_nvidia_smi_has_nothing_to_report(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_problems(required=True) == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Unable to determine the device handle'\nexit 15\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert device_problems(required=False) == []
    assert device_problems(required=True) == ["nvidia-smi fails: Unable to determine the device handle"]


def test_who_is_outvoted_is_named_and_a_tie_names_both():
    other = {"identity": {"code": "b" * 64}}
    lines, outvoted = differences([finding(0), finding(1, **other), finding(2)])
    assert not lines and outvoted == {"n1": ["code is bbbbbbbbbbbb there and aaaaaaaaaaaa elsewhere"]}
    lines, outvoted = differences([finding(0), finding(1, **other)])
    assert lines == ["code differs: aaaaaaaaaaaa on n0; bbbbbbbbbbbb on n1"] and not outvoted


def test_a_clock_that_is_off_and_a_link_that_is_slow():
    config = PreflightConfig(min_bandwidth_mib=100)
    lines, nodes = judge_findings(config, [finding(0), finding(1, clock=1100.0), finding(2, clock=1001.0)])
    assert nodes == ["n1"] and lines == ["node n1: its clock is +99 s off; the limit is 30.0 s"]
    lines, nodes = judge_findings(config, [finding(0), finding(1, seconds=1.0)])
    assert nodes == [] and "reaches 16 MiB/s" in lines[0]
    assert judge_findings(config, [finding(0), finding(1)]) == ([], [])


def test_a_slow_gpu_names_its_node():
    found = [finding(rank, product_seconds=0.01) for rank in range(3)]
    assert judge_findings(PreflightConfig(), found) == ([], [])
    lines, nodes = judge_findings(PreflightConfig(), [*found, finding(3, product_seconds=0.03)])
    assert nodes == ["n3"] and lines == ["node n3: the GPU of rank 3 takes 3.0 times the median for a product"]
    assert judge_findings(PreflightConfig(max_slowness=4), [*found, finding(3, product_seconds=0.03)]) == ([], [])


def on_a_ring(seconds: dict[tuple[int, int], float], nodes: int) -> list[Finding]:
    pairs = [(node, (node + 1) % nodes) for node in range(nodes)]
    links: list[dict[str, float]] = [{} for _ in range(nodes)]
    for first, second in pairs:
        taken = seconds.get((first, second), 0.01)
        links[first][f"n{second}"] = links[second][f"n{first}"] = taken
    return [finding(node, product_seconds=0.01, links=links[node]) for node in range(nodes)]


def test_a_node_is_slow_when_all_its_links_are():
    config = PreflightConfig()
    assert judge_findings(config, on_a_ring({(1, 2): 0.05}, 5)) == ([], [])  # either end may be to blame
    lines, nodes = judge_findings(config, on_a_ring({(1, 2): 0.05, (2, 3): 0.04}, 5))
    assert nodes == ["n2"] and lines == ["node n2: its links to other nodes reach 400 MiB/s at best, most reach 1600"]


@pytest.mark.parametrize("nodes", [2, 3, 4, 7])
def test_every_node_talks_to_both_neighbours_and_to_one_at_a_time(nodes):
    talked = set()
    for pairs in ring_pairs(nodes):
        assert all(pairs[other] == node for node, other in pairs.items())
        talked |= {frozenset(pair) for pair in pairs.items()}
    assert talked == {frozenset((node, (node + 1) % nodes)) for node in range(nodes)}


def test_a_product_that_is_wrong_in_one_element_is_seen(monkeypatch):
    assert product(torch.device("cpu")) == (0.0, [])
    real = torch.Tensor.__matmul__

    def broken(first, second):
        result = real(first, second)
        if result.dtype == torch.float32:
            result[5, 7] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert "a product of matrices came out wrong here" in product(torch.device("cpu"))[1][0]


def talk(comm: Comm) -> list[str]:
    comm.env = ProcessEnv(**comm.env.__dict__ | {"node": comm.rank, "nodes": comm.world, "local_rank": 0})
    probes.node_name = lambda: f"n{comm.rank}"
    links, problems = exchanges(comm, 4096)
    real = comm.exchange
    if comm.rank == 1:
        comm.exchange = lambda message, rank: real(message, rank) + 1
    return [" ".join(links), *problems, *exchanges(comm, 4096)[1]]


def test_a_message_that_arrives_changed_is_told_by_whoever_got_it():
    first, second = run_ranks(talk, 2)
    assert first == ["n1"]
    assert second == ["n0", "a message from node n0 arrived changed; look at the network between them"]


def test_disk_inodes_and_files(tmp_path):
    (tmp_path / "data.tar").write_bytes(b"x" * 1000)
    assert free_space(PreflightConfig(min_free_gib=0), tmp_path) == []
    assert "GiB are free, preflight.min_free_gib=1e+09" in free_space(PreflightConfig(min_free_gib=1e9), tmp_path)[0]
    assert "No such file" in free_space(PreflightConfig(), tmp_path / "missing")[0]
    assert unreadable([tmp_path / "data.tar"]) == []
    assert "is the file system mounted there?" in unreadable([tmp_path / "data.tar", tmp_path / "gone.tar"])[0]


def test_code_and_packages_have_a_fingerprint():
    assert code_fingerprint() == code_fingerprint() and len(code_fingerprint()) == 64
    assert package_versions()["torch"] != "none"


def test_alone_there_is_nothing_to_compare(tmp_path):
    assert preflight(PreflightConfig(), Comm(ProcessEnv()), folder=tmp_path, files=list, settings={}) == {}
    metrics = preflight(PreflightConfig(when="always"), Comm(ProcessEnv()), folder=tmp_path, files=list, settings={})
    assert metrics["bandwidth_mib"] > 0 and metrics["clock_skew_seconds"] == 0


def on_two_ranks(comm: Comm, folder) -> list[str]:
    def tried(**values) -> str:
        config = PreflightConfig(**{"min_free_gib": 0, "transfer_mib": 0.1, "exclude_bad_nodes": True} | values)
        module.node_name = lambda: f"n{comm.rank}"

        def files() -> list:
            return [folder / "data.tar", folder / "gone.tar"]  # one for each rank

        try:
            settings = {"configuration": "same"}
            metrics = preflight(config, comm, folder=folder, files=files, settings=settings)
        except NodesRefusedError as error:
            return f"{error.nodes} {error}"
        return " ".join(metrics)

    passed = tried(files_per_rank=0)
    unread = tried()
    if comm.rank == 1:
        real = time.time
        module.time = type("Clock", (), {"time": staticmethod(lambda: real() + 500), "perf_counter": time.perf_counter})
    return [passed, unread, tried(files_per_rank=0)]


def test_two_ranks_hear_the_same_verdict(tmp_path):
    (tmp_path / "data.tar").write_bytes(b"x")
    first, second = run_ranks(on_two_ranks, 2, tmp_path)
    assert first == second and first[0] == "bandwidth_mib clock_skew_seconds"
    assert first[1].startswith("('n1',)") and "node n1: " in first[1] and "gone.tar: No such file" in first[1]
    assert "node n1: its clock is +2" in first[2] and "node n0: its clock is -2" in first[2]  # of two, neither is right


@pytest.mark.parametrize("when", ["never", "several"])
def test_it_can_be_left_out(tmp_path, when):
    config = PreflightConfig(when=when, min_free_gib=1e9)
    assert preflight(config, Comm(ProcessEnv()), folder=tmp_path, files=list, settings={}) == {}


def in_two_nodes(comm: Comm, folder) -> str:
    comm.env = dataclasses.replace(comm.env, node=comm.rank // 2, nodes=2, local_rank=comm.rank % 2, local_world=2)
    module.node_name = lambda: f"n{comm.env.node}"
    free = folder / f"meminfo{comm.env.node}"
    try:
        check_host_memory(PreflightConfig(), comm, 1 << 29, meminfo=free)
    except NodesRefusedError as error:
        return str(error)
    return ""


def test_a_node_whose_memory_cannot_hold_what_its_ranks_make_is_named(tmp_path):
    (tmp_path / "meminfo0").write_text("MemTotal: 9 kB\nMemAvailable: 1048576 kB\n")
    (tmp_path / "meminfo1").write_text("MemTotal: 9 kB\nMemAvailable: 1000000 kB\n")
    words = run_ranks(in_two_nodes, 4, tmp_path, fork=True)
    assert all(said == words[0] for said in words)
    assert "node n1: making the model takes 1.0 GiB of host memory for 2 ranks, and 1.0 GiB are free" in words[0]
    assert "node n0" not in words[0] and "engine.sharded_init=true" in words[0]
    assert available_memory() and available_memory(tmp_path / "none") != 0
