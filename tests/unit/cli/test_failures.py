"""What a library raises that nobody expected of it: a sentence and a code, where a file is to blame."""

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from tokscale.cli.failures import explain


def test_rules_of_a_file_that_its_library_cannot_bear_are_the_files_affair():
    tables = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tables.normalizer = normalizers.Replace(Regex("(a+)+$"), "")
    with pytest.raises(BaseException, match="retry-limit") as caught:  # a panic of Rust, which is no Exception
        tables.encode("a" * 40 + "b")
    code, said = explain(caught.value)
    assert code == 65 and "tokenizer's file" in said and "defect" not in said
