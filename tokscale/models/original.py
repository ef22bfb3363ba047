"""Weights of dalle-pytorch's transformer, which DALL-E and CLIP share, under the names of our stack."""

import re
from collections.abc import Iterable, Mapping

from tokscale.base.errors import ConfigError
from tokscale.base.shapes import Shaped, Tensor
from tokscale.nn.config import StackConfig

State = dict[str, Shaped[Tensor, "..."]]

_LAYER = re.compile(r"layers\.(?:layers|blocks)\.(\d+)\.([01fg])(?:\.net)?\.(.+)")
_OWN = {"scale": "scale.scale"} | {
    f"{norm}.{part}": f"{norm}.{part}" for norm in ("norm", "norm_out") for part in ("weight", "bias")
}
_SHARED = {
    "to_qkv.weight": "to_qkv.weight",
    "to_out.0.weight": "to_out.weight",
    "to_out.0.bias": "to_out.bias",
    "net.0.weight": "to_hidden.weight",
    "net.0.bias": "to_hidden.bias",
    "net.3.weight": "to_out.weight",
    "net.3.bias": "to_out.bias",
}


def stack_from_original(
    state: Mapping[str, Shaped[Tensor, "..."]], config: StackConfig, *, source: str, target: str
) -> State:
    """The entries of a `Stack` from those of the original's `Transformer`.

    The original wraps each function in as many modules as it has options, each adding `fn.` to the names, and lists a
    shared function once per layer.

    Args:
        state: The whole state dict.
        config: The stack's options.
        source: Prefix of the transformer in `state`, e.g. `"transformer."`.
        target: Prefix of the stack in the result, e.g. `"stack."`.

    Raises:
        ConfigError: For an entry that has no place here.
    """
    attentions, feedforwards = list(dict.fromkeys(config.attn_ids())), list(dict.fromkeys(config.ff_ids()))
    found: State = {}
    for name, tensor in state.items():
        if not name.startswith(source):
            continue
        if config.rotary_emb and name == f"{source}pos_emb":  # computed here; who calls has compared the two
            continue
        match = _LAYER.fullmatch(name.removeprefix(source))
        layer, is_attention = (int(match[1]), match[2] in "0f") if match else (config.depth, False)
        part = re.sub(r"\bfn\.", "", match[3]) if match else name
        if layer >= config.depth or part not in _OWN | _SHARED:
            raise ConfigError(f"{name}: nothing here takes this entry; the checkpoint's options differ from {config!r}")
        if part in _OWN:
            found[f"{target}layers.{layer}.{'attn' if is_attention else 'ff'}.{_OWN[part]}"] = (
                tensor.flatten() if part == "scale" else tensor
            )
        elif is_attention:
            found[f"{target}attentions.{attentions.index(config.attn_ids()[layer])}.{_SHARED[part]}"] = tensor
        else:
            found[f"{target}feedforwards.{feedforwards.index(config.ff_ids()[layer])}.{_SHARED[part]}"] = tensor
    return found


def take(state: Mapping[str, Shaped[Tensor, "..."]], *names: str) -> Shaped[Tensor, "..."]:
    """The entry under the first of these names that is there: versions of the original differ.

    Raises:
        ConfigError: When none is.
    """
    for name in names:
        if name in state:
            return state[name]
    raise ConfigError(f"the checkpoint has no {' or '.join(names)}; it is damaged, or not of the model it is read as")


def refuse_others(names: Iterable[str], known: Iterable[str], elsewhere: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint with entries that nobody reads: the original may have trained with them.

    Args:
        names: Of all its entries.
        known: Those that are read.
        elsewhere: Prefixes of parts that are not this model, or whose entries are checked where they are read.

    Raises:
        ConfigError: Naming the first of them.
    """
    known = set(known)
    for name in names:
        if name not in known and not name.startswith(elsewhere):
            raise ConfigError(
                f"{name}: nothing here takes this entry; the checkpoint is of another version or other options. If the "
                "model does not need it, delete it from the checkpoint"
            )
