"""What preflight measures of each machine: a product of matrices on its devices, and the links to its neighbours."""

import time
from collections.abc import Iterator

import torch

from tokscale.dist.comm import Comm
from tokscale.dist.slurm import node_name

_PRODUCTS = 20


def product(device: torch.device) -> tuple[float, list[str]]:
    """Multiply fixed matrices of small integers, which every arithmetic computes exactly.

    Returns:
        Seconds of one product, 0 on a CPU; and whether it is wrong.
    """
    cuda = device.type == "cuda"
    size = 2048 if cuda else 128
    draw = torch.Generator().manual_seed(0)
    first, second, probe = (
        torch.randint(-4, 5, shape, generator=draw).float().to(device) for shape in ((size, size),) * 2 + ((size,),)
    )
    result, seconds = first @ second, 0.0
    if cuda:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            result = first @ second
        torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - began) / _PRODUCTS
    # (AB)x = A(Bx), which is quick to compute twice and wrong for almost every x when an element of AB is.
    expected = first.double() @ (second.double() @ probe.double())
    right = torch.equal(result.double() @ probe.double(), expected)
    return seconds, [] if right else [
        "a product of matrices came out wrong here; look at this machine's GPU and memory"
    ]


def exchanges(comm: Comm, size: int) -> tuple[dict[str, float], list[str]]:
    """Exchange a message of `size` bytes between the first ranks of neighbouring nodes. Collective.

    Each node has two neighbours on a ring, so that a bad link can be told from a bad node.

    Returns:
        Seconds by the other node's name; and what arrived changed.
    """
    if comm.env.nodes < 2:
        return {}, []
    place = (comm.env.local_rank, comm.rank, node_name())
    leaders = comm.decide("preflight", place, lambda places: [place for place in places if place[0] == 0])
    own = next((number for number, place in enumerate(leaders) if place[1] == comm.rank), None)
    seconds, problems = {}, []
    for others in ring_pairs(len(leaders)):
        comm.barrier()
        if own not in others:
            continue
        _, rank, node = leaders[others[own]]
        message = torch.full((max(size // 4, 1),), float(comm.rank + 1), device=comm.device)
        comm.exchange(message[:1], rank)  # the first one builds the connection
        began = time.perf_counter()
        right = bool((comm.exchange(message, rank) == rank + 1).all())  # also waits for the device
        seconds[node] = time.perf_counter() - began
        problems += [] if right else [f"a message from node {node} arrived changed; look at the network between them"]
    return seconds, problems


def ring_pairs(nodes: int) -> Iterator[dict[int, int]]:
    """Rounds in which every node talks to one other at most, and after which it has to both of its neighbours."""
    links = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    while links:
        pairs: dict[int, int] = {}
        for first, second in [*links]:
            if first not in pairs and second not in pairs:
                pairs |= {first: second, second: first}
                links.remove((first, second))
        yield pairs
