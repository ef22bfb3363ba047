"""The commands that a message names, completed to what can be typed: with the words of the command that has failed.

Where a message is made nobody knows what was typed. `run `tokscale tokenize action=verify`` helps only with the recipe,
the folders and the keys that the failed command had.
"""

import re
import shlex
from collections.abc import Sequence

from tokscale.runs.stage import StageConfig
from tokscale.stages import registry

_COMMAND = re.compile(r"(?<!that )`tokscale ([a-z-]+)((?: [^`<]*)?)`")
"""A command in a message; what another one `that ...` wrote is no way out."""


def completed(message: str, stage: str, overrides: Sequence[str]) -> str:
    """A message with its commands as they can be run.

    Args:
        message: Of a failure; its commands stand between backticks.
        stage: That has failed.
        overrides: The words that were typed for it. A command for the same stage takes all of them, but those it gives
            itself; one for another stage the recipe, and the keys that all stages share.
    """

    def command(found: re.Match[str]) -> str:
        if found[1] not in registry.STAGES:
            return found[0]
        own = shlex.split(found[2])
        typed = [word for word in overrides if _belongs(_key(word), found[1] == stage)]
        kept = [word for word in typed if _key(word) not in {_key(given) for given in own}]
        return f"`{shlex.join(['tokscale', found[1], *kept, *own])}`"

    return _COMMAND.sub(command, message)


def _belongs(key: str, same_stage: bool) -> bool:
    """Whether a word goes along; what one command alone was asked to do does not."""
    if same_stage:
        return key not in ("action", "repair")
    return key == "recipe" or key in StageConfig.model_fields


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
