"""Many addresses in one: `https://host/{00000..00099}.tar`, as webdataset writes them."""

from itertools import islice, takewhile

from tokscale.base.address import Address
from tokscale.base.errors import ConfigError, EnvironmentRefused

_MOST = 1_000_000


def is_pattern(place: Address) -> bool:
    """Whether it stands for several."""
    return "{" in place


def expand(pattern: Address) -> tuple[Address, list[str]]:
    """The folder that all of a pattern's files are in, and their names below it, in order.

    Raises:
        ConfigError: When braces do not close, or it stands for more than a million.
        EnvironmentRefused: When the package that expands them is not installed.
    """
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise EnvironmentRefused(f"{pattern}: patterns need braceexpand: pip install 'tokscale[remote]'") from None
    try:
        found = list(islice(braceexpand(pattern), _MOST + 1))
    except ValueError:  # its UnbalancedBracesError
        raise ConfigError(f"{pattern}: its braces do not close; write {{00000..00099}} or {{a,b}}") from None
    if len(found) > _MOST:
        raise ConfigError(f"{pattern}: stands for more than {_MOST} addresses; name folders in place of shards")
    parents = [Address(name).parent.split("/") for name in dict.fromkeys(found)]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))]
    if len(shared) < 3:  # scheme and host
        raise ConfigError(f"{pattern}: its shards are in no common folder; tokenize each place on its own")
    root = Address("/".join(shared))
    return root, [name.removeprefix(f"{root}/") for name in dict.fromkeys(found)]
