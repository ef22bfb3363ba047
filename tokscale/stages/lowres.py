"""Two resolutions in training: data with low-resolution codes."""

from collections.abc import Sequence
from typing import Any, TypeVar

from tokscale.base.batch import LOWRES_CODES
from tokscale.base.config import Config
from tokscale.base.errors import ConfigError
from tokscale.data.loading import TokenLoaderConfig
from tokscale.data.tokens.manifest import TokenDataset

C = TypeVar("C", bound=Config)


def fit_lowres(model: C, data: TokenLoaderConfig, datasets: Sequence[TokenDataset]) -> tuple[C, TokenLoaderConfig]:
    """A super-resolution model with the sizes of its data's low-resolution codes, and a loader that reads them.

    Other models, and their loaders, are left alone.

    Raises:
        DataError: When the data have no such codes.
        ConfigError: When a size or the fingerprint was given and is another, naming the key, both and the folder; or
            when the low-resolution codes are to be the model's own too.
    """
    upscaler: Any = model
    if getattr(upscaler, "lowres", None) is None:
        return model, data
    if data.codes == LOWRES_CODES:
        raise ConfigError(
            f"data.codes={LOWRES_CODES}: a model with lowres is told these codes and draws finer ones; leave "
            "data.codes out, or train a base model without model.lowres"
        )
    stream = datasets[0].stream(LOWRES_CODES)
    source = f"stream {LOWRES_CODES} of {datasets[0].folder}"
    fitted = upscaler.with_lowres(stream.num_tokens, stream.code_shape, stream.tokenizer, source=source)
    streams = tuple(dict.fromkeys((*data.streams, LOWRES_CODES)))
    return fitted, data.model_copy(update={"streams": streams})
