"""What a message tells a person to type is typed, as it was printed, and is accepted."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import text_encoders
import tiny_exports
import tiny_pipeline
import ways_out
from PIL import Image
from pydantic import BaseModel

from tokscale import cli
from tokscale.base.config import annotation_of, members_of
from tokscale.stages import bench, registry

TINY = "model={kind: dalle, dim: 16, depth: 1, heads: 2, dim_head: 8, text_seq_len: 6}"
TRAIN = (
    "train run_dir=run data_dir={all}/data image_tokenizer={all}/image_tokenizer text_tokenizer={all}/text_tokenizer "
    f"'{TINY}' loop.total_steps=1 batch_size=4"
)
NOTHING = "train data_dir=nowhere"
"""Ends in any case, with 65: for keys that are refused before anything is looked at."""
TOKENIZE = (
    "tokenize raw=raw tokens=tokens image_tokenizer={all}/image_tokenizer run_dir=run encode_batch=8 unit_samples=8"
)
SAMPLE = "sample export={all}/exports/dalle out=out"


@dataclass(frozen=True)
class Way:
    """A message that names a way out, and the way."""

    says: str
    """Of the message, as the source has it: by this the contract below knows what is covered."""
    words: str
    """The command that fails, as a shell reads it; `{all}` is the folder of what all cases share."""
    add: str = ""
    """Words that the message names, which are added; or whole commands, with `;` between them, when `run` is True."""
    printed: str = ""
    """What the message must hold, where it has a placeholder such as FOLDER for what `add` fills in."""
    drop: str = ""
    """Words that go, since the message says so."""
    code: int = 64
    ends: tuple[int, ...] = (0,)
    """Of the mended command. 65 where it is then told what else is missing."""
    before: Callable[[Path], None] = lambda all_: None
    mend: Callable[[], None] = lambda: None
    run: bool = False
    """Whether the message names commands, which are run as they are printed, and the first one again."""


def table(text: bytes | str, name: str = "pictures/table.csv") -> Callable[[Path], None]:
    def write(_: Path) -> None:
        Path("pictures").mkdir()
        for number in range(3):
            Image.new("RGB", (32, 32), (80 * number, 9, 9)).save(f"pictures/{number}.png")
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)

    return write


def raw(damage: Callable[[], None] = lambda: None) -> Callable[[Path], None]:
    def copy(shared: Path) -> None:
        shutil.copytree(shared / "raw", "raw")
        damage()

    return copy


def recipe(text: str) -> Callable[[Path], None]:
    return lambda folder: void(Path("mine.yaml").write_text(filled(text, folder)))


def tokens(damage: Callable[[], None]) -> Callable[[Path], None]:
    def copy(shared: Path) -> None:
        shutil.copytree(shared / "raw", "raw")
        shutil.copytree(shared / "made", "tokens")
        damage()

    return copy


def shared(damage: Callable[[], None]) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        for name in ("image_tokenizer", "text_tokenizer"):
            Path(name).symlink_to(folder / name)
        Path("data").mkdir()
        shutil.copytree(folder / "raw", "data/raw")
        shutil.copytree(folder / "made", "data/tokens")
        damage()

    return copy


def flip(pattern: str, at: int = -700) -> Callable[[], None]:
    def change() -> None:
        (path, *_) = sorted(Path().glob(pattern))
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


def cut(pattern: str, to: int = 2000) -> Callable[[], None]:
    def change() -> None:
        (path, *_) = sorted(Path().glob(pattern))
        path.write_bytes(path.read_bytes()[:to])

    return change


def remove(pattern: str) -> Callable[[], None]:
    return lambda: sorted(Path().glob(pattern))[0].unlink()


def once(words: str) -> Callable[[Path], None]:
    """The command has been run before."""
    return lambda folder: run_ok(filled(words, folder))


def filled(words: str, folder: Path) -> str:
    return words.replace("{all}", str(folder))


def run_ok(words: str) -> None:
    assert cli.main(shlex.split(words)) == 0


EVALUATE = "evaluate export={all}/exports/dalle run_dir=run prompts=0 batch_size=4"
PREPARE = "prepare data_dir=data preview=0 source.kind=csv source.path=pictures/table.csv"
OWN = "data_dir=data image_tokenizer=image_tokenizer text_tokenizer=text_tokenizer run_dir=run"
TRAIN_OWN = f"train {OWN} '{TINY}' loop.total_steps=1 batch_size=4"

WAYS = [
    # Models and tokenizers
    Way(
        "use reversible=false remat=block",
        f"{NOTHING} 'model={{kind: parti, dim: 16, depth: 1}}' model.reversible=true",
        "model.reversible=false model.remat=block",
        ends=(65,),
    ),
    Way(
        "use rel_pos_bias=false",
        f"{NOTHING} 'model={{kind: parti, dim: 16, depth: 1}}' model.attn_types=[conv_like]",
        "model.rel_pos_bias=false",
        ends=(65,),
    ),
    Way(
        "does nothing with rel_pos_bias=false; leave it out",
        f"{NOTHING} 'model={{kind: parti, dim: 16, depth: 1}}' model.rel_pos_bias=false model.rel_pos_index=sequence",
        drop="model.rel_pos_index=sequence",
        ends=(65,),
    ),
    Way(
        "use remat=none",
        f"{NOTHING} 'model={{kind: dalle, dim: 16, depth: 1}}' model.reversible=true model.remat=block",
        "model.remat=none",
        ends=(65,),
    ),
    Way(
        "set straight_through=true too, or reinmax=false",
        "train-tokenizer data_dir=nowhere tokenizer.kind=dvae tokenizer.reinmax=true",
        "tokenizer.straight_through=true",
        ends=(65,),
    ),
    Way(
        "set straight_through=true too, or reinmax=false",
        "train-tokenizer data_dir=nowhere tokenizer.kind=dvae tokenizer.reinmax=true",
        "tokenizer.reinmax=false",
        ends=(65,),
    ),
    Way(
        "set normalization=null",
        "train-tokenizer data_dir=nowhere tokenizer.kind=dvae tokenizer.logit_laplace_loss=true",
        "tokenizer.normalization=null",
        ends=(65,),
    ),
    Way(
        "or revive_below=0",
        "train-tokenizer data_dir=nowhere 'tokenizer={kind: vqgan, quantizer: {kind: vq, "
        "update: loss, revive_below: 0.1}}'",
        "tokenizer.quantizer.update=ema",
        ends=(65,),
    ),
    Way(
        "or revive_below=0",
        "train-tokenizer data_dir=nowhere 'tokenizer={kind: vqgan, quantizer: {kind: vq, "
        "update: loss, revive_below: 0.1}}'",
        "tokenizer.quantizer.revive_below=0",
        ends=(65,),
    ),
    Way("or compute on the CPU with device=cpu", f"{SAMPLE} prompts=x device=cuda", "device=cpu", code=69),
    # Missing and unknown keys
    Way(
        "required, but not given",
        f"{NOTHING} model.dim=16 model.depth=1",
        "model.kind=dalle",
        "give model.kind=KIND, one of clip, dalle",
        ends=(65,),
    ),
    Way(
        "required, but not given",
        f"{NOTHING} model.kind=dalle model.dim=16",
        "model.depth=1",
        "give model.depth=NUMBER",
        ends=(65,),
    ),
    Way(
        "required, but not given",
        "import source=dalle_pytorch checkpoint=x.pt",
        "out=made",
        "give out=PATH",
        ends=(78,),
    ),
    Way(
        "unknown key",
        f"{NOTHING} 'model={{kind: dalle, dim: 16, depth: 1}}' optim.kindd=adamw",
        drop="optim.kindd=adamw",
        ends=(65,),
        printed="did you mean 'kind'?",
    ),
    # Drawing
    Way("nothing to draw; give", SAMPLE, "'prompts=[\"a small red circle\"]'"),
    Way(
        "or prompts_file=FILE",
        SAMPLE,
        "prompts_file=words.txt",
        "prompts_file=FILE",
        before=lambda _: void(Path("words.txt").write_text("a red circle\n")),
    ),
    Way("give rerank=EXPORT of a CLIP", f"{SAMPLE} prompts=x best_of=2", "rerank={all}/exports/clip", "rerank=EXPORT"),
    Way(
        "give prompts_column=NAME",
        f"{SAMPLE} prompts_file=words.csv",
        "prompts_column=b",
        "prompts_column=NAME, one of a, b",
        code=65,
        before=lambda _: void(Path("words.csv").write_text("a,b\n1,x\n")),
    ),
    Way(
        "choose cond_scale_schedule=linear",
        f"{SAMPLE} prompts=x sampling.cond_scale_start=1 sampling.cond_scale_schedule=constant",
        "sampling.cond_scale_schedule=linear",
    ),
    Way(
        "choose cond_scale_schedule=power",
        f"{SAMPLE} prompts=x sampling.cond_scale_power=2",
        "sampling.cond_scale_schedule=power",
    ),
    # Preparing
    Way(
        "and listed, by source.on_bad_row=drop",
        f"{PREPARE} max_drop_fraction=0.5",
        "source.on_bad_row=drop",
        code=65,
        before=table("path,caption\n0.png,a\n1.png\n2.png,c\n"),
    ),
    Way(
        "(source.quoting=none takes quotes as letters)",
        PREPARE,
        "source.quoting=none",
        code=65,
        before=table('path,caption\n0.png,"a\n1.png,b\n2.png,c\n'),
    ),
    Way(
        "give source.delimiter=",
        PREPARE,
        "source.delimiter=tab",
        code=65,
        before=table("path\tcaption\n0.png\ta\n1.png\tb\n"),
    ),
    Way(
        "give source.delimiter=",
        PREPARE,
        "source.delimiter=';'",
        code=65,
        before=table("path;caption\n0.png;a\n1.png;b\n"),
    ),
    Way(
        "give source.encoding=",
        PREPARE,
        "source.encoding=utf-16",
        code=65,
        before=table("path,caption\n0.png,a\n1.png,b\n".encode("utf-16")),
    ),
    Way(
        "is not text in",
        PREPARE,
        "source.encoding=latin-1",
        "source.encoding=NAME reads another, such as latin-1",
        code=65,
        before=table("path,caption\n0.png,\xe4\n1.png,b\n".encode("latin-1")),
    ),
    Way(
        "; source.captions=none takes images without captions",
        "prepare data_dir=data preview=0 source.kind=folder source.path=pictures",
        "source.captions=none",
        code=65,
        before=table("", "pictures/.hidden"),
    ),
    # Tokenizing
    Way(
        "no tokenization was planned here",
        "tokenize action=status tokens=tokens raw=raw image_tokenizer={all}/image_tokenizer",
        run=True,
        code=65,
        before=raw(),
    ),
    Way(
        "first, or name another data_dir",
        "tokenize recipe=mine.yaml image_tokenizer={all}/image_tokenizer",
        run=True,
        code=65,
        before=recipe("prepare: {source: {kind: shapes, count: 8}, preview: 0}"),
    ),
    Way(
        "or leave them out by on_bad_shard=drop",
        TOKENIZE,
        "on_bad_shard=drop",
        code=65,
        before=raw(cut("raw/00000.tar")),
    ),
    Way(
        "or close without them by allow_missing=true",
        f"{TOKENIZE} action=finalise",
        "allow_missing=true",
        code=65,
        before=tokens(remove("tokens/tokens-000001.json")),
    ),
    Way(
        "or choose another folder with tokens=FOLDER",
        f"{TOKENIZE} labels=false encode_batch=4",
        "tokens=other",
        "tokens=FOLDER",
        code=65,
        before=tokens(lambda: None),
    ),
    Way(
        "or take it as it is by work.max_drop_fraction=",
        f"{TOKENIZE} filters.max_caption=1 filters.min_caption=1",
        "work.max_drop_fraction=1",
        code=65,
        before=raw(),
        ends=(0, 65),
    ),
    Way(
        "action=verify repair=true",
        f"{TOKENIZE} action=verify",
        run=True,
        code=65,
        before=tokens(flip("tokens/tokens-000001.tar")),
    ),
    Way(
        "where the manifest is wrong; mend what else",
        f"{TOKENIZE} action=verify",
        run=True,
        code=65,
        before=tokens(flip("tokens/dataset.json", 100)),
    ),
    Way(
        "which makes what is missing",
        f"{TOKENIZE} action=verify",
        run=True,
        code=65,
        before=tokens(remove("tokens/tokens-000001.json")),
    ),
    Way(
        "action=embed needs a text encoder: give text_encoder=FOLDER",
        f"{TOKENIZE} action=embed",
        "text_encoder={all}/t5",
        "text_encoder=FOLDER",
        before=tokens(lambda: None),
    ),
    Way(
        "tokenize with scores=[",
        f"{TOKENIZE} 'views={{fine: {{min_scores: {{aesthetic: 1}}}}}}' tokens=scored",
        "scores=[aesthetic]",
        code=65,
        before=raw(),
        ends=(0, 65),
    ),
    # Token shards that are read by training
    Way(
        "fails its checksum; the shard is damaged",
        TRAIN_OWN,
        run=True,
        code=65,
        before=shared(lambda: [flip(f"data/tokens/tokens-{n:06d}.tar", 3000)() for n in range(3)]),
    ),
    Way(
        "so the shard is missing",
        TRAIN_OWN,
        run=True,
        code=65,
        before=shared(lambda: [remove("data/tokens/tokens-*.tar")() for _ in range(3)]),
    ),
    Way(
        "it was edited or damaged: run ",
        TRAIN_OWN,
        run=True,
        code=65,
        before=shared(flip("data/tokens/dataset.json", 100)),
    ),
    Way(
        "missing or not the index", TRAIN_OWN, run=True, code=65, before=shared(remove("data/tokens/index.safetensors"))
    ),
    Way(
        "tokenization is not finished here",
        TRAIN_OWN,
        run=True,
        code=65,
        before=shared(remove("data/tokens/dataset.json")),
    ),
    # Training, exporting
    Way(
        "model.condition.kind=embeddings needs the states of a text encoder",
        TRAIN.replace("text_seq_len: 6", "text_seq_len: 6")
        .replace("kind: dalle", "kind: maskgit, condition: {kind: embeddings}")
        .replace(", text_seq_len: 6", ""),
        "text_encoder={all}/t5",
        "text_encoder=FOLDER",
    ),
    Way(
        "the data set has no labels; tokenize with labels=true",
        TRAIN.replace("kind: dalle", "kind: maskgit, condition: {kind: classes, num_classes: 4}").replace(
            ", text_seq_len: 6", ""
        ),
        code=64,
        ends=(0, 64, 65),
        add="labels=true",
    ),
    Way(
        ", or on_change=record to go on",
        f"{TRAIN} optim.lr=0.002 loop.total_steps=2",
        "on_change=record",
        before=once(TRAIN),
    ),
    Way(
        "on_change=record goes on with that",
        f"{TRAIN} loop.total_steps=4 schedule.kind=cosine",
        "on_change=record",
        before=once(f"{TRAIN} loop.total_steps=2 schedule.kind=cosine schedule.warmup_steps=0"),
        ends=(0,),
    ),
    Way(
        "no checkpoint; train first",
        "export recipe=mine.yaml run_dir=run",
        run=True,
        code=78,
        before=recipe(
            "shared: {data_dir: {all}/data, image_tokenizer: {all}/image_tokenizer, "
            "text_tokenizer: {all}/text_tokenizer}\n"
            f"train: {{{TINY.replace('=', ': ', 1)}, loop: {{total_steps: 1}}, batch_size: 4}}\n"
        ),
    ),
    Way(
        "give run_dir=FOLDER of a stage that has trained",
        "report run_dir=nowhere",
        "run_dir=run",
        "run_dir=FOLDER",
        code=65,
        before=once(TRAIN),
    ),
    Way(
        "no such folder; give run_dir=FOLDER",
        "status run_dir=nowhere",
        "run_dir=run",
        "run_dir=FOLDER",
        code=65,
        before=once(TRAIN),
    ),
    Way(
        "data.on_change=segment to go on",
        f"{TRAIN} loop.total_steps=2 on_change=record 'data.sources=[{{path: {{all}}/made}}]'",
        "data.on_change=segment",
        code=65,
        before=once(TRAIN),
    ),
    # Evaluating
    Way(
        "no export; give export=FOLDER",
        "evaluate export=nowhere run_dir=run held_out={all}/raw images=4 prompts=0 batch_size=4",
        "export={all}/exports/dalle",
        "export=FOLDER",
        code=78,
    ),
    Way(
        "nothing to measure: there are no shapes to judge",
        f"{EVALUATE} judge=false",
        "held_out={all}/raw images=4",
        "held_out=FOLDER",
    ),
    Way(
        "clip judges images drawn for captions",
        f"{EVALUATE} judge=false clip={{all}}/exports/clip pool=4",
        "held_out={all}/raw images=4",
        "held_out=FOLDER",
    ),
    # Elsewhere
    Way(
        "choose another name, or overwrite=true",
        "init pictures out=mine.yaml",
        "overwrite=true",
        before=lambda folder: (
            table("", "pictures/.hidden")(folder),
            [Path(f"pictures/{n}.txt").write_text("a") for n in range(3)],
            void(Path("mine.yaml").write_text("")),
        )[-1],
    ),
]


def void(_: object) -> None:
    """Nothing; for what is called for what it does."""


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("everything")
    tiny_pipeline.make_inputs(folder)
    tiny_exports.make_exports(folder / "exports")
    text_encoders.save_t5(folder / "t5")
    run_ok(f"prepare data_dir={folder}/prepared source.count=24 shard_samples=8 preview=0 run_dir={folder}/prepared")
    (folder / "prepared/raw").rename(folder / "raw")
    run_ok(
        f"tokenize raw={folder}/raw tokens={folder}/made image_tokenizer={folder}/image_tokenizer run_dir={folder}/run "
        "encode_batch=8 unit_samples=8"
    )
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(words)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS, ids=lambda way: re.sub(r"\W+", " ", way.says)[:50])
def test_a_way_out_is_accepted_as_it_was_printed(everything, capsys, way):
    way.before(everything)
    words = shlex.split(filled(way.words, everything))
    code, said = run(capsys, words)
    said = " ".join(said.split())
    assert code == way.code, said
    assert way.says in said or re.sub(r"\b[a-z_]+=", "", way.says) in re.sub(r"\b[a-z_.]+=", "", said), said
    added = shlex.split(filled(way.add, everything))
    for word in [way.printed] if way.printed else added:
        assert word in said or word.partition("=")[0] + "='" + word.partition("=")[2] + "'" in said, (word, said)
    if way.run:
        commands = re.findall(r"`tokscale ([^`]+)`", said)
        assert commands, said
        for at, command in enumerate(commands):
            code, more = run(capsys, shlex.split(command))
            # Looking for damage ends with 65 when there was some, whether or not it has been made undone.
            assert code == 0 or (code == 65 and "repair=true" in command and at == 0), (command, more)
    code, more = run(capsys, [word for word in words if word not in shlex.split(way.drop)] + added)
    assert code in way.ends and "Traceback" not in more, more
    assert way.says not in more


# ------------------------------------------------------------------------------------------------ the contract

REPEATS = "repeats what was given, and says nothing to type"
PYTHON = "is said of tensors or objects that somebody hands over in Python"
UNIT = "tests/unit/"
ELSEWHERE = {
    "with kind={}": "is help",
    "import json, sys, time": "is a program",
    "nothing fits, or batch_size=": REPEATS,
    "share={} and path={}": REPEATS,
    "must be multiples of {}, the reduction": REPEATS,
    "together exceed the run's": REPEATS,
    "captions of {} ids for a model": PYTHON,
    "codes of shape {}": PYTHON,
    "low-resolution codes for a model": PYTHON,
    "text embeddings of width": PYTHON,
    "model.num_text_tokens is not known yet": PYTHON,
    "model.rel_pos_index=sequence has": PYTHON,
    "engine.sharded_init: a module calls": PYTHON,
    "so it has no bidirectional form": PYTHON,
    "id_shift: got 0": PYTHON,
    "it computes only causal windows": "is the reason of a backend, not of a run",
    "lowres: the original has layout": "cannot be asked for: an import reads no such options",
    "reads probabilities of codes that are visible": "says to leave out what was typed",
    "needs heads that differ": f"{UNIT}nn/test_sparsity.py",
    "Go on from there with a lower learning rate": "tests/contracts/test_exit_codes.py",
    "engine.compile=true: {}": f"{UNIT}engine/test_engine_compile.py, where there is no compiler",
    "does not hold back gradients": "of a broken DeepSpeed",
    "joins the nodes by cluster.interface": "of a network of several nodes: tests/slurm",
    "(preflight.when=never": f"{UNIT}train/test_preflight.py",
    "or see dry_run=true": "of a machine without Slurm: tests/slurm",
    "redo_changed=true": f"{UNIT}stages/test_stage_tokenize.py",
    "by source.encoding=NAME, such as": f"{UNIT}data/raw/test_tables.py",
    "there are no input shards to plan": "as that there are no raw shards, above",
    "holds no rows.jsonl": "of a report of a GPU",
    "holds no speed of products": "of a report of a GPU",
    "say little about a GPU": "of a report of a GPU; is said, and nothing fails",
    "or each of them by a pattern": f"{UNIT}data/raw, of places behind a network",
    "its store refuses access": "of a store behind a network",
    "is for nodes without GPUs": f"{UNIT}stages/test_submit.py",
    "gen6: its judge": f"{UNIT}stages, says to leave out what was typed",
    "was noted as the best": f"{UNIT}stages/test_stage_export.py",
    "diagnostics.attention_entropy_every looks": f"{UNIT}stages/test_monitoring.py",
    "go with image_grid=": REPEATS,
    "read one bucket: data.sources=": f"{UNIT}stages/test_buckets.py, of data in several shapes",
    "images drawn with superres=": "says to leave out what was typed",
    "contradicts gpu_flag": f"{UNIT}stages/test_submit.py",
    "of earlier submissions, not queued again": f"{UNIT}stages/test_submit.py",
    "preflight refused this job": f"{UNIT}train/test_preflight.py, of memory",
    "allow_torchscript: {} is a TorchScript program": f"{UNIT}tokenizers/test_torchscript_and_diffusers.py",
    "more than data.max_bad_samples=": f"{UNIT}data/loading/test_image_loader.py",
    "holds the splits": f"{UNIT}data/raw/test_own_images.py",
    "linked folders were not entered": f"{UNIT}data/raw/test_own_images.py; is said, and nothing fails",
    "has no readable record": f"{UNIT}data/tokens/test_embeds.py",
    "retry_failed=true tries again": f"{UNIT}stages/test_stage_tokenize.py",
    "damaged images were kept": f"{UNIT}data/tokenization; is said, and nothing fails",
    "caption files were split": f"{UNIT}data/tokenization; is said, and nothing fails",
    "captions hold line breaks": f"{UNIT}data/tokenization; is said, and nothing fails",
    "To start over, remove the folder": f"{UNIT}stages/test_stage_tokenize.py",
    "diversity within a prompt": f"{UNIT}evaluation",
    "no images; write some with": f"{UNIT}evaluation",
    "no images to measure a loss on": f"{UNIT}evaluation",
    "states of the text encoder": f"{UNIT}stages/test_conditions.py",
    "needs the states of a text encoder": f"{UNIT}stages/test_conditions.py",
    "is not the text encoder this model": f"{UNIT}stages/test_conditions.py",
    "set text_encoder, or tokenize with": f"{UNIT}stages/test_conditions.py",
    "no checkpoint that it could be of": f"{UNIT}stages/test_stage_train_tokenizer.py",
    "a patch of {} values": f"{UNIT}stages/test_import_buffers.py",
    "the checkpoint has a rotary table": f"{UNIT}stages/test_import_buffers.py",
    "reads one code per grid cell": "another tokenizer or model: says which kind",
    "give out=FILE": f"{UNIT}stages/test_read_only.py, as nobody's user",
    "give out=FOLDER": f"{UNIT}stages/test_read_only.py, as nobody's user",
    "other prompts or options are being drawn": f"{UNIT}stages/test_sampling.py, beside another process",
    "raise held_out.samples or data.held_out.share": "of several ranks: tests/unit/stages/test_monitoring.py",
    "no such folder; name one of raw shards": f"{UNIT}evaluation/test_measures.py",
    "holds image files and no raw shards": f"{UNIT}evaluation/test_measures.py",
    "is about images of a reference": f"{UNIT}stages/test_evaluate_images.py",
    "its captions are drawn for a CLIP alone": "is said, and nothing fails",
    "more numbers are the same in all runs": f"{UNIT}stages/test_stage_report.py; is said, and nothing fails",
    "samples.gather=sharded: {}": f"{UNIT}stages/test_samples_sharded.py",
    "the judge reads only shapes": f"{UNIT}stages/test_evaluate_images.py",
    "give it to sample as rerank": "is said, and nothing fails",
    "say which to export": f"{UNIT}stages/test_stage_export.py, of a run with several models",
    "init_from: {} holds a": f"{UNIT}stages/test_fine_tuning.py",
    "tokenizer= goes with source=": f"{UNIT}stages/test_stage_import.py",
    "model.visual_image_size: give": f"{UNIT}stages/test_train_clip.py",
    "that the checkpoint does not describe": f"{UNIT}stages/test_stage_import.py",
    "set tokenizer.shared_codebook=false": f"{UNIT}tokenizers/test_pretrained.py",
    "`tokscale tokenize`": "is part of what verify says, above",
    "`tokscale tokenize action=embed`": "is part of what verify says, above",
}
"""Messages that no command here causes: what they say, and where they are caused or why they need not be."""


def configs() -> Iterator[Any]:
    for name in registry.available():
        stage = registry.find(name)
        if name == "bench":
            yield from (registry.config_class(stage, {"what": what}) for what in bench.whats())
        else:
            yield registry.import_stage(stage).CONFIG


def resolves(kind: Any, parts: list[str]) -> bool:
    """Whether a dotted key is one below a type."""
    if not parts:
        return True
    for member in members_of(kind):
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(parts[0])
            if field is not None and resolves(annotation_of(field), parts[1:]):
                return True
        origin = get_origin(member)
        if isinstance(origin, type) and issubclass(origin, Mapping) and resolves(get_args(member)[1], parts[1:]):
            return True
    return False


def test_every_key_that_a_message_names_is_a_whole_key():
    known = list(configs())
    wrong = [
        (found.where, word)
        for found in ways_out.advice()
        for word in found.words
        if word not in registry.STAGES and word not in found.fields and word not in ("recipe", "cluster")
        if not any(resolves(config, word.split(".")) for config in known)
        if not any(words in found.text for words in ELSEWHERE)
    ]
    assert not wrong


def test_every_way_out_that_a_message_names_is_run_here_or_said_why_not():
    run_here = [way.says for way in WAYS]
    left = [
        (found.where, found.text)
        for found in ways_out.advice()
        if not any(words in found.text for words in (*run_here, *ELSEWHERE))
    ]
    assert not left, "\n".join(f"{where}: {text}" for where, text in left)
    texts = [found.text for found in ways_out.advice()]
    assert not [words for words in ELSEWHERE if not any(words in text for text in texts)]
