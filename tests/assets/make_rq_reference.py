"""Writes `reference/rq_cases.npz`: what RQ-transformer 0.1.8 computes, for the parity tests.

0.1.9 trains on targets that are out of step with its predictions (D01); 0.1.8 does not. Run it with that version alone
on the path: `pip install --no-deps --target ORIGINALS RQ-transformer==0.1.8 einops-exts`, then
`PYTHONPATH=ORIGINALS python tests/assets/make_rq_reference.py`. Ids start at 1, since 0 does not count there (D02).
Weights are stored in half precision, which single precision holds exactly.
"""

import json
from pathlib import Path

import numpy as np
import torch
from rq_transformer import RQTransformer

FOLDER = Path(__file__).parent / "reference"
BASE = {"num_tokens": 11, "dim": 16, "dim_head": 8, "heads": 2, "spatial_layers": 2, "depth_layers": 2}
CASES = {
    "grid": {"max_spatial_seq_len": 6, "depth_seq_len": 3},
    "deep": {"max_spatial_seq_len": 4, "depth_seq_len": 4, "spatial_layers": 1, "depth_layers": 3, "ff_mult": 2},
    "flat": {"max_spatial_seq_len": 5, "depth_seq_len": 1, "heads": 3},
}
GRADIENTS = ("token_emb.weight", "spatial_start_token", "depth_pos_emb.weight", "to_logits.bias")


def main() -> None:
    arrays, listing = {}, {}
    for number, (case, changes) in enumerate(CASES.items()):
        options = BASE | changes
        model, random = RQTransformer(**options).eval(), np.random.default_rng(number)
        for name, tensor in model.state_dict().items():
            scale = 1.0 if "emb" in name or "start" in name else 0.3
            values = random.standard_normal(tuple(tensor.shape)) * scale + ("norm.weight" in name)
            arrays[f"{case}/weights/{name}"] = stored = values.astype(np.float16)
            tensor.copy_(torch.from_numpy(stored.astype(np.float32)))
        codes = random.integers(1, 11, (2, options["max_spatial_seq_len"], options["depth_seq_len"]))
        ids = torch.from_numpy(codes)
        loss = model(ids, return_loss=True)
        loss.backward()
        parameters = dict(model.named_parameters())
        arrays |= {f"{case}/grad/{name}": parameters[name].grad.numpy() for name in GRADIENTS}
        part = ids.flatten(1)[:, : ids[0].numel() - 2]
        with torch.no_grad():
            arrays[f"{case}/logits"] = model(part).numpy()  # of what follows each code given
            arrays[f"{case}/first"] = model(part[:, :0])[:, 0].numpy()
        arrays |= {f"{case}/codes": codes, f"{case}/part": part.numpy(), f"{case}/loss": loss.detach().numpy()}
        listing[case] = options
    np.savez_compressed(FOLDER / "rq_cases.npz", listing=np.array(json.dumps(listing)), **arrays)


if __name__ == "__main__":
    main()
