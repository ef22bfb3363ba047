"""What `tokscale sample` does with its prompts: units that any number of processes draw, and the listing of all.

A unit is some prompts that follow each other, drawn in batches of its own, so that it is the same bytes whoever draws
it and however often that was begun. Which process draws it is settled by leases, as in tokenization: processes may be
ranks of one job, tasks of an array or started by hand, at any time. Memory holds a batch.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from tokscale.base.config import decode, fingerprint
from tokscale.base.errors import ConfigError, DataError, StopRequested
from tokscale.base.files import (
    as_written,
    atomic_write,
    read_json,
    read_regular,
    remove_partials,
    sha256_file,
    write_json,
)
from tokscale.base.flock import EXCLUSIVE, try_lock
from tokscale.base.kinds import for_each
from tokscale.base.log import logger
from tokscale.base.rng import seed_of
from tokscale.base.text import lines_of
from tokscale.data.tokenization.leases import Leases
from tokscale.dist.device import choose_device, choose_dtype
from tokscale.dist.env import ProcessEnv
from tokscale.dist.slurm import note_kept
from tokscale.evaluation.measures import best
from tokscale.inference.cascade import Cascade
from tokscale.inference.drawn import Drawn, DrawnFormat, open_sink, pixels_of, png_of
from tokscale.inference.grids import save_grid
from tokscale.inference.pretrained import Pretrained, load_pretrained
from tokscale.inference.scorer import Scorer, load_scorer
from tokscale.runs.lock import RunFolderInUseError
from tokscale.stages.sample_config import SampleConfig

GRID, LISTING = "grid.png", "samples.json"
_WORK = ".drawing"
"""Folder of what is only needed until all is drawn: the request, units that are done, leases."""
_UNIT = for_each(DrawnFormat, {"folder": 64, "tar": 1024, "parquet": 1024})
"""Images drawn as one unit of work."""
_WIDEST = 32
"""Images of one row of the grid; a prompt with more of them fills several."""
_LEASE_SECONDS = 120.0
_PAUSE_SECONDS = 0.2
log = logger("sample")


class SampleJob:
    """One request, as each of its processes sees it."""

    def __init__(self, config: SampleConfig, env: ProcessEnv, prompts: Sequence[str]):
        """Understand what is asked; nothing is read but the export's manifest.

        Raises:
            EnvironmentRefused: When the format needs a library that is not installed.
        """
        self.config, self.env, self.prompts = config, env, prompts
        self.export = config.export or config.run_dir / "export"
        self.out = config.out or config.run_dir / "samples"
        self.request = _request(config, self.export, prompts)
        self.combinations = _combinations(config.sweep)
        self.per_prompt = config.num_images * len(self.combinations)
        self._unit_prompts = max((config.shard_images or _UNIT[config.format]) // self.per_prompt, 1)
        self.units = range(-(-len(prompts) // self._unit_prompts))
        self.sink = open_sink(config.format, self.out)
        self._work = self.out / _WORK

    @property
    def images(self) -> int:
        """How many are asked for."""
        return len(self.prompts) * self.per_prompt

    def finished(self) -> bool:
        """Whether the listing shows this very request."""
        if not (self.out / LISTING).exists():
            return False
        try:
            return read_json(self.out / LISTING).get("request") == self.request
        except DataError as error:
            raise DataError(f"{error}; remove it, or give another out=FOLDER") from None

    def due(self) -> list[int]:
        """Units that are not done; each process begins elsewhere, so that they seldom want the same."""
        left = [unit for unit in self.units if not self._record(unit).exists()]
        first = self.env.rank * len(left) // self.env.world
        return left[first:] + left[:first]

    def begin(self) -> None:
        """Make the folder this request's; what an earlier one left there is removed.

        Raises:
            RunFolderInUseError: When others draw another request there.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        with self.alone():
            described = self._work / "request.json"
            if described.exists() and read_json(described).get("request") == self.request:
                return
            if self.leases().active():
                raise RunFolderInUseError(
                    f"{self.out}: other prompts or options are being drawn there; give out=FOLDER"
                )
            self._remove_earlier()
            write_json(described, {"request": self.request})

    def leases(self) -> Leases:
        """Who draws what; enter it to take part."""
        return Leases(self._work, _LEASE_SECONDS)

    def draw_due(self, leases: Leases, *, wait: bool, stop: Callable[[], bool], progress: Callable[[int], None]) -> int:
        """Draw units until none is left; how many images this process drew.

        Args:
            leases: Entered.
            wait: Until the units of others are done, too, or can be taken over.
            stop: Asked between batches.
            progress: Told how many images were drawn.

        Raises:
            StopRequested: When asked to stop; units that are done are kept.
        """
        drawn = 0
        while due := self.due():
            before = drawn
            for unit in due:
                if self._record(unit).exists() or leases.claim(unit) is None:
                    continue
                with leases.held(unit):
                    if not self._record(unit).exists():
                        drawn += self._draw_unit(unit, stop, progress)
            if drawn == before:
                if not wait:
                    break
                if stop():
                    raise _stopped()
                time.sleep(_PAUSE_SECONDS)
        if drawn:
            for words in self._pretrained.cut_captions():
                log.warning("%s", words)
        return drawn

    def close(self) -> None:
        """Write the grid and, last, the listing of all that was drawn; for one process at a time."""
        with self.alone():
            if self.finished():
                return
            if not self.leases().active():
                for folder in (self.out, self._record(0).parent):
                    remove_partials(folder)
            self._save_grid()
            with atomic_write(self.out / LISTING, "w") as file:
                head = {"request": self.request, "export": str(self.export), "sampling": self.config.sampling}
                head |= {"format": self.config.format, "sweep": {k: list(v) for k, v in self.config.sweep.items()}}
                file.write(json.dumps(head, indent=1, sort_keys=True).removesuffix("\n}") + ',\n "images": [')
                for number, row in enumerate(self._rows()):
                    file.write((",\n  " if number else "\n  ") + json.dumps(row, sort_keys=True))
                file.write("\n ]\n}\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time begins or closes; where the file system has no locks, equal bytes do no harm."""
        with open(self._work / ".lock", "a") as file:
            try_lock(file, EXCLUSIVE, wait=True)
            yield

    def _draw_unit(self, unit: int, stop: Callable[[], bool], progress: Callable[[int], None]) -> int:
        _ = self._pretrained, self._scorer  # whatever is wrong with them is said before the first image
        first = unit * self._unit_prompts
        prompts = self.prompts[first : first + self._unit_prompts]
        together = max(self.config.batch_size // (self.config.num_images * self.config.best_of), 1)

        def images() -> Iterator[Drawn]:
            for at in range(0, len(prompts), together):
                if stop():
                    raise _stopped()
                group = prompts[at : at + together]
                yield from self._draw_group(group, (first + at) * self.per_prompt)
                progress(len(group) * self.per_prompt)

        rows = self.sink.write(unit, images())
        with atomic_write(self._record(unit), "w") as file:
            file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        note_kept()
        return len(rows)

    def _draw_group(self, prompts: Sequence[str], number: int) -> Iterator[Drawn]:
        """All images of a few prompts, those of a prompt together and in the order of the sweep."""
        drawn = self.config.num_images * self.config.best_of
        captions = [prompt for prompt in prompts for _ in range(drawn)]
        seeds = [seed_of(self.config.seed, "sample", prompt, i) for prompt in prompts for i in range(drawn)]
        found = [self._draw_once(captions, seeds, drawn, settings) for settings in self.combinations]
        for at in range(len(prompts)):
            for image in itertools.chain.from_iterable(kept[at] for kept in found):
                yield replace(image, number=number)
                number += 1

    def _draw_once(
        self, captions: list[str], seeds: list[int], drawn: int, settings: Mapping[str, Any]
    ) -> list[list[Drawn]]:
        """What is kept of the images of each prompt under some settings, not numbered yet."""
        options, many = self.config.sampling | dict(settings), self.config.batch_size
        if self.config.size is not None:
            options |= {"size": self.config.size}
        parts = [slice(at, at + many) for at in range(0, len(captions), many)]
        images = torch.cat(
            [self._pretrained.sample(captions[p], seeds=seeds[p], batch_size=many, **options) for p in parts]
        )
        scores: list[float | None] = [None] * len(captions)
        count = len(captions) // drawn
        chosen = torch.arange(len(captions)).view(count, drawn)
        if self._scorer is not None:
            found = self._scorer.score(captions, images)
            kept = best(rearrange(found, "(prompts drawn) -> prompts drawn", drawn=drawn), self.config.num_images)
            chosen, scores = kept + drawn * torch.arange(count)[:, None], found.tolist()
        one = lambda i: Drawn(0, captions[i], seeds[i], png_of(images[i]), scores[i], settings or None)  # noqa: E731
        return [[one(i) for i in row] for row in chosen.tolist()]

    @cached_property
    def _pretrained(self) -> Pretrained | Cascade:
        device = choose_device(self.config.device, self.env.local_rank)
        keys: dict[str, Any] = {"device": device, "text_encoder": self.config.text_encoder}
        keys["dtype"] = choose_dtype(self.config.dtype, device)
        model = load_pretrained(self.export, **keys)
        for settings in self.combinations:  # before the first image is drawn
            decode(model.model.sampling_config, self.config.sampling | dict(settings), where="sampling")
        if self.config.superres is None:
            model.tokenizer(self.config.size)
            return model
        if self.config.size is not None:
            raise ConfigError("size: images drawn with superres= have the size of that export; leave the key out")
        return Cascade(model, load_pretrained(self.config.superres, **keys), self.config.superres_sampling)

    @cached_property
    def _scorer(self) -> Scorer | None:
        if self.config.rerank is None:
            return None
        return load_scorer(self.config.rerank, device=choose_device(self.config.device, self.env.local_rank))

    def _record(self, unit: int) -> Path:
        return self._work / "units" / f"{unit:06d}.jsonl"

    def _rows(self) -> Iterator[dict[str, Any]]:
        for unit in self.units:
            yield from map(json.loads, lines_of(read_regular(self._record(unit)).decode()))

    def _save_grid(self) -> None:
        """The first prompts, a row each; near a square where each has one image, or very many."""
        rows_follow = 1 < self.per_prompt <= _WIDEST
        shown = max(self.config.grid_images // self.per_prompt, 1) * self.per_prompt if rows_follow else 0
        rows = list(itertools.islice(self._rows(), shown or self.config.grid_images))
        images = pixels_of([self.sink.read(row) for row in rows])
        headers = [_words(settings) for settings in self.combinations for _ in range(self.config.num_images)]
        labels = [
            row["prompt"] if rows_follow else f"{row['prompt']} {_words(row.get('sampling', {}))}" for row in rows
        ]
        save_grid(
            images,
            labels,
            self.out / GRID,
            columns=self.per_prompt if rows_follow else 0,
            headers=headers if rows_follow and len(self.combinations) > 1 else (),
        )

    def _remove_earlier(self) -> None:
        """Images of another request would stand among ours, and nothing would tell them apart."""
        rows: list[dict[str, Any]] = []
        for path in (self._work / "units").glob("*.jsonl"):
            with as_written(path):
                rows += map(json.loads, lines_of(read_regular(path).decode()))
        if (self.out / LISTING).exists():
            rows += read_json(self.out / LISTING).get("images", [])
        with as_written(self.out / LISTING):
            names = {Path(str(row.get("file"))).name for row in rows}
        for name in names:
            (self.out / name).unlink(missing_ok=True)
        (self.out / LISTING).unlink(missing_ok=True)
        for name in ("units", "leases", "workers"):
            shutil.rmtree(self._work / name, ignore_errors=True)


def _stopped() -> StopRequested:
    return StopRequested("asked to stop; finished units are kept, run the same command to go on")


def _combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _request(config: SampleConfig, export: Path, prompts: Sequence[str]) -> str:
    asked = {
        "weights": _weights(export),
        "prompts": list(prompts),
        "num_images": config.num_images,
        "seed": config.seed,
        "sampling": config.sampling,
    }
    if config.size is not None:
        asked["size"] = config.size
    if config.dtype != "auto":
        asked["dtype"] = config.dtype
    if config.rerank is not None:
        asked |= {"rerank": _weights(config.rerank), "best_of": config.best_of}
    if config.superres is not None:
        asked |= {"superres": _weights(config.superres), "superres_sampling": config.superres_sampling}
    if config.sweep:
        asked["sweep"] = {name: list(values) for name, values in config.sweep.items()}
    if (config.format, config.shard_images) != (SampleConfig.model_fields["format"].default, None):
        asked |= {"format": config.format, "shard_images": config.shard_images}
    return fingerprint(asked)


def _weights(export: Path) -> str:
    manifest = export / "manifest.json"
    return sha256_file(manifest) if manifest.exists() else str(export)
