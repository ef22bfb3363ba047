"""Does a critic make a class-conditional MaskGIT draw what was asked more often? A toy set with an exact answer.

`python tests/reports/maskgit_cpu_202611/critic.py` trains on figures and writes `critic.json` beside itself.

A class is a colour and a figure of 3 x 3 codes, which stands anywhere on a grid of 6 x 6. A drawn grid is right when it
holds the figure of its class in its colour and nothing else, for which all codes must agree on the place: what codes
that are drawn side by side get wrong. The same weights draw with the critic's scores and with their own confidence.
"""

import json
import math
import os
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import torch.nn.functional as F
from einops import rearrange

from tokscale.base import rng
from tokscale.base.batch import LABELS, TokenBatch
from tokscale.dist.comm import Comm
from tokscale.dist.env import ProcessEnv
from tokscale.models.maskgit import MaskGit, MaskGitConfig, MaskGitSampling
from tokscale.runs.environment import environment

HERE = Path(__file__).parent
SIDE, COLOURS, BATCH, STEPS, RATE = 6, 4, 64, 600, 3e-3
FIGURES = ("### ### ###", "### #.# ###", ".#. ### .#.", "#.# .#. #.#")
CLASSES = COLOURS * len(FIGURES)
SIZES = {"dim": 64, "depth": 3, "heads": 4, "dim_head": 16, "ff_mult": 3}
CRITICS = {"token_critic": {"token_critic": SIZES | {"depth": 2}}, "self_token_critic": {"self_token_critic": True}}
DRAWINGS, IMAGES = range(3), 16
SAMPLING = {"timesteps": 16, "topk_filter_thres": 0.0, "cond_scale": 1.0}


def places(figure: str) -> torch.Tensor:
    """Grids of 0 and 1 with a figure at each of its places."""
    drawn = torch.tensor([[sign == "#" for sign in row] for row in figure.split()]).long()
    room = SIDE - len(drawn)
    return torch.stack(
        [F.pad(drawn, (left, room - left, top, room - top)) for top in range(room + 1) for left in range(room + 1)]
    )


GRIDS = torch.stack([colour * places(figure) for figure in FIGURES for colour in range(1, COLOURS + 1)])
"""By class and place; 0 is the ground."""


def batch(step: int) -> TokenBatch:
    """Figures of random classes and places."""
    draw = rng.generator(0, "figures", step)
    labels, where = (torch.randint(0, count, (BATCH,), generator=draw) for count in GRIDS.shape[:2])
    none = torch.zeros(BATCH, 0, dtype=torch.int64)
    positions = torch.arange(step * BATCH, (step + 1) * BATCH)
    return TokenBatch(positions, none, none.bool(), GRIDS[labels, where], extra={LABELS: labels})


def trained(critic: str) -> tuple[MaskGit, dict[str, float]]:
    """A model, and the last step's figures."""
    config = MaskGitConfig.model_validate(
        SIZES
        | {"num_tokens": COLOURS + 1, "image_grid": (SIDE, SIDE), "cond_drop_prob": 0.0}
        | {"condition": {"kind": "classes", "num_classes": CLASSES}}
        | CRITICS[critic]
    )
    with rng.scope(0, critic):
        model = MaskGit(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        loss = model(batch(step))
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    figures = {name: value.item() for name, value in (loss.parts | loss.metrics).items()}
    return model, figures


def accuracy(model: MaskGit, seed: int, **options: bool) -> float:
    """Share of drawn grids that are right."""
    labels = torch.arange(CLASSES).repeat_interleave(IMAGES)
    none = torch.zeros(len(labels), 0, dtype=torch.int64)
    grids = model.generate_codes(
        none,
        none.bool(),
        options=MaskGitSampling(**SAMPLING, **options),
        seeds=[seed * len(labels) + row for row in range(len(labels))],
        extra={LABELS: labels},
    )
    same = (rearrange(grids, "b h w -> b 1 h w") == GRIDS[labels]).flatten(2).all(dim=-1)
    return same.any(dim=-1).float().mean().item()


def main() -> None:
    torch.set_num_threads(1)
    began, rows = time.process_time(), []
    for critic in CRITICS:
        model, figures = trained(critic)
        row = {"critic": critic, **figures}
        for name, ignored in (("with", False), ("without", True)):
            row[name] = [accuracy(model, seed, force_not_use_token_critic=ignored) for seed in DRAWINGS]
        print(row, f"{time.process_time() - began:.0f} s", flush=True)
        rows.append(row)
    config = {"sizes": SIZES, "critics": CRITICS, "steps": STEPS, "batch": BATCH, "sampling": SAMPLING}
    config |= {"classes": CLASSES, "images": IMAGES * CLASSES}
    mean = {
        name: sum(sum(row[name]) for row in rows) / sum(len(row[name]) for row in rows) for name in ("with", "without")
    }
    told = {"env": environment(Comm(ProcessEnv())) | {"executable": "python"}, "config": config, "rows": rows}
    told |= {"mean": mean, "cpu_seconds": time.process_time() - began}
    (HERE / "critic.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
