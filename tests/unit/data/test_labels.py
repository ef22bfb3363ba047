"""Classes: from `.cls` files or metadata, through token shards, to batches."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from token_folders import make_tokens
from tokenizing import image, make_recipe, tokenize

from tokscale.base.batch import LABELS
from tokscale.base.errors import DataError
from tokscale.data.loading import TokenLoader, TokenLoaderConfig
from tokscale.data.tokenization.finalise import closed
from tokscale.data.tokens.manifest import TokenDataset


def write_raw(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, data in ({"png": image(1), "txt": key.encode()} | files).items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_labels_come_from_cls_files_before_metadata(tmp_path):
    samples = {
        "a": {"cls": b"7\n"},
        "b": {"json": json.dumps({"label": 0}).encode()},
        "c": {"cls": b"281", "json": b'{"label": 5}'},
    }
    write_raw(tmp_path / "raw/0.tar", samples)
    plan, _ = tokenize(tmp_path / "tokens", make_recipe(tmp_path / "raw", labels=True))
    dataset = TokenDataset(tmp_path / "tokens")
    assert dataset.read(0).tensors["label"].tolist() == [7, 0, 281]
    assert dataset.manifest.labels == 282 and closed(tmp_path / "tokens", plan)


@pytest.mark.parametrize("files", [{}, {"cls": b"cat"}, {"cls": b"-1"}, {"json": b'{"label": 1.5}'}, {"json": b"["}])
def test_a_sample_without_a_label_is_left_out_with_the_reason(tmp_path, files):
    write_raw(tmp_path / "raw/0.tar", {"good": {"cls": b"3"}, "bad": files})
    recipe = make_recipe(tmp_path / "raw", labels=True)
    tokenize(tmp_path / "tokens", recipe, work={"max_drop_fraction": 1.0})
    dataset = TokenDataset(tmp_path / "tokens")
    assert dataset.samples == 1 and dataset.manifest.drops == {"label": 1}
    assert json.loads((tmp_path / "tokens/quarantine/000000.jsonl").read_text())["key"] == "bad"


def test_labels_are_in_the_fingerprint_only_when_they_are_stored(tmp_path):
    plain, labelled = make_recipe(tmp_path), make_recipe(tmp_path, labels=True)
    assert "labels" not in plain.identity and plain.identity != labelled.identity
    assert "labels" not in make_tokens(tmp_path / "plain").manifest.content


def test_batches_have_the_labels_of_their_samples(tmp_path):
    data = make_tokens(tmp_path / "tokens", labels=16)
    loader = TokenLoader(TokenLoaderConfig(), manifests=[data], text_tokenizer=None, batch_size=8, seed=1)
    for _ in range(3):
        batch = loader.next_batch()
        assert batch.extra[LABELS].dtype == torch.int64
        assert batch.extra[LABELS].tolist() == [int(key) for key in batch.keys]
    loader.close()


def test_a_mixture_has_labels_only_if_all_of_it_has(tmp_path):
    data = [make_tokens(tmp_path / "a", labels=16), make_tokens(tmp_path / "b", first=16)]
    config = TokenLoaderConfig.model_validate({"sources": [{"path": tmp_path / name} for name in "ab"]})
    loader = TokenLoader(config, manifests=data, text_tokenizer=None, batch_size=8, seed=1)
    assert LABELS not in loader.next_batch().extra
    loader.close()


def test_a_manifest_whose_labels_were_edited_is_refused(tmp_path):
    data = make_tokens(tmp_path / "tokens", labels=16)
    path = data.folder / "dataset.json"
    path.write_text(path.read_text().replace('"labels": 16', '"labels": 17'))
    with pytest.raises(DataError, match="edited or damaged"):
        TokenDataset(data.folder)
