"""Prompts that do not fit are said, once."""

import tiny_exports

from tokscale.inference.pretrained import load_pretrained


def test_prompts_that_are_cut_are_said_once(tmp_path):
    tiny_exports.make_exports(tmp_path)
    pretrained = load_pretrained(tmp_path / "dalle", device="cpu")
    pretrained.prompts(["a red circle"])
    assert pretrained.cut_captions() == []
    pretrained.prompts(["a red circle", "a small red circle " * 9])
    (words,) = pretrained.cut_captions()
    assert words.startswith("1 of 2 captions (50 %) have more than the 6 tokens") and "text_seq_len" in words
    assert pretrained.cut_captions() == []
