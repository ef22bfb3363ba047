"""Writes `reference/dvae_cases.npz`: what dalle-pytorch 1.6.6's `DiscreteVAE` computes, for the parity tests.

Environment and command as in `make_dalle_reference.py`. Loss and gradient follow `torch.manual_seed(SEED)`; their
only random numbers are those of `gumbel_softmax`.
"""

import json
from pathlib import Path

import numpy as np
import torch
from dalle_pytorch import DiscreteVAE

FOLDER = Path(__file__).parent / "reference"
SEED = 5
BATCH = 3
BASE = {"image_size": 16, "num_tokens": 12, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 8}
CASES = {
    "soft": {"num_resnet_blocks": 1, "temperature": 0.7},
    "straight_through_smooth_grey": {"straight_through": True, "smooth_l1_loss": True, "channels": 1},
    "reinmax_kl_alpha": {"straight_through": True, "reinmax": True, "kl_div_loss_weight": 0.01, "channels": 4},
}


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, options in CASES.items():
        torch.manual_seed(SEED)
        hparams = BASE | options
        model = DiscreteVAE(**hparams)
        pixels = torch.randint(0, 256, (BATCH, hparams.get("channels", 3), 16, 16), dtype=torch.uint8)
        images = pixels.float() / 255
        codes = model.get_codebook_indices(images)
        torch.manual_seed(SEED)
        loss = model(images, return_loss=True)
        loss.backward()
        found = {
            "pixels": pixels,
            "logits": model(images, return_logits=True),
            "codes": codes,
            "decoded": model.decode(codes),
            "loss": loss,
            "gradient": model.encoder[0][0].weight.grad,
        } | {f"state/{key}": value for key, value in model.state_dict().items()}
        arrays |= {f"{name}/{key}": value.detach().numpy() for key, value in found.items()}
        arrays[f"{name}/hparams"] = np.array(json.dumps(hparams))
    np.savez_compressed(FOLDER / "dvae_cases.npz", **arrays)


if __name__ == "__main__":
    main()
