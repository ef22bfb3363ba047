"""What the ids and the captions look like: histograms, perplexity, dead codes, lengths, drops, rates."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokscale.base.errors import DataError
from tokscale.base.files import read_json
from tokscale.data.tokens.manifest import StreamRecord, TokenDataset

CAPTION_BINS = (0, 1, 16, 32, 64, 128, 256, 512, 1024)
"""Lower ends of the caption histogram's bins, in bytes."""


class CodeUse:
    """How often each code of a stream occurs, by level."""

    def __init__(self, stream: StreamRecord):
        """Begin at zero."""
        self.levels = stream.code_shape[2] if len(stream.code_shape) == 3 else 1
        self.counts: NDArray[np.int64] = np.zeros((self.levels, stream.num_tokens), np.int64)

    def add(self, codes: NDArray[Any]) -> None:
        """Count ids whose last axis is the level, where there are levels."""
        flat = codes.reshape(-1, self.levels)
        for level in range(self.levels):
            self.counts[level] += np.bincount(flat[:, level].astype(np.int64), minlength=self.counts.shape[1])

    def summary(self) -> list[dict[str, Any]]:
        """By level: the histogram, how many codes are used, and the perplexity of their distribution."""
        found = []
        for level, counts in enumerate(self.counts):
            share = counts[counts > 0] / max(counts.sum(), 1)
            found.append(
                {
                    "level": level,
                    "used": int((counts > 0).sum()),
                    "dead": int((counts == 0).sum()),
                    "perplexity": round(math.exp(float(-(share * np.log(share)).sum())), 3),
                    "histogram": counts.tolist(),
                }
            )
        return found


def data_stats(dataset: TokenDataset) -> dict[str, Any]:
    """Read every block once and count; memory does not grow with the data set."""
    uses = {name: CodeUse(stream) for name, stream in dataset.manifest.streams.items()}
    bins = np.zeros(len(CAPTION_BINS), np.int64)
    captions = longest = total = 0
    for block in dataset.blocks():
        tensors = block.tensors
        for name, use in uses.items():
            use.add(tensors[name])
        lengths = np.diff(tensors["cap_off"].astype(np.int64))
        bins += np.bincount(np.searchsorted(CAPTION_BINS, lengths, side="right") - 1, minlength=len(bins))
        captions += len(lengths)
        longest, total = max(longest, int(lengths.max(initial=0))), total + int(lengths.sum())
    return {
        "manifest": dataset.manifest.id,
        "samples": dataset.samples,
        "variants": dataset.manifest.variants,
        "drops": dataset.manifest.drops,
        "codes": {name: use.summary() for name, use in uses.items()},
        "captions": {
            "count": captions,
            "bytes_mean": round(total / max(captions, 1), 2),
            "bytes_max": longest,
            "histogram": {f">={low}": int(count) for low, count in zip(CAPTION_BINS, bins, strict=True)},
        },
        "timings": _timings(dataset.files.beside("timings")),
    }


def shown(stats: Mapping[str, Any]) -> list[str]:
    """The metrics that matter most, for a person."""
    lines = [f"samples: {stats['samples']}, left out: {stats['drops'] or 'none'}"]
    for name, levels in stats["codes"].items():
        for entry in levels:
            level = f" level {entry['level']}" if len(levels) > 1 else ""
            of = entry["used"] + entry["dead"]
            lines.append(f"{name}{level}: {entry['used']} of {of} codes used, perplexity {entry['perplexity']}")
    captions = stats["captions"]
    lines.append(
        f"captions: {captions['count']}, {captions['bytes_mean']} bytes on average, {captions['bytes_max']} at most"
    )
    if stats["timings"]:
        lines.append(f"tokenized at {stats['timings']['samples/s']} samples/s for each worker")
    return lines


def _timings(folder: Path) -> dict[str, float]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(read_json(path))
        except DataError:
            continue
    seconds = sum(entry["seconds"] for entry in found)
    samples = sum(entry["samples"] for entry in found)
    return {"seconds": round(seconds, 3), "samples/s": round(samples / seconds, 1)} if seconds else {}
