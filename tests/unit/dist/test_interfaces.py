"""The interface that gloo and NCCL are going to use joins the nodes, or who does not reach the first one is named."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokscale.dist import interfaces
from tokscale.dist.env import ProcessEnv
from tokscale.dist.interfaces import addresses, gloo_address, matches, problem_of_names, refuse_unreachable
from tokscale.dist.slurm import NodesRefusedError


def free_port() -> int:
    """A rendezvous port whose companion is free."""
    while True:
        env = ProcessEnv(master_port=12000 + free_port.tried)
        free_port.tried += 1
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", interfaces._port(env)))
            except OSError:
                continue
        return env.master_port


free_port.tried = 0


def on_nodes(*environs: dict[str, str], launcher: str = "slurm") -> list[NodesRefusedError | None]:
    """What one rank of each node hears; node `n0` is the first."""
    port = free_port()

    def look(node: int) -> NodesRefusedError | None:
        env = ProcessEnv(rank=node, world=len(environs), node=node, nodes=len(environs), master_port=port)
        env = ProcessEnv(**env.__dict__ | {"launcher": launcher})
        try:
            refuse_unreachable(env, {"SLURMD_NODENAME": f"n{node}"} | environs[node])
        except NodesRefusedError as error:
            return error
        return None

    with ThreadPoolExecutor(len(environs)) as pool:
        return list(pool.map(look, range(len(environs))))


def test_nodes_that_reach_the_first_one_go_on():
    lo = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert on_nodes(lo, lo, lo) == [None] * 3
    assert on_nodes({}, {}) == [None, None]  # by the host name, as gloo does
    assert on_nodes({"GLOO_SOCKET_IFNAME": "ib7"}, {}, launcher="torchrun") == [None, None]  # not ours to check


def test_every_node_hears_which_one_lacks_the_interface():
    lo = {"GLOO_SOCKET_IFNAME": "lo"}
    heard = on_nodes(lo, {"GLOO_SOCKET_IFNAME": "ib7"}, lo)
    for error in heard:
        assert error is not None and error.nodes == ("n1",)
        assert "node n1: GLOO_SOCKET_IFNAME=ib7 is none of its interfaces lo" in str(error)
        assert "cluster.interface=NAME" in str(error)
    heard = on_nodes({"NCCL_SOCKET_IFNAME": "ib"}, lo, lo)
    assert all(error is not None and error.nodes == ("n0",) for error in heard)
    # Wrong everywhere: it is the key, and no node is to blame.
    heard = on_nodes(*[{"GLOO_SOCKET_IFNAME": "ib7"}] * 2)
    assert all(error is not None and error.nodes == () and "node n0" in str(error) for error in heard)


def test_an_address_that_does_not_answer_or_is_another_machines():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = str(closed.getsockname()[1])
    first = {"node": "n0", "address": "127.0.0.1", "port": port, "token": "a"}
    told = interfaces._reach(first, {"GLOO_SOCKET_IFNAME": "lo"})
    assert told.startswith("lo (127.0.0.1) does not reach the first node n0 at 127.0.0.1: ")
    answer = interfaces._Answer("127.0.0.1", "n0")
    try:
        words = json.loads(answer.words)
        assert interfaces._reach(words, {"GLOO_SOCKET_IFNAME": "lo"}) == ""
        assert "reaches another machine" in interfaces._reach(words | {"token": "b"}, {"GLOO_SOCKET_IFNAME": "lo"})
    finally:
        answer.close()


def test_names_as_gloo_and_nccl_read_them():
    assert gloo_address({"GLOO_SOCKET_IFNAME": "lo,eth0"}) == "127.0.0.1" == addresses("lo")[0]
    assert addresses("nothing0") == [] and problem_of_names({}) == ""
    assert "is none of its interfaces" in problem_of_names({"GLOO_SOCKET_IFNAME": "lo,ib7"})


@pytest.mark.parametrize(
    ("pattern", "name", "means"),
    [
        ("eth", "eth0", True),
        ("=eth", "eth0", False),
        ("=eth0,lo", "lo", True),
        ("ib,eth", "eth1", True),
        ("^docker,lo", "lo", False),
        ("^docker,lo", "eth0", True),
        ("^=lo", "lo1", True),
    ],
)
def test_a_pattern_of_nccl(pattern, name, means):
    assert matches(pattern, name) == means
