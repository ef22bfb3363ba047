"""What is lost or left aside without an error: counted in each unit, said once, with the key that changes it."""

from collections.abc import Mapping

NOTES = {
    "corrupt_kept": "damaged images were kept; transform.keep_corrupt=false leaves them out",
    "captions_split": "caption files were split at line feeds; text.split_lines=false keeps each as one caption",
    "captions_with_lines": "captions hold line breaks and are one caption each; text.split_lines=true splits them",
    "captions_left_out": "captions beyond filters.min_caption, max_caption or max_tokens were left out beside others "
    "that were kept",
    "captions_cut": "stored captions were cut to text.length tokens; raise it",
    "scores_missing": "scores were not in the samples' JSON, and are stored as not a number; look at `scores`",
    "hidden_files": "hidden files were ignored (a name that begins with a dot, __MACOSX); rename them if they are data",
    "other_files": "files beside the images were not read: neither an image, a caption nor asked for",
    "second_images": "samples hold more than one image, of which the first is taken",
}
"""Meaning of each word that a unit's record may count."""


def said(noted: Mapping[str, int]) -> list[str]:
    """For a person."""
    return [f"{count} {NOTES[word]}" for word, count in noted.items()]
