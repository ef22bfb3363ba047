"""Where the host may wait for the device, or copy to it: a list that grows only with a reason."""

from typing import NamedTuple

from ledger import Ledger, Place


class Allowed(NamedTuple):
    """A function of the package that may, and why."""

    file: str
    function: str
    why: str


ONCE = "a table that is made once for a pattern, a length and a device, and kept"

READS: tuple[Allowed, ...] = (
    Allowed(
        "models/maskgit/sample.py", "Sampler.run", "once a drawing: how many places the largest region to edit has"
    ),
    Allowed("tokenizers/codec.py", "ImageCodec.decode", "once a batch of images: ids are checked before they are used"),
    Allowed("inference/cascade.py", "Cascade.sample_both", "finished images go to the host"),
)

COPIES: tuple[Allowed, ...] = (
    Allowed("nn/constants.py", "constant", ONCE),
    Allowed("nn/rotary.py", "rotary_table", ONCE),
    Allowed("nn/attention/flex.py", "_plan", ONCE),
    Allowed("nn/attention/relative_flex.py", "_mask", ONCE),
    Allowed("nn/attention/blocksparse.py", "_block_table", ONCE),
    Allowed("nn/attention/kinds/sparse.py", "_blocks_before", ONCE),
    Allowed("nn/attention/kinds/conv_like.py", "_window", ONCE),
    Allowed("nn/sampling.py", "SampleStreams.__init__", "once a drawing: the random streams of all its steps"),
    Allowed("tokenizers/text/encoder.py", "FrozenTextEncoder.states", "captions come from the host"),
    Allowed("models/dalle/model.py", "DALLE.generate_texts", "beginnings of captions come from the host"),
    Allowed("inference/pretrained.py", "Pretrained.prompts.<locals>.<lambda>", "captions come from the host"),
)


def check(ledger: Ledger, what: str) -> None:
    """Raise unless every read and copy is allowed."""
    problems = []
    for word, seen, known in (("waits for", ledger.reads, READS), ("copies to", ledger.copies, COPIES)):
        places = {Place(entry.file, entry.function) for entry in known}
        problems += [
            f"{what}: {place.file}: {place.function} {word} the device {count} times ({operation})"
            for (place, operation), count in seen.items()
            if place not in places
        ]
    assert not problems, "\n".join(["not in tests/fake_cuda/allowed.py:", *problems])
