"""Decoding is strict, and its errors name the path, the value and the way out."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from tokscale.base.config import Config, decode, encode, fingerprint
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
    with pytest.raises(ConfigError, match=r"^needed\.kind: required, but not given$"):
        decode(Trainer, {"needed": {"heads": 4}})
    with pytest.raises(ConfigError, match=r"^layer\.haeds: unknown key; did you mean 'heads'\?$"):
        decode(Trainer, {"needed": needed, "layer": {"haeds": 4}})


def test_a_config_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        Axial().heads = 3


def test_fingerprint_depends_on_values_and_not_on_key_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    assert fingerprint(Axial()) == fingerprint(encode(Axial())) != fingerprint(Axial(heads=4))
