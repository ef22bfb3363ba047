"""`engine=zero2` over a recipe: what the file sets, and what the recipe says besides."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tokscale.base.log import logger

SETTINGS = ("engine", "optim", "schedule")
"""Groups whose files set some keys of many: the recipe's others stand. `model=` and `tokenizer=` replace whole."""
_log = logger("cli")


def keep_settings(
    config: type[BaseModel], key: str, choice: str, before: Mapping[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """What a group's file sets, and those of the other keys before it that go together with that.

    Args:
        config: Says what can stand below `key`.
        key: The group.
        choice: The name of its file, for the line that says what is dropped.
        before: What the recipe says.
        found: What the file says.
    """
    field = config.model_fields.get(key)
    if field is None:  # the stage will refuse the key itself
        return found
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in before.items():
        if name in found or name == "kind":
            continue
        if _goes(field.annotation, found | kept | {name: value}, name):
            kept[name] = value
        else:
            dropped.append(name)
    if dropped:
        _log.info("%s=%s has no use for the recipe's %s", key, choice, ", ".join(dropped))
    return kept | found


def _goes(annotation: Any, values: dict[str, Any], name: str) -> bool:
    """Whether the chosen kind knows a key and the file does not contradict it."""
    classes = [member for member in get_args(annotation) or (annotation,) if hasattr(member, "model_fields")]
    kind = values.get("kind")
    chosen = next((cls for cls in classes if kind in (None, *get_args(cls.model_fields["kind"].annotation))), None)
    if chosen is None or name not in chosen.model_fields:
        return False
    if any("${" in str(value) or value == "???" for value in values.values()):
        return True  # not known yet
    try:
        chosen.model_validate(values)
    except ValidationError as error:
        # What is wrong by itself stays, so that the stage says so; what only the file contradicts does not.
        return any(problem["loc"][:1] == (name,) for problem in error.errors())
    return True
