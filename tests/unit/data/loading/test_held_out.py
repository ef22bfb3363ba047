"""Held-out samples: the same ones whatever else is chosen, never in training, and no change where none are held out."""

from pathlib import Path

import pytest
import tiny_pipeline
from pydantic import ValidationError

from tokscale.base.errors import DataError, StorageError
from tokscale.data.loading import ImageLoader, ImageLoaderConfig, TokenLoader, TokenLoaderConfig, held_out
from tokscale.data.loading.held_out import SplitConfig, is_held_out
from tokscale.data.raw.shapes.source import ShapesConfig, ShapesSource
from tokscale.data.raw.shards import RawDataset, write_shard
from tokscale.data.tokens.manifest import TokenDataset

SHARE = SplitConfig(share=0.25)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    tiny_pipeline.make_image_tokenizer(folder / "image_tokenizer")
    tiny_pipeline.make_token_shards(folder / "tokens", folder / "image_tokenizer")
    return folder / "tokens"


def keys(folder: Path, config: TokenLoaderConfig, passes: int = 2, **options) -> list[str]:
    loader = TokenLoader(config, manifests=[TokenDataset(folder)], text_tokenizer=None, batch_size=4, seed=3, **options)
    batches = [loader.next_batch() for _ in range(passes * loader.samples // 4)]
    return [key for batch in batches for key in batch.keys]


def test_training_never_sees_what_is_held_out_and_all_else(tokens):
    config = TokenLoaderConfig(prefetch=0, held_out=SHARE)
    trained, held = keys(tokens, config), keys(tokens, config, held_out=True)
    assert set(held) == {str(number) for number in range(64) if is_held_out(str(number), 0.25)}
    assert set(trained) == {str(number) for number in range(64)} - set(held) and 8 <= len(set(held)) <= 24


def test_who_holds_nothing_out_reads_as_before(tokens):
    assert keys(tokens, TokenLoaderConfig(prefetch=0)) == keys(
        tokens, TokenLoaderConfig(prefetch=0, held_out=SplitConfig())
    )
    loader = TokenLoader(
        TokenLoaderConfig(prefetch=0), manifests=[TokenDataset(tokens)], text_tokenizer=None, batch_size=4, seed=3
    )
    assert loader.state_dict()["segments"][0]["sources"][0]["identity"] == TokenDataset(tokens).manifest.id


def test_seed_and_shards_do_not_choose_and_a_larger_share_holds_the_smaller():
    small, large = ({number for number in range(4000) if is_held_out(f"{number:09d}", share)} for share in (0.02, 0.05))
    assert small < large and len(small) == pytest.approx(80, abs=30) and len(large) == pytest.approx(200, abs=45)
    assert sorted(small)[:3] == [25, 72, 133]  # a run's order depends on it


def test_a_run_that_began_with_another_share_is_refused(tokens):
    def loader(share: float) -> TokenLoader:
        config = TokenLoaderConfig(prefetch=0, held_out=SplitConfig(share=share))
        return TokenLoader(config, manifests=[TokenDataset(tokens)], text_tokenizer=None, batch_size=4, seed=3)

    with pytest.raises(DataError, match="data sets and weights"):
        loader(0.25).load_state_dict(loader(0.0).state_dict())
    loader(0.25).load_state_dict(loader(0.25).state_dict())


def test_a_share_that_leaves_nothing_is_refused(tokens):
    with pytest.raises(DataError, match=r"data\.held_out\.share=1e-09 holds 0 of 64 samples out"):
        keys(tokens, TokenLoaderConfig(prefetch=0, held_out=SplitConfig(share=1e-9)))
    with pytest.raises(ValidationError, match="give one of them"):
        SplitConfig(share=0.1, path=Path("somewhere"))


def test_what_was_kept_for_other_shards_is_not_believed(tokens):
    config = TokenLoaderConfig(prefetch=0, held_out=SHARE)
    first = keys(tokens, config)
    (stored,) = (tokens / "views").glob("held_out-0.25*")
    stored.write_bytes(b"torn")
    assert keys(tokens, config) == first


def test_images_are_held_out_by_the_same_keys(tmp_path):
    source = ShapesSource(ShapesConfig(count=40), 0)
    write_shard(tmp_path / "a.tar", [source.record(number) for number in range(40)])

    def seen(held_out: bool) -> set[str]:
        loader = ImageLoader(
            ImageLoaderConfig(prefetch=0, held_out=SHARE),
            dataset=RawDataset(tmp_path),
            image_size=32,
            batch_size=1,
            seed=0,
            held_out=held_out,
        )
        return {loader.next_batch().keys[0] for _ in range(loader.samples)}

    held = {f"{number:09d}" for number in range(40) if is_held_out(f"{number:09d}", 0.25)}
    assert seen(True) == held and seen(False) == {f"{number:09d}" for number in range(40)} - held


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tokens, monkeypatch):
    def refused(*_: object):
        raise StorageError("read-only")

    config = TokenLoaderConfig(prefetch=0, held_out=SplitConfig(share=0.3))
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "atomic_write", refused)
        first = keys(tokens, config)
    assert not list((tokens / "views").glob("held_out-0.3*")) and keys(tokens, config) == first
