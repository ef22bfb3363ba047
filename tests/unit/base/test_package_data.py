from pathlib import Path

import pytest

import tokscale
from tokscale.base.errors import EnvironmentRefused
from tokscale.base.package_data import package_data_path


def test_a_checkout_has_its_files_beside_the_package():
    assert package_data_path("configs") == Path(tokscale.__file__).parent.parent / "configs"


def test_a_wheel_has_them_inside(monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "tokscale"
    (package / "_share" / "configs").mkdir(parents=True)
    (package.parent / "configs").mkdir()  # somebody else's
    monkeypatch.setattr(tokscale, "__file__", str(package / "__init__.py"))
    assert package_data_path("configs") == package / "_share" / "configs"


def test_a_broken_installation_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tokscale, "__file__", str(tmp_path / "tokscale" / "__init__.py"))
    with pytest.raises(EnvironmentRefused, match="install tokscale again"):
        package_data_path("configs")
