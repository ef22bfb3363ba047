"""A kind without a part cannot be imported: tables know all kinds, classes bring what their base leaves open."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from tokscale.base.config import Config
from tokscale.base.kinds import for_each
from tokscale.base.registry import admitted
from tokscale.engine.config import EagerConfig
from tokscale.nn.conditioning import AnyConditionConfig, CaptionConfig
from tokscale.tokenizers.quantize.config import AnyQuantizerConfig, FSQConfig
from tokscale.tokenizers.text.base import AnyTextTokenizer
from tokscale.tokenizers.text.registry import _admitted
from tokscale.tokenizers.text.tokenizer import SubwordTokenizer, TextTokenizerConfig
from tokscale.tokenizers.vqgan.config import AnyNetworkConfig, ResNetConfig

Number = Literal["one", "two"]


def test_a_table_lacks_no_kind_and_has_none_too_many():
    assert for_each(Number, {"one": 1, "two": 2})["two"] == 2
    with pytest.raises(TypeError, match="lacks 'two' and has nothing too many"):
        for_each(Number, {"one": 1})
    with pytest.raises(TypeError, match="lacks nothing and has 'three' too many"):
        for_each(Number, {"one": 1, "two": 2, "three": 3})
    with pytest.raises(TypeError, match="lacks CaptionConfig"):
        for_each(Annotated[CaptionConfig | FSQConfig, Field(discriminator="kind")], {FSQConfig: 1})


@pytest.mark.parametrize(
    ("base", "part"),
    [
        (AnyConditionConfig, "reads_states"),
        (AnyConditionConfig, "fitted"),
        (AnyQuantizerConfig, "code_levels"),
        (AnyNetworkConfig, "any_size"),
        (EagerConfig.__mro__[1], "with_whole_weights"),
    ],
)
def test_a_kind_without_a_part_is_refused_when_it_is_made(base, part):
    with pytest.raises(TypeError, match=f"Half lacks .*{part}"):
        type("Half", (base,), {"__annotations__": {"kind": Literal["half"]}, "kind": "half", "__module__": __name__})


def test_a_kind_that_is_like_another_has_its_parts():
    class Wider(ResNetConfig):
        kind: Literal["wider"] = "wider"  # pyright: ignore[reportIncompatibleVariableOverride]

    assert Wider(dim=8, layers=1).reduction == 2 and Wider.any_size


class LettersConfig(TextTokenizerConfig):
    kind: Literal["letters"] = "letters"  # pyright: ignore[reportIncompatibleVariableOverride]


def offered(**parts: Any) -> Any:
    return type("Letters", (SubwordTokenizer,), {"config_class": LettersConfig, **parts})


def test_a_text_tokenizer_of_a_package_is_taken_when_it_is_whole():
    assert _admitted("letters", offered()) is not None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (object(), "is no subclass of .*AnyTextTokenizer"),
        (type("Bare", (AnyTextTokenizer,), {"config_class": LettersConfig}), "lacks decode, encode_ragged"),
        (offered(config_class=TextTokenizerConfig), "has kind='bpe', 'hf', 'clip', not 'letters'"),
        (offered(config_class=None), "config_class of Letters is None, no configuration"),
        (offered(training_config=LettersConfig), "has a training_config, but lacks trained"),
    ],
)
def test_a_text_tokenizer_that_lacks_something_is_refused_with_what(what, message):
    with pytest.raises(TypeError, match=message):
        _admitted("letters", what)


def test_a_class_of_another_sort_or_without_a_kind_is_refused():
    class Plain(Config):
        size: int = 1

    class Thing:
        config = Plain

    with pytest.raises(TypeError, match="has kind=, not 'thing'"):
        admitted("thing", Thing, Thing, (), {"config": False})
    with pytest.raises(TypeError, match="lacks command"):
        admitted("thing", Thing, Thing, ("command",), {})
