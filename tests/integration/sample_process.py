"""One process that draws, as a launcher would start it as one of several ranks."""

from pathlib import Path

from tokscale.base.config import decode
from tokscale.dist.env import ProcessEnv
from tokscale.stages import sample


def draw(folder: str, out: str, rank: int, world: int) -> None:
    values = {
        "export": Path(folder) / "dalle",
        "out": out,
        "prompts_file": Path(folder) / "prompts.txt",
        "format": "tar",
        "shard_images": 3,
        "device": "cpu",
    }
    sample.run(decode(sample.SampleConfig, values), ProcessEnv(rank=rank, world=world))
