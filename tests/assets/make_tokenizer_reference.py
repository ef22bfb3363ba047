"""Writes `reference/tokenizer_cases.npz`: what published tokenizers' own code computes, for the parity tests.

Run it with these sources at hand (their `taming/`, `tokenizer_image/`, `rqvae/` and `dall_e/` folders on PYTHONPATH):
CompVis/taming-transformers 3ba01b2, FoundationVision/LlamaGen ce98ec4 (add its `tokenizer/tokenizer_image`),
kakaobrain/rq-vae-transformer 341395e, openai/DALL-E 5be4b23, and the attrs package:
`PYTHONPATH=... python tests/assets/make_tokenizer_reference.py`.

Weights are not stored: `filled` computes them from a tensor's name and shape, here and in the tests.
"""

import importlib
import importlib.util
import json
import re
import sys
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "reference"
SIDE, BATCH, CODES, LEVELS = 16, 2, 20, 3
NETWORK = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8, "resolution": SIDE}
EMBED = 4
OPENAI = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights for each name: uniform numbers whose scale keeps signals alive. Shared codebooks are equal."""
    tensors = {}
    for name, shape in shapes.items():
        seed = zlib.crc32(re.sub(r"codebooks\.\d+", "codebooks", name).encode())
        values = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1
        if len(shape) == 4:
            values *= (3 / np.prod(shape[1:])) ** 0.5
        elif len(shape) < 2:
            values = values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        tensors[name] = values
    return tensors


def fill(model: nn.Module) -> dict[str, list[int]]:
    """Set a model's weights to `filled`; return the shapes by name."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(filled(shapes))
    model.eval()
    return {name: list(shape) for name, shape in shapes.items()}


def images() -> Tensor:
    """Two images of coloured squares, 0 to 255."""
    shape = (BATCH, 3, SIDE // 4, SIDE // 4)
    squares = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return squares.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


class Taming(nn.Module):
    """`VQModel` of taming-transformers without PyTorch Lightning: the same modules under the same names."""

    def __init__(self, *, gumbel: bool):
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

        sizes = {**NETWORK, "attn_resolutions": [8], "in_channels": 3, "out_ch": 3, "double_z": False}
        self.encoder, self.decoder = Encoder(**sizes), Decoder(**sizes)
        self.quant_conv = nn.Conv2d(NETWORK["z_channels"], EMBED, 1)
        self.post_quant_conv = nn.Conv2d(EMBED, NETWORK["z_channels"], 1)
        self.quantize = GumbelQuantize(EMBED, EMBED, CODES) if gumbel else VectorQuantizer2(CODES, EMBED, beta=0.25)

    def case(self, images: Tensor) -> dict[str, Tensor]:
        features = self.quant_conv(self.encoder(2 * images - 1))
        if hasattr(self.quantize, "proj"):  # its own ids are drawn with noise
            ids, table = self.quantize.proj(features).argmax(dim=1), self.quantize.embed.weight
        else:
            ids = self.quantize(features)[2][2].reshape(len(images), *features.shape[2:])
            table = self.quantize.embedding.weight
        decoded = self.decoder(self.post_quant_conv(table[ids].movedim(-1, 1)))
        return {"features": features, "ids": ids, "decoded": decoded}


def llamagen() -> tuple[nn.Module, Any]:
    vq_model = importlib.import_module("vq_model")
    model = vq_model.VQModel(vq_model.ModelArgs(CODES, EMBED, z_channels=NETWORK["z_channels"]))
    sizes = {key: NETWORK[key] for key in ("ch", "ch_mult", "num_res_blocks", "z_channels")}
    model.encoder, model.decoder = vq_model.Encoder(**sizes), vq_model.Decoder(**sizes)

    def case(images: Tensor) -> dict[str, Tensor]:
        features = model.quant_conv(model.encoder(2 * images - 1))
        ids = model.encode(2 * images - 1)[2][2].reshape(len(images), *features.shape[2:])
        shape = (len(images), EMBED, *features.shape[2:])
        return {"features": features, "ids": ids, "decoded": model.decode_code(ids.flatten(), shape)}

    return model, case


def kakao() -> tuple[nn.Module, Any]:
    for name in ("rqvae", "rqvae.models"):  # their __init__ files import all of the transformer
        found = importlib.util.find_spec(name) if name == "rqvae" else None
        package = types.ModuleType(name)
        root = next(iter(found.submodule_search_locations)) if found else sys.modules["rqvae"].__path__[0] + "/models"
        package.__path__ = [root]
        sys.modules[name] = package
    rqvae = importlib.import_module("rqvae.models.rqvae.rqvae")
    side = SIDE // 2
    model = rqvae.RQVAE(
        embed_dim=EMBED,
        n_embed=CODES,
        ddconfig={**NETWORK, "attn_resolutions": [8], "in_channels": 3, "out_ch": 3, "double_z": False},
        latent_shape=[side, side, EMBED],
        code_shape=[side, side, LEVELS],
        shared_codebook=True,
        restart_unused_codes=True,
    )

    def case(images: Tensor) -> dict[str, Tensor]:
        features = model.encode(2 * images - 1).movedim(-1, 1)
        ids = model.get_codes(2 * images - 1)
        return {"features": features, "ids": ids, "decoded": model.decode_code(ids)}

    return model, case


def openai() -> tuple[nn.Module, Any]:
    from dall_e.decoder import Decoder
    from dall_e.encoder import Encoder
    from dall_e.utils import map_pixels, unmap_pixels

    model = nn.ModuleDict({"encoder": Encoder(**OPENAI), "decoder": Decoder(n_init=8, **OPENAI)})

    def case(images: Tensor) -> dict[str, Tensor]:
        logits = model["encoder"](map_pixels(images))
        ids = logits.argmax(dim=1)
        one_hot = nn.functional.one_hot(ids, OPENAI["vocab_size"]).movedim(-1, 1).float()
        decoded = unmap_pixels(torch.sigmoid(model["decoder"](one_hot)[:, :3]))
        return {"features": logits, "ids": ids, "decoded": decoded}

    return model, case


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    cases = {"llamagen": llamagen(), "rqvae": kakao(), "openai": openai()}
    for name, gumbel in (("taming", False), ("gumbel", True)):
        model = Taming(gumbel=gumbel)
        cases[name] = (model, model.case)
    for name, (model, case) in cases.items():
        arrays[f"{name}/shapes"] = np.array(json.dumps(fill(model)))
        with torch.no_grad():
            found = case(images().float() / 255)
        arrays |= {f"{name}/{key}": value.numpy() for key, value in found.items()}
        print(name, len(set(found["ids"].flatten().tolist())), "different ids")
    np.savez_compressed(FOLDER / "tokenizer_cases.npz", **arrays)


if __name__ == "__main__":
    main()
