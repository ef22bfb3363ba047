"""What models share, and what none of them may hold."""

from types import SimpleNamespace

import pytest
import torch
from test_dalle_model import make, make_batch
from torch import nn

from tokscale.base.batch import ImageBatch
from tokscale.base.errors import ConfigError, DataError
from tokscale.engine.groups import parameter_groups
from tokscale.models.common import evaluating, fit_sizes, token_batch
from tokscale.models.dalle import DALLEConfig


class Tokenizer(nn.Module):
    """A module whose ids change in training mode, as those of a Gumbel or EMA codebook would."""

    num_tokens, image_size, channels, code_shape, fingerprint = 13, 4, 3, (3, 4), "noisy"

    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Embedding(13, 2)
        self.eval().requires_grad_(False)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return (pixels[:, 0, :3] % 13).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def images() -> ImageBatch:
    batch = make_batch()
    pixels = torch.arange(3 * 3 * 4 * 4).view(3, 3, 4, 4).to(torch.uint8)
    return ImageBatch(batch.positions, pixels, keys=("a", "b", "c"), text=batch.text, text_mask=batch.text_mask)


def test_raw_images_become_a_batch_of_codes():
    batch = token_batch(images(), Tokenizer())
    assert torch.equal(batch.codes, Tokenizer().encode(images().pixels))
    assert batch.keys == ("a", "b", "c") and torch.equal(batch.text, images().text)
    assert make()(batch).total.isfinite()


def test_images_without_captions_are_refused():
    with pytest.raises(DataError, match="without caption ids"):
        token_batch(ImageBatch(torch.arange(3), images().pixels), Tokenizer())


def test_training_mode_never_reaches_the_tokenizer():
    model, tokenizer = make(), Tokenizer()
    model.train()
    model(token_batch(images(), tokenizer)).total.backward()
    assert not tokenizer.training
    assert not any(isinstance(child, Tokenizer) for child in model.modules())


def test_every_weight_of_the_model_is_trained_and_none_is_the_tokenizers():
    model = make(share_input_output_emb=True, rotary_emb=False, sandwich_norm=True, null_cond_prob=0.5)
    model(token_batch(images(), Tokenizer())).total.backward()
    groups = {group.name: group.parameters for group in parameter_groups(model)}
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert all(parameter.grad is not None for group in groups.values() for parameter in group.values())
    assert not any("codebook" in name for name in names)


def test_embeddings_positions_and_tied_heads_do_not_decay():
    decaying = {group.name: set(group.parameters) for group in parameter_groups(make(rotary_emb=False))}["decay"]
    assert {"text_head.weight", "image_head.weight"} <= decaying
    assert not {"text_emb.weight", "positions.text", "positions.rows"} & decaying
    tied = {group.name: set(group.parameters) for group in parameter_groups(make(share_input_output_emb=True))}["decay"]
    assert not {"text_head.weight", "image_head.weight"} & tied


def test_evaluating_gives_each_part_its_own_mode_back():
    model = make().train()
    model.stack.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training and not model.text_head.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert model.training and model.text_head.training and not model.stack.training and torch.is_grad_enabled()


def test_sizes_fill_gaps_and_contradict_nothing():
    config = DALLEConfig(dim=8, depth=1)
    assert fit_sizes(config, num_text_tokens=(7, "tokenizer")).num_text_tokens == 7
    assert fit_sizes(config, num_text_tokens=(None, "tokenizer")) == config
    with pytest.raises(ConfigError, match="got 5, but the tokenizer has 7; leave the key out"):
        fit_sizes(config.model_copy(update={"num_text_tokens": 5}), num_text_tokens=(7, "tokenizer"))


def test_fitting_needs_no_more_than_sizes():
    image = SimpleNamespace(num_tokens=13, code_shape=(3, 4), image_size=4)
    assert DALLEConfig(dim=8, depth=1).fitted(image, SimpleNamespace(num_tokens=9)).sizes == (9, 13, (3, 4))
