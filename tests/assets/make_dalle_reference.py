"""Writes `reference/dalle_*.npz`: what dalle-pytorch 1.6.6 computes, for the parity tests.

Run it in an environment that has the original: `pip install --no-deps --target ORIGINALS dalle-pytorch==1.6.6
axial_positional_embedding==0.3.12 rotary-embedding-torch==0.9.1 omegaconf antlr4-python3-runtime requests urllib3 idna
certifi charset-normalizer`, then
`PYTHONPATH=ORIGINALS:tests/originals/stubs python tests/assets/make_dalle_reference.py`.

One set of weights serves every case, stored under names of its own (`3.attn.to_qkv.weight`) in half precision, which
single precision holds exactly; each case lists which of them go by which name in the original.

Two defects of the original are mended before it runs, so that "equal" means "right": `DivideMax` divides by the
largest magnitude (D16), and axial and conv-like attention scale their queries out of place (D12, no change in value).
"""

import json
import re
from pathlib import Path

import dalle_pytorch
import numpy as np
import torch
from dalle_pytorch import CLIP, DALLE, DiscreteVAE
from dalle_pytorch.transformer import DivideMax

FOLDER = Path(__file__).parent / "reference"
DIM, TEXT, WORDS, CODES = 32, 6, 20, 24
ALL_KINDS = ("full", "axial_row", "axial_col", "conv_like")
BASE = {"dim": DIM, "num_text_tokens": WORDS, "text_seq_len": TEXT, "depth": 2, "heads": 2, "dim_head": 16}
CASES = {
    "full": {"attn_types": ("full",)},
    "axial_row": {"attn_types": ("axial_row",)},
    "axial_col": {"attn_types": ("axial_col",)},
    "conv_like": {"attn_types": ("conv_like",), "side": 8},
    "mixed": {"attn_types": ALL_KINDS, "depth": 4, "side": 8},
    "learned_positions": {"rotary_emb": False},
    "no_shift": {"shift_tokens": False},
    "axial_plain": {"attn_types": ("axial_row", "axial_col"), "rotary_emb": False, "shift_tokens": False},
    "stable": {"stable": True, "attn_types": ("full", "axial_row")},
    "sandwich": {"sandwich_norm": True},
    "shared": {"depth": 4, "shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0, 0, 1, 1)},
    "tied": {"share_input_output_emb": True},
    "reversible": {"depth": 4, "reversible": True, "attn_types": ALL_KINDS},
    "reversible_shared_tied": {
        "depth": 4,
        "reversible": True,
        "shared_attn_ids": (0, 1),
        "shared_ff_ids": (0,),
        "share_input_output_emb": True,
        "rotary_emb": False,
        "loss_img_weight": 3,
    },
    "static_masks": {"attn_types": ("axial_row", "axial_col"), "optimize_for_inference": True},
}
GRADIENTS = ("0.attn.to_qkv.weight", "0.attn.scale", "1.ff.net.3.bias", "image_emb.weight", "to_logits.1.bias")


def canonical(name: str) -> str:
    """A parameter's name without the wrappers that the original's options put around it."""
    name = re.sub(r"^(\w+_)?transformer\.layers\.(?:layers|blocks)\.(\d+)\.([01fg])(?:\.net)?\.", _layer, name)
    return re.sub(r"\bfn\.", "", name)


def _layer(match: re.Match[str]) -> str:
    return f"{match[1] or ''}{match[2]}.{'attn' if match[3] in '0f' else 'ff'}."


class Weights:
    """Half-precision values by canonical name, drawn when first asked for."""

    def __init__(self, seed: int):
        self.seed = seed
        self.values: dict[str, np.ndarray] = {}

    def load_into(self, model: torch.nn.Module) -> dict[str, str]:
        """Fill the model; returns the canonical name of each of its state-dict entries."""
        names = {}
        state = model.state_dict()
        for name, tensor in state.items():
            if name.startswith("vae.") or name.endswith("pos_emb"):
                continue
            key = canonical(name)
            if ".linear." in key:  # an alias of the head in the original's tied embedding
                key = "to_logits.1." + key.rpartition(".")[2]
            # Wider grids have longer position tables.
            key += f"@{tuple(tensor.shape)}" if "pos_emb" in key else ""
            if key not in self.values:
                self.values[key] = self._draw(key, tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(np.asarray(self.values[key], np.float32)))
            names[name] = key
        return names

    def _draw(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng([self.seed, *key.encode()])
        values = random.standard_normal(shape)
        if key.endswith("scale"):
            values = 0.4 + 0.1 * values
        elif re.search(r"norm(_out)?\.weight|to_logits\.0\.weight", key):
            values = 1 + 0.1 * values
        elif "emb" not in key:
            values = 0.2 * values
        return np.asarray(values, np.float16)


class _DivideMagnitude(DivideMax):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().amax(dim=self.dim, keepdim=True).detach()


def dalle_cases() -> None:
    weights, arrays, listing = Weights(0), {}, {}
    dalle_pytorch.dalle_pytorch.DivideMax = _DivideMagnitude
    for case, changes in CASES.items():
        options = BASE | {key: value for key, value in changes.items() if key != "side"}
        side = changes.get("side", 4)
        vae = DiscreteVAE(image_size=side * 2, num_layers=1, num_tokens=CODES, codebook_dim=4, hidden_dim=4)
        model = DALLE(vae=vae, **options)
        names = weights.load_into(model)
        random = np.random.default_rng([1, *case.encode()])
        text = random.integers(1, WORDS, (2, TEXT))
        text[0, 3:] = 0
        codes = random.integers(0, CODES, (2, side * side))
        ids, images = torch.from_numpy(text), torch.from_numpy(codes)
        logits = model(ids.clone(), images)
        if case == "full":
            arrays["full/null_logits"] = model(ids.clone(), images, null_cond_prob=1.0).detach().numpy()
        loss = model(ids.clone(), images, return_loss=True)
        loss.backward()
        parameters = dict(model.named_parameters())
        for name, key in names.items():
            if key in GRADIENTS and name in parameters and parameters[name].grad is not None:
                arrays[f"{case}/grad/{key}"] = parameters[name].grad.numpy()
        arrays |= {f"{case}/text": text, f"{case}/codes": codes, f"{case}/loss": loss.detach().numpy()}
        arrays[f"{case}/logits"] = logits.detach().numpy()
        listing[case] = {"hparams": options, "side": side, "num_image_tokens": CODES, "names": names}
    np.savez_compressed(FOLDER / "dalle_weights.npz", **weights.values)
    np.savez_compressed(FOLDER / "dalle_cases.npz", listing=np.array(json.dumps(listing)), **arrays)


def clip_case() -> None:
    options = {
        "dim_text": 32,
        "dim_image": 24,
        "dim_latent": 16,
        "num_text_tokens": WORDS,
        "text_enc_depth": 2,
        "text_seq_len": TEXT,
        "text_heads": 1,
        "visual_enc_depth": 1,
        "visual_heads": 1,
        "visual_image_size": 16,
        "visual_patch_size": 8,
    }
    model, weights = CLIP(**options), Weights(2)
    names = weights.load_into(model)
    random = np.random.default_rng(3)
    text = random.integers(1, WORDS, (3, TEXT))
    text[0, 3:] = 0
    pixels = random.integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    ids, images = torch.from_numpy(text), torch.from_numpy(pixels).float() / 255
    mask = ids != 0
    arrays = {"text": text, "pixels": pixels}
    arrays["similarity"] = model(ids, images, text_mask=mask).detach().numpy()
    arrays["unmasked"] = model(ids, images).detach().numpy()
    loss = model(ids, images, text_mask=mask, return_loss=True)
    loss.backward()
    arrays["loss"] = loss.detach().numpy()
    for name in ("temperature", "to_text_latent.weight", "to_visual_embedding.bias"):
        arrays[f"grad/{name}"] = dict(model.named_parameters())[name].grad.numpy()
    listing = {"hparams": options, "names": names}
    np.savez_compressed(
        FOLDER / "clip_case.npz", listing=np.array(json.dumps(listing)), **arrays,
        **{f"weight/{key}": value for key, value in weights.values.items()},
    )  # fmt: skip


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    dalle_cases()
    clip_case()
