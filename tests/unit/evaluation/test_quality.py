"""PSNR, SSIM and the Fréchet distance against torchmetrics and closed forms."""

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from vqgan_models import images, make

from tokscale.base.errors import CheckpointError, DataError
from tokscale.base.rng import generator
from tokscale.base.trust import allow_torchscript
from tokscale.evaluation.quality import frechet_distance, psnr, quality, reconstructed, ssim
from tokscale.tokenizers.codec import FrozenImageTokenizer


def pair(size=24, batch=70, channels=3):
    draw = generator(0, "pictures")
    a = torch.randint(0, 256, (batch, channels, size, size), generator=draw)
    b = (a + torch.randint(-40, 41, a.shape, generator=draw)).clamp(0, 255)
    return a.to(torch.uint8), b.to(torch.uint8)


def test_psnr_and_ssim_equal_torchmetrics():
    a, b = pair()
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b.double(), a.double(), data_range=255.0).item())
    expected = structural_similarity_index_measure(b.double(), a.double(), data_range=255.0).item()
    assert ssim(a, b) == pytest.approx(expected, rel=1e-5)
    assert ssim(a, a) == pytest.approx(1) and psnr(a, a) > 100


def test_small_and_grey_images_have_a_similarity_too():
    a, b = pair(size=8, channels=1)
    assert 0 < ssim(a, b) < 1


def test_frechet_distance_of_normal_distributions():
    draw = generator(0, "vectors")
    a = torch.randn(20_000, 3, generator=draw).double()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-9)
    # For covariances that commute the distance is the sum of squared differences of standard deviations.
    scaled = a * torch.tensor([2.0, 0.5, 1.0])
    assert frechet_distance(a, scaled) == pytest.approx(1.25, rel=0.03)
    mixed = a @ torch.randn(3, 3, generator=draw).double()
    cov = torch.cov(a.T) @ torch.cov(mixed.T)
    trace = torch.linalg.eigvals(cov).real.clamp_min(0).sqrt().sum()
    expected = (
        (a.mean(0) - mixed.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(mixed.T).trace() - 2 * trace
    )
    assert frechet_distance(a, mixed) == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(a[:1], a)


class Extractor(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = images.float().mean(dim=(2, 3))
        return means if return_features else means[:, :1]


def test_rfid_reads_a_program_from_a_path_and_names_it_when_it_cannot(tmp_path):
    a, b = pair()
    torch.jit.script(Extractor()).save(str(tmp_path / "features.pt"))
    with allow_torchscript():
        found = quality(a, b, tmp_path / "features.pt")
    expected = frechet_distance(a.float().mean(dim=(2, 3)), b.float().mean(dim=(2, 3)))
    assert found["rfid"] == pytest.approx(expected) and set(quality(a, b)) == {"psnr", "ssim"}
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such file"):
        quality(a, b, tmp_path / "nothing.pt")


def test_images_go_through_their_codes_a_few_at_a_time():
    tokenizer = FrozenImageTokenizer(make())
    batch = images(batch=70).pixels
    codes, rebuilt = reconstructed(tokenizer, batch)
    assert torch.equal(codes[-6:], tokenizer.encode(batch[-6:])) and rebuilt.shape == batch.shape
