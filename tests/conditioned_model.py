"""The least model that is told something beside the image: logits of every code from the mean of its context."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from tokscale.base.batch import LossOutput, TokenBatch
from tokscale.base.config import Config
from tokscale.base.rng import generator
from tokscale.models import registry
from tokscale.models.model import AnyModelConfig, GenerativeModel
from tokscale.nn.conditioning import ConditionConfig, Conditioning
from tokscale.stages import train


class ToyConfig(AnyModelConfig):
    kind: Literal["toy"] = "toy"
    condition: ConditionConfig
    text_seq_len: int = 6
    num_text_tokens: int | None = None
    num_image_tokens: int | None = None
    image_grid: tuple[int, int] | None = None

    def fitted(self, image: Any, text: Any) -> "ToyConfig":
        changes = {"num_image_tokens": image.num_tokens, "image_grid": tuple(image.code_shape)}
        return self.model_copy(update=changes | ({"num_text_tokens": text.num_tokens} if text else {}))


class ToySampling(Config):
    pass


class Toy(GenerativeModel):
    config_class = ToyConfig
    sampling_config = ToySampling

    def __init__(self, config: ToyConfig):
        super().__init__()
        assert config.num_image_tokens and config.image_grid
        self.config = config
        self.condition = Conditioning(
            config.condition, dim=8, num_text_tokens=config.num_text_tokens, text_seq_len=config.text_seq_len
        )
        self.head = nn.Linear(self.condition.width, config.num_image_tokens)

    def logits(self, text: Tensor, mask: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        context = self.condition(text, mask, extra)
        seen = rearrange(context.mask, "b w -> b w 1").to(self.head.weight.dtype)
        mean = (context.states.to(seen.dtype) * seen).sum(1) / seen.sum(1).clamp_min(1)
        return self.head(mean)

    def forward(self, batch: TokenBatch) -> LossOutput:
        logits = self.logits(batch.text, batch.text_mask, batch.extra)
        codes = rearrange(batch.codes, "b ... -> b (...)")
        loss = nn.functional.cross_entropy(logits.repeat_interleave(codes.shape[1], 0), codes.flatten())
        return LossOutput(loss, {"image": loss})

    @property
    def text_seq_len(self) -> int:
        return self.config.text_seq_len

    def train_flops(self) -> float:
        return 1.0

    def generate_codes(
        self, text: Tensor, text_mask: Tensor, *, options: Any, seeds: Sequence[int], extra: Mapping[str, Tensor] | None
    ) -> Tensor:
        chances = self.logits(text, text_mask, extra or {}).softmax(-1)
        height, width = self.config.image_grid or (0, 0)
        rows = [
            torch.multinomial(row, height * width, True, generator=generator(seed, "toy"))
            for row, seed in zip(chances, seeds, strict=True)
        ]
        return rearrange(torch.stack(rows), "b (h w) -> b h w", h=height)


class ToyTrainConfig(train.TrainConfig):
    model: ToyConfig


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[ToyTrainConfig]:
    """Stages know the model inside the test; the configuration of its training stage."""
    monkeypatch.setitem(registry.MODELS._entries, "toy", Toy)
    return ToyTrainConfig
