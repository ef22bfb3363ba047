"""Writes `reference/maskgit_*.npz`: what muse-maskgit-pytorch 0.3.5 computes, for the parity tests.

Run it in the environment that `launch/originals` builds:
`PYTHONPATH=tests/originals/stubs .originals/bin/python tests/assets/make_maskgit_reference.py`.

One set of weights serves every case, in half precision, which single precision holds exactly. Every number that the
original draws at random is recorded beside what comes of it, so that ours is given the same chance.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import muse_maskgit_pytorch.muse_maskgit_pytorch as muse
import numpy as np
import torch
from muse_maskgit_pytorch.t5 import T5_CONFIGS
from muse_maskgit_pytorch.vqgan_vae import VQGanVAE

FOLDER = Path(__file__).parent / "reference"
BATCH, SIDE, CODES, WIDTH, WORDS = 3, 4, 24, 20, 6
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "num_tokens": CODES, "seq_len": SIDE * SIDE, "flash": False}
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "self_cond": {"self_cond": True},
    "no_mask": {"no_mask_token_prob": 0.25},
    "token_critic": {"critic": "separate", "critic_loss_weight": 0.5},
    "self_critic": {"critic": "self", "self_cond": True},
    "lowres": {"lowres": True, "critic": "separate"},
}
DRAWINGS: dict[str, dict[str, Any]] = {
    "plain": {"timesteps": 8},
    "alone": {"timesteps": 5, "cond_scale": 1.0, "temperature": 0.7, "topk_filter_thres": 0.5},
    "self_cond": {"self_cond": True, "timesteps": 6},
    "token_critic": {"critic": "separate", "timesteps": 6, "critic_noise_scale": 2.0},
    "not_the_critic": {"critic": "separate", "timesteps": 6, "force_not_use_token_critic": True},
    # Under guidance the original's self critic ignores it (D24), so it is compared without.
    "self_critic": {"critic": "self", "timesteps": 6, "cond_scale": 1.0},
}


class Tokenizer(VQGanVAE):
    """Stands in for the image tokenizer that the original cannot do without (D41): codes stay codes."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.codebook_size = CODES

    def copy_for_eval(self) -> "Tokenizer":
        return self

    def get_encoded_fmap_size(self, size: int) -> int:
        return SIDE

    def decode_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def encode(self, codes: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, codes.long(), None


def fill(model: torch.nn.Module) -> None:
    """The same weights by the same names in every case."""
    for name, tensor in model.state_dict().items():
        key = name.replace("token_critic.net.", "transformer.")
        if name.startswith(("vae.", "cond_vae.")) or name.endswith("beta"):
            continue
        random = np.random.default_rng([0, *key.encode()])
        values = random.standard_normal(tuple(tensor.shape))
        if key.endswith(("gamma", "scale")):
            values = 1 + 0.1 * values
        elif "emb." not in key and "null_kv" not in key:
            values = (0.6 if "to_logits" in key or "to_pred" in key else 0.25) * values
        tensor.copy_(torch.from_numpy(np.asarray(np.asarray(values, np.float16), np.float32)))


def build(options: dict[str, Any]) -> muse.MaskGit:
    T5_CONFIGS["tiny"] = {"config": SimpleNamespace(d_model=WIDTH)}
    net = muse.MaskGitTransformer(t5_name="tiny", self_cond=options.get("self_cond", False), **SIZES)
    critic = None
    if options.get("critic") == "separate":
        critic = muse.TokenCritic(t5_name="tiny", **SIZES | {"dim": 24, "depth": 1})
    model = muse.MaskGit(
        image_size=SIDE,
        transformer=net,
        vae=Tokenizer(),
        token_critic=critic,
        self_token_critic=options.get("critic") == "self",
        **{name: options[name] for name in ("no_mask_token_prob", "critic_loss_weight") if name in options},
    )
    fill(model)
    return model.eval()


def text() -> torch.Tensor:
    states = torch.randn(BATCH, WORDS, WIDTH, generator=torch.Generator().manual_seed(1)).half().float()
    states[0, 3:] = 0
    return states


def codes(seed: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.randint(0, CODES, (BATCH, side * side), generator=torch.Generator().manual_seed(seed))


class Recorder:
    """Keeps every random number that the original draws, in order, by what draws it."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[np.ndarray]] = {}

    def __enter__(self) -> "Recorder":
        self._before = (muse.uniform, muse.gumbel_noise, muse.random, torch.rand)
        uniform, noise, _, rand = self._before
        keep = self._keep
        muse.uniform = lambda *args, **keys: keep("uniform", uniform(*args, **keys))
        muse.gumbel_noise = lambda t: keep("gumbel", noise(t).half().float())
        muse.random = lambda: float(keep("random", rand(()).half().float()))
        torch.rand = lambda *args, **keys: keep("rand", rand(*args, **keys))
        return self

    def __exit__(self, *_: object) -> None:
        muse.uniform, muse.gumbel_noise, muse.random, torch.rand = self._before

    def _keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.drawn.setdefault(name, []).append(value.numpy().copy())
        return value

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        kinds = {name: np.float16 if name in ("gumbel", "random") else np.float32 for name in self.drawn}
        return {
            f"{prefix}/{name}/{index}": value.astype(kinds[name])
            for name, values in self.drawn.items()
            for index, value in enumerate(values)
        }


def logits(arrays: dict[str, np.ndarray]) -> None:
    model, states, ids = build({"self_cond": True}).transformer, text(), codes()
    ids[:, ::3] = CODES
    low, embed = (
        codes(3, 2),
        torch.randn(BATCH, SIDE * SIDE, 32, generator=torch.Generator().manual_seed(4)).half().float(),
    )
    arrays |= {"logits/ids": ids.numpy(), "logits/low": low.numpy(), "logits/embed": embed.numpy().astype(np.float16)}
    with torch.no_grad():
        found = {
            "told": model(ids, text_embeds=states),
            "dropped": model(ids, text_embeds=states, cond_drop_prob=1.0),
            "lowres": model(ids, text_embeds=states, conditioning_token_ids=low),
            "lowres_dropped": model(ids, text_embeds=states, conditioning_token_ids=low, cond_drop_prob=1.0),
            "self_cond": model(ids, text_embeds=states, self_cond_embed=embed),
        }
        guided, hidden = model.forward_with_cond_scale(ids, text_embeds=states, cond_scale=3.0, return_embed=True)
    found |= {"guided": guided, "hidden": hidden}
    arrays.update({f"logits/{name}": value.numpy() for name, value in found.items()})


def losses(arrays: dict[str, np.ndarray]) -> None:
    for case, options in LOSSES.items():
        model, low = build(options), codes(3, 2) if options.get("lowres") else None
        torch.manual_seed(5)
        with Recorder() as recorder:
            loss = model(codes(), text_embeds=text(), cond_token_ids=low, cond_drop_prob=0.5)
        loss.backward()
        arrays[f"loss/{case}/total"] = loss.detach().numpy()
        for name in ("transformer.token_emb.weight", "transformer.transformer_blocks.layers.0.1.null_kv"):
            arrays[f"loss/{case}/grad/{name}"] = model.get_parameter(name).grad.numpy()
        arrays.update(recorder.arrays(f"loss/{case}"))


def drawings(arrays: dict[str, np.ndarray]) -> None:
    for case, options in DRAWINGS.items():
        model = build(options)
        model.transformer.encode_text = lambda texts: text()
        how = {name: value for name, value in options.items() if name not in ("critic", "self_cond")}
        torch.manual_seed(6)
        with Recorder() as recorder:
            arrays[f"drawn/{case}/codes"] = model.generate(["a", "b", "c"], **how).numpy()
        arrays.update(recorder.arrays(f"drawn/{case}"))


def main() -> None:
    arrays: dict[str, np.ndarray] = {"text": text().numpy().astype(np.float16), "codes": codes().numpy()}
    weights: dict[str, np.ndarray] = {}
    names = {}
    for case in LOSSES | {"drawn_" + case: options for case, options in DRAWINGS.items()}:
        options = LOSSES.get(case) or DRAWINGS.get(case.removeprefix("drawn_"), {})
        names[case] = []
        for name, tensor in build(options).state_dict().items():
            if not name.startswith(("vae.", "cond_vae.", "token_critic.net.")):
                key = f"{name}@{tuple(tensor.shape)}"
                weights[key] = tensor.numpy().astype(np.float16)
                names[case].append(key)
    logits(arrays)
    losses(arrays)
    drawings(arrays)
    listing = {"names": names, "losses": LOSSES, "drawings": DRAWINGS, "side": SIDE}
    np.savez_compressed(FOLDER / "maskgit_cases.npz", listing=json.dumps(listing), **arrays)
    np.savez_compressed(FOLDER / "maskgit_weights.npz", **weights)


if __name__ == "__main__":
    main()
