"""Every model by the `kind` of its configuration. A new one adds itself to the union and to the table."""

from typing import Annotated

from pydantic import Field
from torch import nn

from tokscale.base.config import Config
from tokscale.models.clip import CLIP, CLIPConfig
from tokscale.models.dalle import DALLE, DALLEConfig
from tokscale.models.maskgit import MaskGit, MaskGitConfig
from tokscale.models.parti import Parti, PartiConfig
from tokscale.models.rqtransformer import (
    HierarchicalCausalTransformer,
    HierarchicalConfig,
    RQTransformer,
    RQTransformerConfig,
)

ModelConfig = Annotated[
    DALLEConfig | CLIPConfig | MaskGitConfig | PartiConfig | RQTransformerConfig | HierarchicalConfig,
    Field(discriminator="kind"),
]

_MODELS: dict[type[Config], type[nn.Module]] = {
    CLIPConfig: CLIP,
    DALLEConfig: DALLE,
    HierarchicalConfig: HierarchicalCausalTransformer,
    MaskGitConfig: MaskGit,
    PartiConfig: Parti,
    RQTransformerConfig: RQTransformer,
}

_OF_PICTURES: tuple[type[Config], ...] = (CLIPConfig,)
_OF_SOFT_CODES: tuple[type[Config], ...] = (HierarchicalConfig, RQTransformerConfig)


def reads_pictures(config: Config) -> bool:
    """Whether a model trains on pictures themselves (`ImageBatch`); all others train on codes (`TokenBatch`)."""
    return isinstance(config, _OF_PICTURES)


def reads_soft_codes(config: Config) -> bool:
    """Whether a model's loss takes distributions of codes as targets."""
    return isinstance(config, _OF_SOFT_CODES)


def build_model(config: Config) -> nn.Module:
    """The model that a configuration describes, freshly initialised.

    Raises:
        ConfigError: When sizes that tokenizers dictate are not known yet.
    """
    return _MODELS[type(config)](config)
