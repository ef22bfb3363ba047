"""`tokscale completion bash|zsh`: a script for the shell, made from the registries at the moment it is asked for.

A script that asked the program at each press of the key would wait for it; this one knows the words by itself, and is
made anew after an update: `source <(tokscale completion bash)`.
"""

import shlex
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from tokscale.base.config import annotation_of, did_you_mean
from tokscale.base.describe import classes_below
from tokscale.base.errors import ConfigError
from tokscale.base.package_data import package_data_path
from tokscale.stages import registry

SHELLS = ("bash", "zsh")
_DEEPEST = 3
"""Parts of a dotted key that are offered."""

_SCRIPT = r"""# tokscale completion, made by `tokscale completion @SHELL@`; make it again after an update
@HEAD@_tokscale_words() {
  case "$1" in
@CASES@
  esac
}

_tokscale() {
  local line="${COMP_LINE:0:$COMP_POINT}" cur stage words prefix
  cur="${line##* }"
  stage="${line#* }"
  if [[ "$stage" == *" "* ]]; then stage="${stage%% *}"; else stage=""; fi
  words="$(_tokscale_words "$stage")"
  if [[ "$cur" == *=* ]]; then
    words="$(printf '%s\n' "$words" | grep -F -- "${cur%%=*}=")"
  else
    words="$(printf '%s\n' "$words" | sed 's/=.*/=/' | sort -u)"
  fi
  COMPREPLY=($(printf '%s\n' "$words" | awk -v cur="$cur" 'index($0, cur) == 1'))
  # Readline replaces only what stands behind the last of its word breaks.
  if [[ "$cur" == *=* && "${COMP_WORDBREAKS-}" == *=* ]]; then
    prefix="${cur%"${cur##*=}"}"
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
  fi
  if [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[*]}" == *= ]]; then compopt -o nospace 2>/dev/null || true; fi
}
complete -o default -F _tokscale tokscale
"""


def script(shell: str) -> str:
    """What the shell is to source.

    Raises:
        ConfigError: When it is another shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"completion: got {shell!r}{did_you_mean(shell, SHELLS)}")
    cases = [_case("", sorted([*registry.available(), "completion", "--help", "--version"]))]
    cases += [_case("completion", list(SHELLS))]
    cases += [_case(name, list(dict.fromkeys(_words(stage)))) for name, stage in sorted(registry.available().items())]
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _SCRIPT.replace("@SHELL@", shell).replace("@HEAD@", head).replace("@CASES@", "\n".join(cases))


def _case(stage: str, words: list[str]) -> str:
    return f"    {shlex.quote(stage)}) printf '%s\\n' {' '.join(shlex.quote(word) for word in words)} ;;"


def _words(stage: registry.Stage) -> Iterator[str]:
    module = registry.import_stage(stage)
    yield "--help"
    yield from getattr(module, "whats", dict)()
    configs = package_data_path("configs")
    for group in ("recipe", *(name for name in module.CONFIG.model_fields if (configs / name).is_dir())):
        folder = configs / group
        yield from (f"{group}={path.relative_to(folder).with_suffix('').as_posix()}" for path in folder.rglob("*.yaml"))
    yield from _keys(module.CONFIG, ())


def _keys(config: type[BaseModel], above: tuple[str, ...]) -> Iterator[str]:
    for name, field in config.model_fields.items():
        path = (*above, name)
        choices: Any = _choices(annotation_of(field))
        yield from (f"{'.'.join(path)}={choice}" for choice in choices or [""])
        if len(path) < _DEEPEST:
            for kind in classes_below(config, [name]):
                yield from _keys(kind, path)


def _choices(annotation: Any) -> list[str]:
    """Values that a key is one of, where they are few and known."""
    if annotation is bool:
        return ["true", "false"]
    values = getattr(annotation, "__args__", ())
    return [str(value) for value in values] if values and all(isinstance(value, str) for value in values) else []
