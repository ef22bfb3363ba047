"""The frozen text encoder: the library's own states, padded to what is needed, and nothing a trainer could touch."""

import builtins
import json
import shutil
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import text_encoders
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tokscale.base.errors import CheckpointError, ConfigError, DataError, EnvironmentRefused
from tokscale.tokenizers.text import encoder as module
from tokscale.tokenizers.text import load_text_encoder

CAPTIONS = ["a cat", "a small red circle on the mat", "", "the blue circle"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return text_encoders.save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return text_encoders.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def copy(t5, tmp_path) -> Path:
    return Path(shutil.copytree(t5, tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_states_are_the_librarys_own_for_each_caption_alone(kind, request):
    from transformers import CLIPTextModel, T5EncoderModel

    folder = request.getfixturevalue(kind)
    model = {"t5": T5EncoderModel, "clip": CLIPTextModel}[kind].from_pretrained(folder).eval()
    encoder = load_text_encoder(folder, precision="fp32")
    states, mask = encoder.encode(CAPTIONS)
    assert states.shape == (4, int(mask.sum(1).max()), encoder.width) and states.dtype == torch.float32
    for row, caption in enumerate(CAPTIONS):
        ids, alone = encoder.tokenize([caption])
        assert alone.all() and mask[row].sum() == ids.shape[1]
        expected = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(states[row, : ids.shape[1]], expected, atol=1e-5, rtol=1e-5)
        assert not states[row, ids.shape[1] :].any()


def test_a_batch_is_as_wide_as_its_longest_caption_and_parts_are_as_wide_as_theirs(t5, monkeypatch):
    encoder = load_text_encoder(t5, precision="fp32")
    whole, _ = encoder.encode(CAPTIONS)
    monkeypatch.setattr(module, "_TOGETHER", 2)
    widths, real = [], encoder._model.forward
    monkeypatch.setattr(
        encoder._model, "forward", lambda **given: (widths.append(given["input_ids"].shape[1]), real(**given))[1]
    )
    parts, mask = encoder.encode(CAPTIONS)
    lengths = sorted(mask.sum(1).tolist(), reverse=True)
    assert widths == [lengths[0], lengths[2]] and whole.shape[1] == lengths[0] and lengths[2] < lengths[0]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_long_captions_are_cut_and_keep_the_token_that_ends_them(t5, clip):
    ids, mask = load_text_encoder(t5, length=3).tokenize(["a small red circle"])
    assert ids.tolist() == [[3, 4, 1]] and mask.all()
    cutting = load_text_encoder(t5, length=3)
    cutting.tokenize(["a small red circle", "a small"])
    whole = [len(row) for row in load_text_encoder(t5).tokenize(["a small red circle"])[0]]
    assert (cutting.cut.captions, cutting.cut.cut, cutting.cut.longest) == (2, 1, *whole)
    encoder = load_text_encoder(clip, length=100)
    assert encoder.length == 7, "CLIP has no more positions"
    ids, _ = encoder.tokenize(["a small red circle on the mat"])
    assert ids.shape == (1, 7) and ids[0, -1] == 1


def test_a_caption_that_spells_a_special_token_is_plain_text(t5):
    ids, _ = load_text_encoder(t5).tokenize(["a </s> cat"])
    assert ids[0, :-1].tolist().count(1) == 0 and ids[0, -1] == 1


def test_no_captions_at_all(t5):
    states, mask = load_text_encoder(t5).encode([])
    assert states.shape == (0, 0, 16) and mask.shape == (0, 0)


def test_states_are_on_the_device_that_was_asked_for(t5, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda *a, **k: pytest.fail("the first GPU, whichever rank asks"))
    monkeypatch.setattr(module, "arithmetic", lambda device, precision: nullcontext())  # there is no autocast to forbid
    encoder, seen = load_text_encoder(t5, device="meta"), []

    def forward(**given: torch.Tensor) -> SimpleNamespace:
        seen.extend(tensor.device.type for tensor in given.values())
        return SimpleNamespace(last_hidden_state=torch.zeros(*given["input_ids"].shape, 16, device="meta"))

    assert all(weight.is_meta for weight in encoder._model.parameters())
    monkeypatch.setattr(encoder, "_model", forward)  # the library's own code looks into the mask's values
    states, mask = encoder.encode(CAPTIONS)
    assert states.device.type == mask.device.type == "meta" and set(seen) == {"meta"}


def test_a_model_that_uses_it_neither_trains_nor_decays_nor_saves_it(t5):
    encoder = load_text_encoder(t5, precision="fp32")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(16, 1)

    model = Model().train()
    assert list(model.state_dict()) == ["head.weight", "head.bias"]
    before, _ = encoder.encode(CAPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.head(before).sum().backward()  # its states may be saved for a backward pass, and need no gradient themselves
    optimizer.step()
    after, _ = encoder.encode(CAPTIONS)
    assert not before.requires_grad and model.head.weight.grad.any()
    assert torch.equal(before, after), "the encoder changed, or its dropout of 0.5 is on"
    assert encoder.fingerprint == load_text_encoder(t5, precision="fp32").fingerprint


def test_each_is_its_own_and_none_is_fetched(t5, clip, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    first, second, third = load_text_encoder(t5), load_text_encoder(t5), load_text_encoder(clip)
    assert first._model is not second._model and first.fingerprint == second.fingerprint != third.fingerprint


def test_what_decides_the_states_decides_the_fingerprint(t5, tmp_path):
    plain = load_text_encoder(t5).fingerprint
    assert plain == load_text_encoder(text_encoders.save_t5(tmp_path / "same")).fingerprint
    whole = load_text_encoder(text_encoders.save_t5(tmp_path / "other", seed=1)).fingerprint
    others = {
        load_text_encoder(t5, precision="fp32").fingerprint,
        load_text_encoder(t5, length=4).fingerprint,
        whole,
    }
    words = tmp_path / "same" / "tokenizer.json"
    words.write_text(words.read_text().replace('"cat"', '"dog"'))
    others.add(load_text_encoder(tmp_path / "same").fingerprint)
    assert len(others | {plain}) == 5


def test_the_encoder_half_of_a_whole_model_is_taken(tmp_path):
    whole = load_text_encoder(text_encoders.save_t5(tmp_path / "t5", whole=True))
    assert not any("decoder" in name for name in whole._model.state_dict())
    both = load_text_encoder(text_encoders.save_clip(tmp_path / "clip", whole=True))
    assert not any("vision" in name for name in both._model.state_dict()) and both.width == 16


def test_weights_that_are_missing_are_not_made_up(copy):
    tensors = load_file(copy / "model.safetensors")
    lost = next(name for name in tensors if "layer.0" in name)
    save_file(
        {name: value for name, value in tensors.items() if name != lost}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=rf"{copy}: 1 weights of T5EncoderModel are missing.*{lost}"):
        load_text_encoder(copy)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("name", "stored", "answer"),
    [
        ("embeddings.position_ids", lambda ours: ours, None),
        ("embeddings.position_ids", lambda ours: ours.flip(1), "position_ids has other values"),
        ("embeddings.position_ids", lambda ours: ours[:, :-1], "position_ids has other values"),
        ("encoder.layers.0.gate", torch.ones_like, r"no place for encoder\.layers\.0\.gate"),
        ("of_another_part.gate", torch.ones_like, None),
    ],
)
def test_stored_buffers_are_what_is_computed_or_are_refused_by_name(tmp_path, whole, name, stored, answer):
    folder = text_encoders.save_clip(tmp_path / "clip", whole=whole)
    before, path, prefix = load_text_encoder(folder).fingerprint, folder / "model.safetensors", "text_model." * whole
    tensors = load_file(path)
    count = len(tensors[f"{prefix}embeddings.position_embedding.weight"])
    # A whole model has another table of the same name in its other half.
    more = {"vision_model.embeddings.position_ids": torch.arange(3)[None]} if whole else {}
    save_file(tensors | more | {prefix + name: stored(torch.arange(count)[None]).contiguous()}, path, {"format": "pt"})
    if answer is None:
        assert load_text_encoder(folder).fingerprint == before
    else:
        with pytest.raises(CheckpointError, match=answer):
            load_text_encoder(folder)


def test_only_safetensors_are_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"{copy}: no weights as safetensors \(found pytorch_model.bin\)"):
        load_text_encoder(copy)


def test_damaged_weights_name_the_folder(copy):
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=str(copy)):
        load_text_encoder(copy)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda folder: shutil.rmtree(folder), DataError, "is no folder; fetch the encoder first"),
        (lambda folder: (folder / "config.json").unlink(), DataError, "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "not a configuration"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no"}'), DataError, "not a configuration"),
        (lambda folder: (folder / "tokenizer.json").unlink(), DataError, "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), DataError, "no tokenizer that can be read"),
        (lambda folder: _retype(folder, "bart"), ConfigError, "'bart' is no text encoder"),
    ],
)
def test_what_is_no_encoder_is_refused_naming_the_folder(copy, spoil, error, words):
    spoil(copy)
    with pytest.raises(error, match=words) as caught:
        load_text_encoder(copy)
    assert str(copy) in str(caught.value)


def _retype(folder: Path, kind: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": values["vocab_size"]}))


def test_without_the_library_it_says_what_to_install(t5, monkeypatch):
    real = builtins.__import__

    def without(name: str, *args, **options):
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentRefused, match=r"pip install 'tokscale\[text-encoder\]'"):
        load_text_encoder(t5)
