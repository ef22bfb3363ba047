"""parti-pytorch's sides of `bench parti`; runs in the interpreter that `./launch/originals` builds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from parti_pytorch import parti_pytorch as original
from parti_pytorch import t5

from tokscale.bench.racing import STATES, Slices, batches, caption_states, plain_loop


class _Vae(torch.nn.Module):
    """As much of a tokenizer as the original's constructor asks of one."""

    def __init__(self, codes: int, grid: int):
        super().__init__()
        self.codebook_size, self.image_size = codes, grid
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_encoded_fmap_size(self, size: int) -> int:
        return size


def step(grid: int, batch: int, **sizes: int) -> Callable[[], object]:
    """Forward and backward of a whole training step."""
    model, told, ids = _made(grid, batch, **sizes)

    def call() -> float:
        model.zero_grad()
        loss = model(**told, image_token_ids=ids, return_loss=True)
        loss.backward()
        return loss.item()

    return call


def draw_at(at: int, grid: int, batch: int, **sizes: int) -> Callable[[], object]:
    """One round of the original's sampling loop: two whole passes over what was drawn so far, and the draw."""
    model, told, ids = _made(grid, batch, **sizes)
    model.eval()

    @torch.no_grad()
    def call() -> object:
        logits = model.forward_with_cond_scale(**told, image_token_ids=ids[:, :at])[:, -1]
        return original.gumbel_sample(original.top_k(logits, thres=0.9), temperature=1.0, dim=-1)

    return call


def _made(grid: int, batch: int, *, dim: int, depth: int, heads: int, codes: int, words: int, width: int) -> Any:
    t5.T5_CONFIGS["none"] = {"config": SimpleNamespace(d_model=width)}  # else the hub is asked, width given or not
    sizes = {"dim": dim, "depth": depth, "heads": heads, "dim_head": 64, "max_text_len": words}
    model = original.Parti(vae=_Vae(codes, grid), t5_name="none", text_embed_dim=width, **sizes)
    random = torch.Generator().manual_seed(0)
    states = torch.randn(batch, words, width, generator=random)
    told = {"text_token_embeds": states, "text_mask": torch.ones(batch, words, dtype=torch.bool)}
    return model, told, torch.randint(0, codes, (batch, grid * grid), generator=random)


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
    **sizes: Any,
) -> Callable[[], object]:
    """Training as the README has it, `loss = parti(..., return_loss=True)`, from codes that were made before.

    Args:
        inputs: File of `text` and `codes`.
        weights: File that gets the weights after each slice.
        seconds: Of a slice.
        batch_size: Samples of a step.
        words: Entries of the text vocabulary.
        side: Of the grid of codes.
        num_tokens: Entries of the codebook.
        loop: Options of `plain_loop`.
        **sizes: Further arguments of `Parti`.
    """
    data = torch.load(inputs, weights_only=True)
    torch.manual_seed(0)
    t5.T5_CONFIGS["none"] = {"config": SimpleNamespace(d_model=STATES)}
    made = original.Parti(vae=_Vae(num_tokens, side), t5_name="none", text_embed_dim=STATES, **sizes)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        text = data["text"][rows]
        told = {"text_token_embeds": caption_states(text, words), "text_mask": text != 0}
        return made(**told, image_token_ids=data["codes"][rows].flatten(1), return_loss=True)

    def write() -> None:
        torch.save({name: value for name, value in made.state_dict().items() if not name.startswith("vae.")}, weights)

    learned = [parameter for name, parameter in made.named_parameters() if not name.startswith("vae.")]
    update = plain_loop(learned, loss_of, **loop)
    return Slices(seconds, batches(len(data["text"]), batch_size), update, write)
