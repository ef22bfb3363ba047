"""Decoding is strict, and its errors name the path, the value and the way out."""

import math
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from tokscale.base.config import Config, PathKey, StoredName, decode, encode, fingerprint
from tokscale.base.errors import ConfigError


class Axial(Config):
    kind: Literal["axial"] = "axial"
    axis: Literal["row", "col"] = "row"
    heads: int = 8


class Conv(Config):
    kind: Literal["conv"] = "conv"
    kernel_size: int = 5

    @model_validator(mode="after")
    def _odd(self):
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd so that the window has a centre; got {self.kernel_size}")
        return self


class Root(Config):
    layer: Annotated[Axial | Conv, Field(discriminator="kind")]
    spare: Axial | None = None
    by_name: dict[str, Axial] = {}
    attn_types: tuple[Literal["full", "axial_row"], ...] = ("full",)
    rate: float = 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": {"kind": "axial", "headz": 2}}, "layer.headz: unknown key; did you mean 'heads'?"),
        ({"layer": {"kind": "axail"}}, "layer.kind: got 'axail'; did you mean 'axial'?"),
        ({"layer": {}}, "layer.kind: required, but not given"),
        ({"layer": {"kind": "conv", "kernel_size": 4}}, "kernel_size must be odd"),
        ({"layre": {}}, "layre: unknown key; did you mean 'layer'?"),
        ({}, "layer: required, but not given"),
        ({"layer": {"kind": "conv"}, "spare": {"axsi": 1}}, "spare.axsi: unknown key; did you mean 'axis'?"),
        (
            {"layer": {"kind": "conv"}, "by_name": {"a": {"axis": "rwo"}}},
            "by_name.a.axis: got 'rwo'; did you mean 'row'?",
        ),
        (
            {"layer": {"kind": "conv"}, "attn_types": ["full", "axial_roww"]},
            "attn_types[1]: got 'axial_roww'; did you mean 'axial_row'?",
        ),
        ({"layer": {"kind": "conv"}, "rate": "fast"}, "rate: got 'fast'; input should be a valid number"),
    ],
)
def test_errors_name_path_value_and_way_out(values, message):
    with pytest.raises(ConfigError) as caught:
        decode(Root, values)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\."):
        decode(Root, values, where="model")


def test_decode_reads_back_what_encode_wrote():
    root = decode(Root, {"layer": {"kind": "conv", "kernel_size": 7}, "by_name": {"a": {"heads": 2}}})
    assert decode(Root, encode(root)) == root
    assert root.layer == Conv(kernel_size=7)


class Trainer(Config):
    layer: Annotated[Conv | Axial, Field(discriminator="kind")] = Axial()
    needed: Annotated[Conv | Axial, Field(discriminator="kind")]


def test_an_option_alone_leaves_the_kind_as_it_is_by_default():
    needed = {"kind": "conv"}
    assert decode(Trainer, {"needed": needed, "layer": {"heads": 4}}).layer == Axial(heads=4)
    assert decode(Trainer, {"needed": needed, "layer": {"kind": "conv"}}).layer == Conv()
    with pytest.raises(
        ConfigError, match=r"^needed\.kind: required, but not given; give needed\.kind=KIND, one of axial, conv$"
    ):
        decode(Trainer, {"needed": {"heads": 4}})
    with pytest.raises(ConfigError, match=r"^layer\.haeds: unknown key; did you mean 'heads'\?$"):
        decode(Trainer, {"needed": needed, "layer": {"haeds": 4}})


def test_a_config_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        Axial().heads = 3


def test_fingerprint_depends_on_values_and_not_on_key_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    assert fingerprint(Axial()) == fingerprint(encode(Axial())) != fingerprint(Axial(heads=4))


class Places(Config):
    folder: PathKey = Path("runs")
    spare: PathKey | None = None
    several: tuple[PathKey, ...] = ()
    rates: tuple[float, ...] = ()
    scores: dict[str, float] = {}
    anything: dict[str, Any] = {}
    count: int = 1


@pytest.mark.parametrize("given", ["runs/a b", "2026", "数据", ".", "../x", "-", "a=b", "1e3", "true"])
def test_a_path_is_any_text_that_a_file_system_takes(given):
    config = decode(Places, {"folder": given, "spare": given, "several": [given]})
    assert config.folder == config.spare == config.several[0] == Path(given)


def test_a_path_may_begin_at_a_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert decode(Places, {"folder": "~/runs"}).folder == Path("/home/somebody/runs")


@pytest.mark.parametrize(
    "given",
    [
        *(2026, 1e3, True, date(2026, 11, 29), [], {}, b"runs"),
        *("", "  ", "a\0b", "a\nb", "a\x1bb", "a\x7f", "~nobody-of-that-name/runs"),
        *(pytest.param(text, id=f"long or strange {i}") for i, text in enumerate(["\udcff", "x" * 256, "x/" * 2048])),
    ],
)
@pytest.mark.parametrize("key", ["folder", "spare", "several"])
def test_what_is_no_path_is_refused_by_the_keys_name(key, given):
    with pytest.raises(ConfigError) as caught:
        decode(Places, {key: [given] if key == "several" else given})
    assert str(caught.value).startswith(f"{key}[0]: got" if key == "several" else f"{key}: got")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 2**63, -(2**63), pytest.param(10**5000, id="huge")])
@pytest.mark.parametrize("key", ["count", "rates", "scores", "anything"])
def test_no_key_takes_a_number_that_is_not_finite_or_beyond_what_files_hold(key, number):
    value = {"count": number, "rates": [1.0, number], "scores": {"x": number}, "anything": {"a": [{"b": number}]}}[key]
    with pytest.raises(ConfigError, match=rf"^{key}.*: got "):
        decode(Places, {key: value})


def test_no_configuration_holds_infinity_even_when_it_is_made_in_python():
    for values in ({"rates": (math.inf,)}, {"scores": {"x": math.nan}}):
        with pytest.raises(ValueError, match="finite"):
            Places(**values)


def test_depth_and_length_of_what_is_told_are_bounded():
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ConfigError, match="levels deep"):
        decode(Places, {"anything": {"a": deep}})
    with pytest.raises(ConfigError) as caught:
        decode(Places, {f"key{i}" * 1000: 1 for i in range(1000)} | {"count": "x" * 10**6})
    assert len(str(caught.value)) < 200_000 and "and 981 problems more" in str(caught.value)


class Stored(Config):
    file: StoredName


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/passwd", "a/../../b", "a//b", "a/./b", "./a", "a\0b", "a\nb"])
def test_a_stored_name_does_not_leave_its_folder(name):
    assert decode(Stored, {"file": "a/b c.tar"}).file == "a/b c.tar"
    with pytest.raises(ConfigError, match=r"^file: "):
        decode(Stored, {"file": name})
