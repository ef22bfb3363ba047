"""A CLIP of the transformers library measures as the library itself says."""

import pytest
import torch
from text_encoders import save_clip

from tokscale.base.errors import CheckpointError
from tokscale.base.rng import generator
from tokscale.inference.foreign_clip import ForeignClip, load_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"), whole=True)


def test_vectors_are_the_librarys(folder):
    from transformers import AutoTokenizer, CLIPModel

    clip = load_clip(folder)
    assert isinstance(clip, ForeignClip)
    captions = ["a red circle", "a small green cat on the mat the mat the mat"]
    pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=generator(0, "clip"), dtype=torch.uint8)
    told = AutoTokenizer.from_pretrained(folder)(
        captions, padding=True, truncation=True, max_length=7, return_tensors="pt"
    )
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (clip.mean, clip.std))
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder)(**told, pixel_values=(pixels / 255 - mean) / std)
    assert torch.allclose(clip.encode_captions(captions), out.text_embeds, atol=1e-6)
    assert torch.allclose(clip.encode_images(pixels), out.image_embeds, atol=1e-6)


def test_images_of_another_size_are_scaled(folder):
    clip = load_clip(folder)
    assert clip.encode_images(torch.full((3, 1, 20, 30), 128, dtype=torch.uint8)).shape == (3, 8)


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be read as a CLIP"):
        load_clip(tmp_path)
