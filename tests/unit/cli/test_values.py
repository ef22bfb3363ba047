"""How the text behind a key is read, by the form of the key."""

import pytest

from tokscale.cli.values import parse


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [
        ("text", "null", "null"),
        ("text or null", "null", None),
        ("text or null", "'null'", "null"),
        ("text or null", "1e3", "1e3"),
        ("texts", "a, b", ["a, b"]),
        ("texts", "null", ["null"]),
        ("texts", "[a b, c]", ["a b", "c"]),
        ("other", "null", None),
        ("other", "1e3", 1000.0),
        ("other", "[1, 2]", [1, 2]),
        ("other", "{a: null}", {"a": None}),
    ],
)
def test_each_form_has_its_own_reading(form, text, value):
    assert parse("model.key", text, form) == value


def test_a_prompt_is_text_wherever_it_stands_but_keys_and_values_are_not():
    assert parse("samples.prompts", "a red ring, small", "other") == "a red ring, small"
    assert parse("samples.prompts", "{a: 1}", "other") == {"a": 1}
