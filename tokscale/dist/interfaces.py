"""Whether the nodes of a job reach each other over the network interface that gloo and NCCL are going to use.

Both say it late and badly: gloo offers what the host name resolves to, which on many machines is 127.0.1.1 or a slow
network, and then fails to connect; NCCL times out. So before the process group stands, one rank of each node connects
from that interface to the first node's, and all hear what came of it.
"""

import fcntl
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from tokscale.base.log import logger
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import NodesRefusedError, node_name

log = logger("interfaces")

_ANSWER_SECONDS = 10.0
_JOIN_SECONDS = 3600.0
"""As long as the process group itself waits for the last rank."""
_SIOCGIFADDR = 0x8915
_ADVICE = "choose one that joins the nodes by cluster.interface=NAME (`ip -brief address` lists them)"


def refuse_unreachable(env: ProcessEnv, environ: Mapping[str, str] = os.environ) -> None:
    """Let one rank of each node reach the first node as gloo will, where a scheduler started us on several nodes.

    Collective over the first rank of each node; the others go on.

    Raises:
        NodesRefusedError: On every node, naming each that does not reach the first one, and why.
    """
    if env.launcher != "slurm" or env.nodes < 2 or env.local_rank != 0:
        return
    timeout = timedelta(seconds=_JOIN_SECONDS)
    store = TCPStore(env.master_addr, _port(env), None, env.is_main, timeout, wait_for_workers=False)
    own = problem_of_names(environ)
    if env.is_main:
        with closing(_Answer("" if own else gloo_address(environ), node_name(environ))) as answer:
            store.set("first", answer.words)
            store.set("node/0", json.dumps([node_name(environ), own]))
            told = [json.loads(store.get(f"node/{node}")) for node in range(env.nodes)]
            first_node, problems = node_name(environ), {name: problem for name, problem in told if problem}
            store.set("verdict", json.dumps(problems))
            for node in range(1, env.nodes):  # who leaves takes the store with it
                store.get(f"heard/{node}")
    else:
        first = json.loads(store.get("first"))
        own, first_node = own or _reach(first, environ), first["node"]
        store.set(f"node/{env.node}", json.dumps([node_name(environ), own]))
        problems = json.loads(store.get("verdict"))
        store.set(f"heard/{env.node}", "yes")
    if problems:
        lines = "\n".join(f"  node {name}: {problem}" for name, problem in sorted(problems.items()))
        # Where no node but the first is well, it is the choice of the interface that is wrong, or the first node.
        few = len(problems.keys() - {first_node}) < env.nodes - 1
        raise NodesRefusedError(
            f"preflight refused this job:\n{lines}\n  {_ADVICE}", sorted(problems) if few else ()
        )


def problem_of_names(environ: Mapping[str, str]) -> str:
    """What is wrong with the interfaces that are named here; empty when nothing is."""
    here = [name for _, name in socket.if_nameindex()]
    for name in _named(environ):
        if name not in here:
            return f"GLOO_SOCKET_IFNAME={name} is none of its interfaces {', '.join(here)}"
        if not addresses(name):
            return f"GLOO_SOCKET_IFNAME={name} has no address, it may be down"
    asked = environ.get("NCCL_SOCKET_IFNAME", "")
    if asked and not any(matches(asked, name) for name in here):
        return f"NCCL_SOCKET_IFNAME={asked} is none of its interfaces {', '.join(here)}"
    return ""


def matches(pattern: str, name: str) -> bool:
    """Whether NCCL's `NCCL_SOCKET_IFNAME` means an interface: prefixes, `=` for whole names, `^` for all but these."""
    negated, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    parts = pattern.lstrip("^=").split(",")
    return any(name == part if exact else name.startswith(part) for part in parts) != negated


def gloo_address(environ: Mapping[str, str]) -> str:
    """The address that gloo offers to others: of its interface, else of the host name, else the loopback's."""
    for name in _named(environ):
        return addresses(name)[0]
    try:
        found = [str(place[4][0]) for place in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    return next((address for address in found if _is_own(address)), "127.0.0.1")


def addresses(name: str) -> list[str]:
    """An interface's addresses, IPv4 first."""
    return [*_ipv4(name), *_ipv6(name)]


def _named(environ: Mapping[str, str]) -> list[str]:
    return [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]


def _ipv4(name: str) -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            told = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return
        yield socket.inet_ntoa(told[20:24])


def _ipv6(name: str) -> Iterator[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return
    for digits, _, _, scope, _, interface in (line.split() for line in lines):
        if interface == name and scope != "20":  # those of a link alone name no machine
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))


def _is_own(address: str) -> bool:
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as tried:
            tried.bind((address, 0))
    except OSError:
        return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _port(env: ProcessEnv) -> int:
    """Beside the rendezvous port's range, and with it another one at each start."""
    return 10000 + (env.master_port - 12000) % 2000


def _reach(first: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Why the first node does not answer to an address of this one; empty when it does."""
    if not first["address"]:
        return ""  # the first node has told its own problem
    own, place = gloo_address(environ), (first["address"], int(first["port"]))
    interface = environ.get("GLOO_SOCKET_IFNAME") or "its host name's interface"
    try:
        with socket.create_connection(place, timeout=_ANSWER_SECONDS, source_address=(own, 0)) as line:
            heard = line.makefile("rb").readline().decode(errors="replace").strip()
    except OSError as error:
        return f"{interface} ({own}) does not reach the first node {first['node']} at {first['address']}: {error}"
    if heard == first["token"]:
        return ""
    return f"{interface} ({own}) reaches another machine than the first node {first['node']} at {first['address']}"


class _Answer:
    """The first node's side: whoever connects is told a token, so that it knows whom it has reached."""

    def __init__(self, address: str, node: str):
        self._token = secrets.token_hex(8)
        self._socket = socket.create_server((address, 0), family=_family(address)) if address else None
        port = self._socket.getsockname()[1] if self._socket else 0
        words = {"node": node, "address": address, "port": str(port), "token": self._token}
        self.words = json.dumps(words)
        if self._socket is not None:
            threading.Thread(target=self._serve, name="interfaces", daemon=True).start()

    def _serve(self) -> None:
        assert self._socket is not None
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:  # closed
                return
            with line:
                line.sendall(f"{self._token}\n".encode())

    def close(self) -> None:
        """Answer no more."""
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
