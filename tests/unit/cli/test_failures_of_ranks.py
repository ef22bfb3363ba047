"""What a rank says when another one is gone: one sentence and a code of its own, never this program's defect."""

import pytest
import torch.distributed as torch_dist

from tokscale.base.errors import EnvironmentRefused, PeerLostError
from tokscale.cli.failures import explain, understood
from tokscale.dist.slurm import NodesRefusedError
from tokscale.runs.outcome import comes_again

GONE = [
    # gloo, in the middle of an exchange and while connecting
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:513: Connection reset by peer",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation",
    "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
    "writev [10.0.0.2]:513: Broken pipe",
    # NCCL and the store
    "NCCL communicator was aborted on rank 0.",
    "NCCL error in: ../ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error",
    "failed to recv, got 0 bytes",
    "recvValue failed on SocketImpl(fd=5, addr=[localhost]:1, remote=[localhost]:2): Connection was reset",
]


@pytest.mark.parametrize("reason", GONE)
def test_a_lost_rank_is_said_in_a_sentence_with_its_own_code(reason):
    code, said = explain(RuntimeError(reason))
    assert code == 76 and said.startswith("another rank is gone") and "goes on from the newest checkpoint" in said
    assert isinstance(understood(RuntimeError(reason)), PeerLostError)


@pytest.mark.parametrize("kind", [torch_dist.DistBackendError, torch_dist.DistNetworkError, torch_dist.DistStoreError])
def test_torchs_own_classes_are_known_whatever_they_say(kind):
    assert explain(kind("something new"))[0] == 76


def test_a_port_that_is_taken_is_the_machines_affair():
    error = torch_dist.DistNetworkError("The server socket has failed to listen (errno: 98 - Address already in use)")
    assert isinstance(understood(error), EnvironmentRefused) and "MASTER_PORT" in explain(error)[1]


def test_an_ordinary_defect_stays_one():
    assert explain(RuntimeError("shapes do not match"))[0] == 1


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "Unable to determine the device handle for GPU 0000:4E:00.0: GPU is lost.  Reboot the system",
        "CUDA error: hardware stack error",
    ],
)
def test_a_gpu_that_breaks_on_the_way_costs_its_node_not_the_run(monkeypatch, reason):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-a07")
    error = understood(RuntimeError(reason))
    assert isinstance(error, NodesRefusedError) and error.nodes == ("gpu-a07",) and comes_again(error)
    assert explain(RuntimeError(reason))[0] == 69 and "a GPU of gpu-a07 is broken" in str(error)


@pytest.mark.parametrize(
    "reason", ["CUDA error: an illegal memory access was encountered", "device-side assert triggered"]
)
def test_what_a_program_does_wrong_on_a_gpu_would_come_again_anywhere(reason):
    assert not comes_again(understood(RuntimeError(reason)))
