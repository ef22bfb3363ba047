"""How long captions are, said before any token is made: what a model of fewer tokens will not see of them."""

from collections.abc import Sequence

from tokscale.base.errors import DataError
from tokscale.data.raw.bad_samples import BadSample
from tokscale.data.tokenization.plan import Plan
from tokscale.data.tokenization.recipe import Recipe
from tokscale.tokenizers.text.base import AnyTextTokenizer

_LOOKS = 1000


def caption_lengths(recipe: Recipe, plan: Plan, tokenizer: AnyTextTokenizer) -> list[int]:
    """Tokens of captions of the first input that can be read, ascending."""
    captions: list[str] = []
    for planned in plan.inputs:
        try:
            shard = recipe.raw.open(planned.path)
        except DataError:
            continue
        with shard:
            for sample in shard.samples[:_LOOKS]:
                try:
                    captions += shard.captions(
                        sample,
                        split_lines=recipe.text.split_lines,
                        member=recipe.text.member,
                        field=recipe.text.field,
                    )
                except BadSample:
                    continue
        break
    return sorted(map(len, tokenizer.encode_ragged(captions))) if captions else []


def words(lengths: Sequence[int]) -> str:
    """For a person who chooses `text_seq_len`."""
    middle, most = lengths[len(lengths) // 2], lengths[len(lengths) * 95 // 100]
    return (
        f"captions, of {len(lengths)} looked at: half have up to {middle} tokens, 95 % up to {most}, all up to "
        f"{lengths[-1]}; a model reads as many as its text_seq_len, and filters.max_tokens leaves longer ones out"
    )
