"""Keys of `tokscale sample`."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from tokscale.base.config import PathKey
from tokscale.inference.drawn import DrawnFormat
from tokscale.runs.stage import StageConfig

_MOST = 65_536
"""Images of one prompt."""


class SampleConfig(StageConfig):
    """Keys of the `sample` stage."""

    export: PathKey | None = None
    """Export folder to sample from; by default `run_dir/export`."""
    out: PathKey | None = None
    """Folder of the images; by default `run_dir/samples`."""
    prompts: tuple[str, ...] = ()
    """Captions to draw."""
    prompts_file: PathKey | None = None
    """More captions: a text file with one a line, or a table (`.csv`, `.tsv`, `.jsonl`, `.parquet`)."""
    prompts_column: str | None = None
    """Column of such a table; by default the first that is called `prompt`, `caption` or `text`."""
    size: str | None = None
    """Width x height of the images as in `320x192`, of a model that was trained on several sizes; others than those are
    refused. By default the one of which the data had most."""
    num_images: int = Field(default=1, ge=1)
    """Images per prompt, each with a seed of its own. With `best_of`, at most 65,536 are drawn of one prompt: they are
    held in memory together."""
    sweep: dict[str, tuple[Any, ...]] = {}
    """Options of `sampling` with several values each, `{temperature: [0.5, 1], cond_scale: [1, 3, 6]}`: every prompt is
    drawn with every combination, from the same seeds, and the grid has a column for each."""
    rerank: PathKey | None = None
    """Export folder of a CLIP that scores the images; those of a prompt are then kept and shown best first."""
    best_of: int = Field(default=1, ge=1)
    """Images drawn for each one that is kept; needs `rerank`. DALL-E's paper took the best of 512."""
    superres: PathKey | None = None
    """Export folder of a super-resolution model that draws finer images from those of `export` (Muse)."""
    superres_sampling: dict[str, Any] = {}
    """Its sampling options; those of `sampling` when left out."""
    batch_size: PositiveInt = 64
    """Images sampled together; bounds memory, does not change what is drawn beyond rounding."""
    format: DrawnFormat = "folder"
    """`folder`: a PNG for each image; `tar`: shards that `tokenize` and webdataset read; `parquet`: tables that the
    `datasets` library reads. All with prompt, seed and score."""
    shard_images: int | None = Field(default=None, ge=1)
    """Images that are drawn and kept as one unit of work, and so of one tar or parquet file: 1024 by default, 64 for
    `format=folder`. A process that is killed loses the unit that it was drawing."""
    grid_images: int = Field(default=256, ge=1)
    """Images on `grid.png`, those of the first prompts."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: CUDA when there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model's weights: `auto` is bf16 on a GPU that computes it, and elsewhere as they are stored."""
    sampling: dict[str, Any] = {}
    """Options of the model's own sampling configuration: `temperature`, `filter_thres`, `cond_scale`, ..."""

    @model_validator(mode="after")
    def _something_to_draw(self) -> "SampleConfig":
        if not self.prompts and self.prompts_file is None:
            raise ValueError("nothing to draw; give 'prompts=[\"a small red circle\"]' or prompts_file=FILE")
        if self.best_of > 1 and self.rerank is None:
            raise ValueError(f"best_of={self.best_of} needs something to choose with; give rerank=EXPORT of a CLIP")
        if self.num_images * self.best_of > _MOST:
            drawn = f"num_images={self.num_images} of best_of={self.best_of}"
            raise ValueError(
                f"{drawn} draws {self.num_images * self.best_of} images of each prompt, which are held in memory "
                f"together, at most {_MOST}; draw the rest in further runs, by another seed and out"
            )
        if self.prompts_column is not None and self.prompts_file is None:
            raise ValueError("prompts_column: names a column of prompts_file, which is not given")
        for name, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep.{name}: got no values; give a list of them")
            if name in self.sampling:
                raise ValueError(f"sweep.{name}: stands in sampling, too; leave it out of one of them")
        return self
