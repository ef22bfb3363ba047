"""MaskGIT of muse-maskgit-pytorch for `bench maskgit`; runs in the interpreter that `./launch/originals` builds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from muse_maskgit_pytorch import MaskGit, MaskGitTransformer
from muse_maskgit_pytorch.t5 import T5_CONFIGS
from muse_maskgit_pytorch.vqgan_vae import VQGanVAE

from tokscale.bench.racing import STATES, Slices, batches, caption_states, plain_loop


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


def race(
    *,
    inputs: str,
    weights: str,
    seconds: float,
    batch_size: int,
    words: int,
    side: int,
    num_tokens: int,
    loop: dict[str, Any],
    **sizes: int,
) -> Callable[[], object]:
    """Training as the README has it, `loss = maskgit(codes, text_embeds=states)`, from codes that were made before.

    Args:
        inputs: File of `text` and `codes`.
        weights: File that gets the weights after each slice.
        seconds: Of a slice.
        batch_size: Samples of a step.
        words: Entries of the text vocabulary.
        side: Of the grid of codes.
        num_tokens: Entries of the codebook.
        loop: Options of `plain_loop`.
        **sizes: Further arguments of `MaskGitTransformer`.
    """
    data = torch.load(inputs, weights_only=True)
    torch.manual_seed(0)
    T5_CONFIGS["bench"] = {"config": SimpleNamespace(d_model=STATES)}
    net = MaskGitTransformer(num_tokens=num_tokens, seq_len=side * side, t5_name="bench", **sizes)
    made = MaskGit(image_size=side, transformer=net, vae=Tokenizer(num_tokens, side), cond_drop_prob=0.1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return made(data["codes"][rows].flatten(1), text_embeds=caption_states(data["text"][rows], words))

    update = plain_loop(made.parameters(), loss_of, **loop)
    return Slices(
        seconds, batches(len(data["text"]), batch_size), update, lambda: torch.save(made.state_dict(), weights)
    )
