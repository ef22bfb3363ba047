"""Views: row masks by rule, exact dedupe, and no use with other shards."""

import pytest
from token_folders import make_tokens

from tokscale.base.errors import DataError
from tokscale.data.tokens.views import View, ViewRule, build_view


def kept(dataset, name) -> list[int]:
    view = View(dataset, name)
    rows = [view.rows(block) for block in range(len(dataset.sizes))]
    assert view.sizes.tolist() == [len(block) for block in rows]
    return [int(dataset.read(b).keys(block)[i]) for b, block in enumerate(rows) for i in range(len(block))]


@pytest.mark.parametrize(
    "rule,expected",
    [
        (ViewRule(), range(16)),
        (ViewRule(min_scores={"aesthetic": 9}), range(9, 16)),
        (ViewRule(max_aspect=1.1), range(7)),  # sample n is 64 + n by 64 pixels
        (ViewRule(min_side=65), []),
        (ViewRule(min_caption=4), range(10, 16)),
        (ViewRule(max_caption=3), range(10)),
        (ViewRule(min_caption=1, dedupe=True), range(16)),
    ],
)
def test_rules(tmp_path, rule, expected):
    dataset = make_tokens(tmp_path)
    if not len(expected):
        with pytest.raises(DataError, match="keeps none of 16 samples"):
            build_view(dataset, "v", rule)
        return
    build_view(dataset, "v", rule)
    assert kept(dataset, "v") == list(expected)


def test_dedupe_keeps_the_first_of_equal_codes(tmp_path):
    dataset = make_tokens(tmp_path, blocks=[4, 4, 4], shards=3)
    twice = {4: 1, 9: 1, 10: 6}
    for number in range(len(dataset.sizes)):
        dataset.read(number)
    original = dataset.read

    def with_copies(number):
        block = original(number)
        hashes = block.tensors["hash"].copy()
        for copy, source in twice.items():
            if copy // 4 == number:
                hashes[copy % 4] = original(source // 4).tensors["hash"][source % 4]
        block.tensors = dict(block.tensors) | {"hash": hashes}
        return block

    dataset.read = with_copies
    build_view(dataset, "unique", ViewRule(dedupe=True))
    assert kept(dataset, "unique") == [n for n in range(12) if n not in twice]
    # a first copy that the rule leaves out does not hide the second
    build_view(dataset, "later", ViewRule(dedupe=True, min_scores={"aesthetic": 2}))
    assert kept(dataset, "later") == [2, 3, 4, 5, 6, 7, 8, 11]


def test_the_same_view_has_the_same_id_everywhere(tmp_path):
    rule = ViewRule(min_caption=4)
    ids = []
    for folder in ("a", "b"):
        dataset = make_tokens(tmp_path / folder)
        build_view(dataset, "v", rule)
        ids.append(View(dataset, "v").id)
    assert ids[0] == ids[1]


def test_refusals(tmp_path):
    dataset = make_tokens(tmp_path)
    with pytest.raises(DataError, match=r"v\.safetensors: no such view.*`views`"):
        View(dataset, "v")
    with pytest.raises(DataError, match=r"no score 'beauty' is stored \(aesthetic\)"):
        build_view(dataset, "v", ViewRule(min_scores={"beauty": 1}))
    build_view(dataset, "v", ViewRule())
    changed = make_tokens(tmp_path, first=1)
    with pytest.raises(DataError, match=r"built for other shards.*finalise"):
        View(changed, "v")
