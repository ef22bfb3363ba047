"""Writes `reference/muse_vae.npz`: what muse-maskgit-pytorch 0.3.5's `VQGanVAE` computes, for the parity tests.

Run it in the environment that `launch/originals` builds:
`PYTHONPATH=tests/originals/stubs .originals/bin/python tests/assets/make_muse_vae_reference.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muse_maskgit_pytorch.vqgan_vae import VQGanVAE

CASES: dict[str, dict[str, Any]] = {
    "default": {"dim": 16, "layers": 1, "codebook_size": 64},
    "blocks": {"dim": 4, "layers": 2, "codebook_size": 16, "channels": 1}
    | {"encdec_num_resnet_blocks": 2, "encdec_resnet_groups": 4},
    "no_projection": {"dim": 8, "layers": 2, "codebook_size": 2**16}
    | {"encdec_resnet_groups": 8, "encdec_layer_mults": [1, 2], "encdec_num_resnet_blocks": 0},
}
SIDE = 16


def main() -> None:
    """Weights in half precision, which single precision holds exactly; what they compute in single precision."""
    torch.manual_seed(0)
    found: dict[str, np.ndarray] = {"cases": np.array(json.dumps(CASES))}
    for case, options in CASES.items():
        vae = VQGanVAE(use_vgg_and_gan=False, **options).eval()
        state = {name: (tensor + 0.05 * torch.randn(tensor.shape)).half() for name, tensor in vae.named_parameters()}
        vae.load_state_dict(vae.state_dict() | {name: tensor.float() for name, tensor in state.items()})
        pixels = torch.randint(0, 256, (2, vae.channels, SIDE, SIDE), dtype=torch.uint8)
        with torch.no_grad():
            _, ids, _ = vae.quantizer(vae.enc_dec.encode(pixels.float() / 255))
            decoded = vae.enc_dec.decode(vae.quantizer.indices_to_codes(ids))
        found |= {f"{case}/pixels": pixels.numpy(), f"{case}/ids": ids.numpy(), f"{case}/decoded": decoded.numpy()}
        found |= {f"{case}/state/{name}": tensor.detach().numpy() for name, tensor in state.items()}
        found[f"{case}/state/quantizer.mask"] = vae.quantizer.mask.numpy()
    np.savez_compressed(Path(__file__).parent / "reference/muse_vae.npz", **found)


if __name__ == "__main__":
    main()
