"""MaskGIT of muse-maskgit-pytorch for `bench maskgit`; runs in the interpreter that `./launch/originals` builds."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from muse_maskgit_pytorch import MaskGit, MaskGitTransformer
from muse_maskgit_pytorch.t5 import T5_CONFIGS
from muse_maskgit_pytorch.vqgan_vae import VQGanVAE


class Tokenizer(VQGanVAE):
    """Stands in for the image tokenizer that the original cannot do without (D41): codes stay codes."""

    def __init__(self, num_tokens: int, side: int):
        torch.nn.Module.__init__(self)
        self.codebook_size, self.side = num_tokens, side

    def copy_for_eval(self) -> "Tokenizer":
        return self

    def get_encoded_fmap_size(self, size: int) -> int:
        return self.side

    def decode_from_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids


def step(batch: int, flash: bool, **sizes: int) -> Callable[[], object]:
    model, states = build(flash, **sizes), texts(batch, sizes["words"], sizes["dim"])
    codes = torch.randint(0, sizes["num_tokens"], (batch, sizes["side"] ** 2))

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(codes, text_embeds=states).backward()

    return call


def generate(batch: int, timesteps: int, flash: bool, **sizes: int) -> Callable[[], object]:
    model, states = build(flash, **sizes), texts(batch, sizes["words"], sizes["dim"])
    model.transformer.encode_text = lambda prompts: states
    return lambda: model.generate(["a"] * batch, timesteps=timesteps, cond_scale=3.0)


def build(flash: bool, dim: int, depth: int, side: int, num_tokens: int, words: int) -> MaskGit:
    torch.manual_seed(0)
    T5_CONFIGS["bench"] = {"config": SimpleNamespace(d_model=dim)}
    net = MaskGitTransformer(
        dim=dim, depth=depth, num_tokens=num_tokens, seq_len=side * side, flash=flash, t5_name="bench"
    )
    return MaskGit(image_size=side, transformer=net, vae=Tokenizer(num_tokens, side))


def texts(batch: int, words: int, dim: int) -> torch.Tensor:
    return torch.randn(batch, words, dim, generator=torch.Generator().manual_seed(1))
