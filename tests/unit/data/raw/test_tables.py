"""Tables are read strictly: ten rows give ten whole captions, or an error that names the row."""

import json

import pytest

from tokscale.base.config import decode
from tokscale.base.errors import DataError
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.raw.sources import SourceConfig, open_source

PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\nIDATx\x9cc`"
    b"\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)


def opened(folder, data, kind: str = "csv", **options):
    for number in range(10):
        (folder / f"{number}.png").write_bytes(PNG)
    path = folder / f"table.{kind}"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return open_source(decode(SourceConfig, {"kind": kind, "path": str(path), **options}), 0)


def captions(source) -> list[str]:
    found = []
    for index in range(len(source)):
        try:
            found.append(source.record(index).caption)
        except BadSample as error:
            found.append(f"! {error.reason}: {error.detail}")
    return found


def table(*rows: str, sign: str = ",", end: str = "\n") -> str:
    return end.join([f"path{sign}caption", *rows]) + end


WHOLE = [f"{n}.png,plain {n}" for n in range(10)]
QUOTES = {
    "one that nothing closes": ({2: '2.png,"Hello there 2'}, {2}),
    "one in the first row": ({0: '0.png,"zero'}, {0}),
    "one in the last row": ({9: '9.png,"nine'}, {9}),
    "two in rows apart": ({2: '2.png,"a 12', 6: '6.png,b 7"'}, {2}),
    "two in rows that follow each other": ({2: '2.png,"a 12', 3: '3.png,b 7"'}, {2}),
    "text after the closing one": ({4: '4.png,"a" ring'}, {4}),
    "many": ({n: f'{n}.png,"open {n}' for n in range(0, 10, 2)}, {0, 2, 4, 6, 8}),
}


@pytest.mark.parametrize("changes, bad", QUOTES.values(), ids=QUOTES.keys())
def test_an_unbalanced_quote_costs_its_own_row_and_is_named(tmp_path, changes, bad):
    rows = [changes.get(n, row) for n, row in enumerate(WHOLE)]
    with pytest.raises(DataError, match=rf"table\.csv: row {min(bad) + 1} .*quoting=none.*on_bad_row=drop"):
        opened(tmp_path, table(*rows))
    found = captions(opened(tmp_path, table(*rows), on_bad_row="drop"))
    expected = {n: changes.get(n, f",plain {n}").partition(",")[2].strip('"') for n in range(10)}
    assert len(found) == 10
    for number in range(10):
        if number in bad:
            assert found[number].startswith(f"! bad_row: row {number + 1} ")
        else:
            assert found[number] in (f"plain {number}", expected[number], changes.get(number, "").partition(",")[2])
    plain = captions(opened(tmp_path, table(*rows), quoting="none"))
    assert plain == [changes.get(n, f",plain {n}").partition(",")[2] for n in range(10)]


BAD = {
    "too few fields": ("2.png", "has 1 fields, the header 2"),
    "too many fields": ("2.png,a,b", "has 3 fields, the header 2"),
    "a zero byte": ("2.png,a\0b", "zero byte"),
    "another encoding": (b"2.png,gr\xf6\xdfer", "is not text in utf-8"),
    "a line end of another kind": ("2.png,a\rb", "is no row of a table"),
}


@pytest.mark.parametrize("row, words", BAD.values(), ids=BAD.keys())
def test_a_row_that_is_none_is_named_or_dropped(tmp_path, row, words):
    data = b"\n".join([b"path,caption", b"1.png,one", row if isinstance(row, bytes) else row.encode(), b"3.png,three"])
    with pytest.raises(DataError, match=rf"row 2 .*{words}"):
        opened(tmp_path, data)
    first, second, third = captions(opened(tmp_path, data, on_bad_row="drop"))
    assert (first, third) == ("one", "three") and second.startswith("! bad_row: row 2 ")


def test_what_is_a_table_by_the_book_is_read_whole(tmp_path):
    rows = ['0.png,"a ""red"" ring"', '1.png,"two\nlines, with a comma"', "", '2.png,"' + "long " * 40_000 + 'end"']
    expected = ['a "red" ring', "two\nlines, with a comma", "long " * 40_000 + "end"]
    assert captions(opened(tmp_path, table(*rows))) == expected
    assert captions(opened(tmp_path, "\ufeff" + table(*rows))) == expected
    for encoding in ("utf-16", "utf-32"):
        assert captions(opened(tmp_path, table(*rows).encode(encoding), encoding=encoding)) == expected
        with pytest.raises(DataError, match=rf"is text in {encoding}.*source\.encoding={encoding}"):
            opened(tmp_path, table(*rows).encode(encoding))
    assert captions(opened(tmp_path, table("0.png,größer").encode("latin-1"), encoding="latin-1")) == ["größer"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_each_kind_of_line_end_is_read(tmp_path, end):
    assert captions(opened(tmp_path, table(*WHOLE, end=end))) == [f"plain {n}" for n in range(10)]


def test_tsv_with_quotes_that_mean_nothing(tmp_path):
    rows = [f'{n}.png\t{n} "inch' for n in range(10)]
    found = opened(tmp_path, table(*rows, sign="\t"), delimiter="tab", quoting="none")
    assert captions(found) == [f'{n} "inch' for n in range(10)]


@pytest.mark.parametrize("sign, word", [(";", "';'"), ("\t", "tab"), ("|", r"'\|'")])
def test_another_delimiter_is_recognised(tmp_path, sign, word):
    with pytest.raises(DataError, match=rf"no column 'path'.*source\.delimiter={word}"):
        opened(tmp_path, table(*[row.replace(",", sign) for row in WHOLE], sign=sign))


def test_headers_that_are_none(tmp_path):
    with pytest.raises(DataError, match="'caption' comes twice"):
        opened(tmp_path, "path,caption,caption\n0.png,a,b\n")
    with pytest.raises(DataError, match="is empty"):
        opened(tmp_path, "")
    with pytest.raises(DataError, match="no rows"):
        opened(tmp_path, "path,caption\n")


LINES = {
    "no json": ("{nope", "is no JSON"),
    "a torn line": ('{"path": "1.pn', "is no JSON"),
    "a list": ('["1.png", "x"]', "is list, not an object"),
    "a name twice": ('{"path": "1.png", "caption": "a", "caption": "b"}', "a name comes twice"),
    "another encoding": (b'{"path": "1.png", "caption": "gr\xf6\xdfer"}', "is no JSON"),
}


@pytest.mark.parametrize("line, words", LINES.values(), ids=LINES.keys())
def test_a_json_line_that_is_none_is_named_or_dropped(tmp_path, line, words):
    good = json.dumps({"path": "0.png", "caption": "one\u2028line"}).encode()
    data = b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good, b""])
    with pytest.raises(DataError, match=rf"row 2 .*{words}"):
        opened(tmp_path, data, "jsonl")
    assert captions(opened(tmp_path, data, "jsonl", on_bad_row="drop"))[::2] == ["one\u2028line"] * 2


def test_cells_of_other_types_cost_their_samples(tmp_path):
    cells = ["text", 7, None, ["one", "two"], {"a": 1}, [["deep"]], "", True]
    data = "\n".join(json.dumps({"path": "0.png", "caption": cell}) for cell in cells)
    found = captions(opened(tmp_path, data, "jsonl"))
    reasons = [text.partition(":")[0] for text in found]
    assert reasons[0] == "text" and found[3] == "one\ntwo"
    assert reasons[1] == reasons[4] == reasons[5] == reasons[7] == "! caption_type"
    assert reasons[2] == "! caption_missing" and reasons[6] == "! caption_empty"
    paths = "\n".join(json.dumps({"path": cell, "caption": "x"}) for cell in [7, None, "a\0b", "no.png", ["0.png"]])
    found = [text.partition(":")[0] for text in captions(opened(tmp_path, paths, "jsonl"))]
    assert found == ["! image_type", "! image_missing", "! unreadable", "! unreadable", "! image_type"]


def test_rows_of_one_image_become_its_captions(tmp_path):
    rows = ["0.png,a", "1.png,b", "0.png,c"]
    source = opened(tmp_path, table(*rows), group_by="path")
    assert [source.record(n).captions or (source.record(n).caption,) for n in range(len(source))] == [
        ("a", "c"),
        ("b",),
    ]


def test_several_columns_are_several_captions(tmp_path):
    data = "path,short,long,kind\n0.png,a,a long one,cat\n1.png,b,b long one,dog\n"
    source = opened(
        tmp_path, data, caption_column=["short", "long"], label_column="kind", template="{caption} of a {class}"
    )
    assert source.classes == ["cat", "dog"] and source.record(1).label == 1
    assert source.record(0).captions == ("a of a cat", "a long one of a cat")
