"""Writes `reference/parti_cases.npz`: what parti-pytorch 0.2.0 computes, for the parity tests.

`./launch/originals tests/assets/make_parti_reference.py`

Weights are drawn in half precision, which single precision holds exactly. A fixed mask stands in for the original's
random choice of captions to drop. Its biases lie one place off (D26) and a whole image has no logits (D27), so
nothing here reads the last place, and tokscale reads its checkpoints with `rel_pos_index=sequence`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from parti_pytorch import parti_pytorch as original
from parti_pytorch import t5

FOLDER = Path(__file__).parent / "reference"
BATCH, WORDS, SIDE, CODES, WIDTH = 3, 6, 4, 24, 20
BASE = {"dim": 32, "depth": 2, "dim_head": 16, "heads": 2, "text_embed_dim": WIDTH, "max_text_len": 5}
CASES = {"plain": {}, "wide": {"heads": 4, "dim_head": 8, "ff_mult": 2, "depth": 1, "max_text_len": 8}}
KEPT = torch.tensor([True, False, True])
GRADIENTS = ("layers.0.0.to_kv.1.weight", "layers.0.0.rel_pos_bias.pos_bias.weight", "layers.0.1.to_q.1.weight",
             "layers.0.2.1.weight", "image_token_embed.weight", "start_token")  # fmt: skip


class Vae(torch.nn.Module):
    """As much of a tokenizer as the original's constructor asks of one."""

    codebook_size, image_size = CODES, SIDE

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_encoded_fmap_size(self, size: int) -> int:
        return size


def weights_into(model: torch.nn.Module, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Fill the model; returns what each of its entries became."""
    drawn = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith("vae.") or "pos_indices" in name or name.endswith("beta") or name == "to_logits.weight":
                continue
            values = random.standard_normal(tuple(tensor.shape))
            values = 1 + 0.1 * values if name.endswith("gamma") else 0.3 * values
            drawn[name] = np.asarray(values, np.float16)
            tensor.copy_(torch.from_numpy(drawn[name].astype(np.float32)))
    return drawn


def main() -> None:
    arrays, listing = {}, {}
    t5.T5_CONFIGS["none"] = {"config": SimpleNamespace(d_model=WIDTH)}  # the hub is asked even where a width is given
    original.prob_mask_like = lambda shape, prob, device: KEPT.clone() if 0 < prob < 1 else torch.full(shape, prob == 1)
    for case, changes in CASES.items():
        hparams = BASE | changes
        random = np.random.default_rng([1, *case.encode()])
        model = original.Parti(vae=Vae(), t5_name="none", **hparams)
        weights = weights_into(model, random)
        states = random.standard_normal((BATCH, WORDS, WIDTH)).astype(np.float32)
        mask = np.arange(WORDS) < np.array([[6], [4], [3]])
        codes = random.integers(0, CODES, (BATCH, SIDE * SIDE))
        told = {"text_token_embeds": torch.from_numpy(states), "text_mask": torch.from_numpy(mask)}
        ids = torch.from_numpy(codes)
        found = {f"logits_{n}": model(**told, image_token_ids=ids[:, :n], cond_drop_prob=0.0) for n in (0, 1, 9, 15)}
        found["null_logits"] = model(**told, image_token_ids=ids[:, :9], cond_drop_prob=1.0)
        found["guided"] = model.forward_with_cond_scale(**told, image_token_ids=ids[:, :9], cond_scale=2.5)
        loss = model(**told, image_token_ids=ids, return_loss=True)
        loss.backward()
        parameters = dict(model.named_parameters())
        found |= {"loss": loss} | {f"grad/{name}": parameters[name].grad for name in GRADIENTS}
        arrays |= {f"{case}/{name}": value.detach().numpy() for name, value in found.items()}
        arrays |= {f"{case}/states": states, f"{case}/mask": mask, f"{case}/codes": codes}
        arrays |= {f"{case}/state/{name}": value for name, value in weights.items()}
        listing[case] = {"hparams": hparams, "side": SIDE, "num_image_tokens": CODES, "kept": KEPT.tolist()}
    np.savez_compressed(FOLDER / "parti_cases.npz", listing=np.array(json.dumps(listing)), **arrays)


if __name__ == "__main__":
    main()
