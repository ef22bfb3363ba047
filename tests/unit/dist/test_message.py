"""A step's message: sums over ranks under the right names, whatever the types, in one reduction."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.dist.message import Message
from tokscale.dist.testing import run_ranks


class Reductions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("c10d.allreduce")
        return func(*args, **(kwargs or {}))


def told(comm: Comm):
    # The same names with other types on the other rank: a place must follow from the name alone.
    dtype = torch.float64 if comm.is_main else torch.float32
    values = {
        "ones": torch.ones((), dtype=dtype),
        "flag": torch.tensor(comm.is_main),
        "rank": float(comm.rank),
        "own": [0.5 * (rank == comm.rank) for rank in range(comm.world)],
        "late": torch.tensor(comm.rank + 1),
    }
    with Reductions() as reductions:
        message = Message(comm, values)
        assert message.total("late").item() == sum(range(1, comm.world + 1))
    return message.totals, message.several("own"), reductions.count


def test_every_value_is_summed_under_its_name_in_one_reduction():
    for totals, own, reductions in run_ranks(told, 2):
        assert totals == {"ones": 2.0, "flag": 1.0, "rank": 1.0, "late": 3.0}
        assert own == [0.5, 0.5] and reductions == 1


def test_a_single_process_tells_itself_and_sends_nothing():
    totals, own, reductions = told(Comm(ProcessEnv()))
    assert totals == {"ones": 1.0, "flag": 1.0, "rank": 0.0, "late": 1.0}
    assert own == [0.5] and reductions == 0
