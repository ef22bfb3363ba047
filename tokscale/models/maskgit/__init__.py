"""MaskGIT and Muse: masked codes predicted in parallel."""

from tokscale.models.maskgit.config import CriticConfig, LowresConfig, MaskGitConfig, MaskGitSampling
from tokscale.models.maskgit.model import MaskGit
from tokscale.models.maskgit.muse import Muse

__all__ = ["CriticConfig", "LowresConfig", "MaskGit", "MaskGitConfig", "MaskGitSampling", "Muse"]
