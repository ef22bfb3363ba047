"""Finished parts are made once, only for the request they answer, and a torn one is made again."""

import torch

from tokscale.runs.parts import Parts


def test_a_part_is_made_once_for_its_request(tmp_path):
    made = []

    def make(value: float):
        made.append(value)
        return torch.full((2, 3), value)

    parts = Parts(tmp_path / "parts", "a" * 64)
    first = parts.tensor("x", lambda: make(1.0))
    assert torch.equal(Parts(tmp_path / "parts", "a" * 64).tensor("x", lambda: make(2.0)), first) and made == [1.0]
    assert parts.values("y", lambda: {"loss": 0.1}) == parts.values("y", lambda: {"loss": 0.2}) == {"loss": 0.1}
    (torn,) = tmp_path.rglob("x.safetensors")
    torn.write_bytes(torn.read_bytes()[:20])
    assert torch.equal(parts.tensor("x", lambda: make(3.0)), torch.full((2, 3), 3.0))
    other = Parts(tmp_path / "parts", "b" * 64)
    assert other.values("y", lambda: {"loss": 0.3}) == {"loss": 0.3}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 0  # those of the other request are gone
    other.clear()
    assert not (tmp_path / "parts").exists()
