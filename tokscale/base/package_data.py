"""Where the files that travel with the package lie: beside it in a checkout, inside it in a wheel."""

from pathlib import Path

import tokscale
from tokscale.base.errors import EnvironmentRefused


def package_data_path(name: str) -> Path:
    """The folder `configs` or `slurm`.

    Raises:
        EnvironmentRefused: When the installation lacks it.
    """
    package = Path(tokscale.__file__).resolve().parent
    for folder in (package.parent / name, package / "_share" / name):
        # The first test tells a checkout from a `configs` that happens to lie in site-packages.
        if folder.is_dir() and (folder.parent.name == "_share" or (package.parent / "pyproject.toml").exists()):
            return folder
    raise EnvironmentRefused(f"{name}/ is neither beside {package} nor inside it; install tokscale again")
