"""dalle-pytorch's side of `bench dalle`; runs in the interpreter that `./launch/originals` builds."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dalle_pytorch import DALLE, DiscreteVAE, attention, transformer

from tokscale.bench.racing import Slices, batches, plain_loop


def _mend_in_place_scaling() -> None:
    """Queries are scaled out of place, since scaling them in place cannot always be differentiated (D12); that changes
    no value."""
    names = dict(vars(attention))
    for name in ("SparseConvCausalAttention", "SparseAxialCausalAttention"):
        exec(inspect.getsource(getattr(attention, name)).replace("q *= self.scale", "q = q * self.scale"), names)
        setattr(transformer, name, names[name])


_mend_in_place_scaling()


def model(*, words: int, codes: int, text: int, grid: int, kinds: Sequence[str], dtype: str, **options: Any) -> DALLE:
    """A DALLE whose image tokenizer is as small as can be: it takes no part in what is measured."""
    vae = DiscreteVAE(image_size=2 * grid, num_layers=1, num_tokens=codes, codebook_dim=4, hidden_dim=4)
    torch.manual_seed(0)
    made = DALLE(vae=vae, num_text_tokens=words, text_seq_len=text, attn_types=tuple(kinds), **options)
    return made.to(getattr(torch, dtype))


def batch(size: int, words: int, codes: int, text: int, grid: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions and codes, drawn alike on both sides."""
    draw = torch.Generator().manual_seed(seed)
    captions = torch.randint(1, words, (size, text), generator=draw)
    return captions, torch.randint(0, codes, (size, grid * grid), generator=draw)


def step(*, batch_size: int, **options: Any) -> Callable[[], object]:
    """Loss and gradients of one batch."""
    made = model(**options)
    captions, images = batch(batch_size, *(options[name] for name in ("words", "codes", "text", "grid")))

    def call() -> float:
        made.zero_grad(set_to_none=True)
        loss = made(captions, images, return_loss=True)
        loss.backward()
        return float(loss.detach())

    return call


def head(
    *, batch_size: int, dim: int, words: int, codes: int, text: int, grid: int, dtype: str
) -> Callable[[], object]:
    """From hidden states to the loss and its gradients: one softmax over the joint vocabulary, as there."""
    made = model(dim=dim, depth=1, words=words, codes=codes, text=text, grid=grid, kinds=("full",), dtype=dtype)
    captions, images = batch(batch_size, words, codes, text, grid)
    hidden = torch.randn(batch_size, text + grid * grid, dim, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(getattr(torch, dtype)).requires_grad_()
    labels = torch.cat([captions, images + made.num_text_tokens], dim=1)

    def call() -> float:
        made.zero_grad(set_to_none=True)
        hidden.grad = None
        logits = made.to_logits[1](hidden)
        logits.masked_fill_(made.logits_mask, -torch.finfo(logits.dtype).max)
        by_class = logits.transpose(1, 2)
        loss_text = F.cross_entropy(by_class[:, :, :text], labels[:, :text])
        loss_image = F.cross_entropy(by_class[:, :, text:], labels[:, text:])
        loss = (loss_text + 7 * loss_image) / 8
        loss.backward()
        return float(loss.detach())

    return call


def forward_at(*, at: int, **options: Any) -> Callable[[], object]:
    """What the default path of `generate_images` does to draw the code at raster position `at`."""
    made = model(**options).eval()
    captions, images = batch(1, *(options[name] for name in ("words", "codes", "text", "grid")))

    @torch.no_grad()
    def call() -> None:
        made.forward_with_cond_scale(captions, images[:, :at])

    return call


def sample_cached(**options: Any) -> Callable[[], object]:
    """One image by the cached path, which `generate_images` never takes at its default scale (D04)."""
    made = model(**options).eval()
    captions, _ = batch(1, *(options[name] for name in ("words", "codes", "text", "grid")))
    image = options["grid"] ** 2

    @torch.no_grad()
    def call() -> None:
        cache: dict[Any, Any] = {}
        codes = captions[:, :0]
        for _ in range(image):
            logits = made(captions, codes, cache=cache)[:, -1]
            filtered = transformer_top_k(logits)
            noise = -torch.log(-torch.log(torch.rand_like(filtered).clamp(1e-20)).clamp(1e-20))
            drawn = (filtered + noise).argmax(-1) - made.num_text_tokens
            codes = torch.cat([codes, drawn.clamp(0, options["codes"] - 1)[:, None]], dim=1)
        made.vae.decode(codes)

    return call


def transformer_top_k(logits: torch.Tensor) -> torch.Tensor:
    """The original's filter, over text and codes together (D14)."""
    count = max(logits.shape[-1] // 2, 1)
    values, indices = torch.topk(logits, count)
    return torch.full_like(logits, float("-inf")).scatter_(1, indices, values)


def curve(*, weights: str, steps: int, batch_size: int, lr: float, **options: Any) -> Callable[[], object]:
    """Writes its initial weights where the other side takes them from, then trains with Adam: the loss of each step."""
    made = model(**options)
    state = {name: value.clone() for name, value in made.state_dict().items() if not name.startswith("vae.")}
    torch.save(state, weights)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=lr)
    sizes = [options[name] for name in ("words", "codes", "text", "grid")]

    def call() -> list[float]:
        made.load_state_dict(state, strict=False)
        optimizer.state.clear()
        losses = []
        for number in range(steps):
            captions, images = batch(batch_size, *sizes, seed=number % 4)  # few batches, so that there is a curve
            loss = made(captions, images, return_loss=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    return call


def race(
    *,
    inputs: str,
    weights: str,
    seconds: float,
    batch_size: int,
    vae: dict[str, Any],
    attn_types: Sequence[str],
    loop: dict[str, Any],
    **options: Any,
) -> Callable[[], object]:
    """Training as the README has it: images and captions into `dalle(text, images, return_loss=True)`.

    Args:
        inputs: File of `text`, `pixels`, the weights of the discrete VAE as `vae`, and all `codes`.
        weights: File that gets the weights after each slice.
        seconds: Of a slice.
        batch_size: Samples of a step.
        vae: Arguments of `DiscreteVAE`.
        attn_types: As `DALLE` has them.
        loop: Options of `plain_loop`.
        **options: Further arguments of `DALLE`.
    """
    data = torch.load(inputs, weights_only=True)
    torch.manual_seed(0)
    tokenizer = DiscreteVAE(**vae)
    tokenizer.load_state_dict(data["vae"])
    made = DALLE(vae=tokenizer, attn_types=tuple(attn_types), **options)
    probe = tokenizer.get_codebook_indices(data["pixels"][:256].float() / 255)
    differ = (probe != data["codes"][:256].flatten(1)).double().mean().item()
    assert differ < 0.001, f"{differ:.4f} of the codes differ: the tokenizer is another"

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return made(data["text"][rows], data["pixels"][rows].float() / 255, return_loss=True)

    def write() -> None:
        torch.save({name: value for name, value in made.state_dict().items() if not name.startswith("vae.")}, weights)

    update = plain_loop(made.parameters(), loss_of, **loop)
    return Slices(seconds, batches(len(data["text"]), batch_size), update, write)
