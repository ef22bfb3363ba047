"""Every model by the `kind` of its configuration. Installed packages add theirs under `tokscale.models`."""

from typing import Annotated, Any

from tokscale.base.config import Config, kind_of
from tokscale.base.registry import ConfigOf, Registry, admitted
from tokscale.models.clip import CLIP
from tokscale.models.dalle import DALLE
from tokscale.models.maskgit import MaskGit
from tokscale.models.model import AnyModelConfig, Model
from tokscale.models.parti import Parti
from tokscale.models.rqtransformer import HierarchicalCausalTransformer, RQTransformer


def _admitted(name: str, offered: Any) -> type[Model]:
    """A model class, if that is what a package offers.

    Raises:
        TypeError: When it lacks a part, or its configuration has another kind than its name.
    """
    return admitted(name, offered, Model, ("hub_task", "example", "command"), {"config_class": False})


MODELS: Registry[type[Model]] = Registry("model.kind", group="tokscale.models", admit=_admitted)
for _model in (DALLE, CLIP, MaskGit, Parti, RQTransformer, HierarchicalCausalTransformer):
    MODELS.add(kind_of(_model.config_class), _admitted(kind_of(_model.config_class), _model))

ModelConfig = Annotated[AnyModelConfig, ConfigOf(MODELS, lambda model: model.config_class)]
"""Configuration of any model, discriminated by `kind`."""


def model_class(config: Config) -> type[Model]:
    """The model that a configuration asks for."""
    return next(model for model in MODELS.usable().values() if model.config_class is type(config))


def build_model(config: Config) -> Model:
    """The model that a configuration describes, freshly initialised.

    Raises:
        ConfigError: When sizes that tokenizers dictate are not known yet.
    """
    make: Any = model_class(config)
    return make(config)
