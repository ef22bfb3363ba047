"""One tokenizing process, as another program would start it."""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokscale.dist.env import ProcessEnv
from tokscale.stages import tokenize
from tokscale.stages.tokenize import TokenizeConfig, run


def work(root: str, tokens: str, action: str, keys: Mapping[str, Any]) -> None:
    torch.set_num_threads(1)
    config = TokenizeConfig.model_validate(
        {
            "action": action,
            "data_dir": Path(root),
            "tokens": Path(tokens),
            "run_dir": Path(tokens).with_suffix(".run"),
            "image_tokenizer": Path(root, "tokenizer"),
            "unit_samples": 60,
            "encode_batch": 8,
            "block_size": 16,
            "work": {"decode_threads": 2, "max_deaths": 1000, "retry_seconds": 0.05},
            **keys,
        }
    )
    try:
        run(config, ProcessEnv())
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def work_until_asked(*arguments: Any) -> None:
    """`work`, asked to stop as a scheduler does it when the first unit is done."""
    made = tokenize._made

    def done(path: Path, metrics: Mapping[str, Any]) -> None:
        made(path, metrics)
        os.kill(os.getpid(), signal.SIGUSR1)

    tokenize._made = done
    work(*arguments)
