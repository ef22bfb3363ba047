"""What the ledger must catch: each fault it is there for, made on purpose."""

import pytest
import torch
import torch.nn.functional as F
from allowed import check
from ledger import DEVICE, Ledger

from tokscale.nn.attention.sdpa import fused_attention

pytestmark = pytest.mark.usefixtures("cuda")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.bincount(x.long(), minlength=4),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(3).copy_(x[:3]),
    ],
)
def test_a_wait_for_the_device_is_seen(read) -> None:
    with Ledger() as ledger:
        read(ones(4))
    assert ledger.reads
    with pytest.raises(AssertionError, match="waits for the device"):
        check(ledger, "this test")


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.tensor([1, 2, 3], device=DEVICE),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.arange(4, device="cpu").to(DEVICE),
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_a_copy_to_the_device_is_seen(copy) -> None:
    with Ledger() as ledger:
        copy(ones(4))
    with pytest.raises(AssertionError, match="copies to the device"):
        check(ledger, "this test")


def test_what_stays_on_the_device_is_allowed() -> None:
    with Ledger() as ledger:
        (ones(4, 4) @ ones(4, 4)).relu()[1:, 2].sum()
    check(ledger, "this test")
    assert not ledger.reads and not ledger.copies and ledger.kernels == 5  # two ones, a product, a rectifier, a sum


def test_another_device_is_an_error() -> None:
    with pytest.raises(Exception, match="same device"):
        torch.add(ones(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="operands on"):
        F.scaled_dot_product_attention(ones(1, 1, 2, 4), ones(1, 1, 2, 4), ones(1, 1, 2, 4), torch.ones(2, 2) > 0)


def test_operands_of_two_types_are_an_error() -> None:
    half = ones(4, 4, dtype=torch.bfloat16)
    with Ledger(), pytest.raises(RuntimeError, match="operands of"):
        torch.mm(ones(4, 4), half)
    q = ones(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="operands of"):
        F.scaled_dot_product_attention(q, q, q.bfloat16())


def test_training_under_a_mask_by_cudnn_is_an_error() -> None:
    q, seen = ones(1, 1, 2, 4), ones(2, 2) > 0
    F.scaled_dot_product_attention(q, q, q, seen)
    with pytest.raises(RuntimeError, match="gives NaN"):
        F.scaled_dot_product_attention(q.requires_grad_(), q, q, seen)
    fused_attention(q, q, q, seen).sum().backward()
    assert torch.backends.cuda.cudnn_sdp_enabled(), "it is as fast as any where there is no mask"


def test_what_travels_in_pinned_memory_holds_nobody_up() -> None:
    with Ledger() as ledger:
        torch.tensor([1.0], pin_memory=True).to(DEVICE, non_blocking=True)
        torch.empty(4, pin_memory=True).copy_(ones(4), non_blocking=True)
    check(ledger, "this test")
    for wait in (lambda: torch.tensor([1.0], pin_memory=True).to(DEVICE), lambda: torch.empty(4).copy_(ones(4))):
        with Ledger() as ledger:
            wait()
        with pytest.raises(AssertionError, match="not in tests/fake_cuda"):
            check(ledger, "this test")
