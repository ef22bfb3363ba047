"""Words on the command line to a decoded configuration, an exit code and a trace of both in the run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_world
import pytest

from tokscale import cli
from tokscale.base import files
from tokscale.dist.env import ProcessEnv
from tokscale.runs.outcome import EXIT_FILE, Attempt, read_exit


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path) -> Path:
    """A working folder of one's own, with stages and configurations for tests."""
    cli_world.install(monkeypatch, tmp_path / "configs")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def decoded(*words: str) -> cli_world.DrawConfig:
    assert cli.main(["draw", *words]) == 0
    return cli_world.SEEN[-1]


def refused(capsys, *words: str) -> str:
    """What is said when the words end with exit code 64."""
    assert cli.main(list(words)) == 64
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    return said


# ------------------------------------------------------------------------------------------------ precedence


def test_defaults_of_the_stage_come_first():
    config = decoded("model.kind=cat")
    assert config.count == 3 and config.engine == cli_world.Eager()


def test_recipe_shared_then_section_then_group_then_key():
    config = decoded("recipe=quick/pets")
    assert config.data_dir == Path("runs/pets/data")  # shared
    assert config.seed == 6 and config.count == 7  # the section goes above shared and above the stage's defaults
    assert config.engine == cli_world.Zero(stage=2)  # another kind replaces the default's keys
    assert config.model == cli_world.Cat(dim=8, whiskers=4)  # a group inside a section
    config = decoded("recipe=quick/pets", "engine=zero3", "model=dog/small")
    assert config.engine == cli_world.Zero(stage=3) and config.model == cli_world.Dog(dim=16)
    config = decoded("model.dim=99", "recipe=quick/pets", "count=1", "model=dog/small", "seed=8")
    assert config.model == cli_world.Dog(dim=99) and config.count == 1 and config.seed == 8


def test_a_group_of_settings_keeps_what_the_recipe_says_besides(world, capsys):
    recipe = "draw:\n  model: {kind: cat}\n  engine: {kind: zero, stage: 3, dtype: auto, divided_early: true}\n"
    Path("my.yaml").write_text(recipe)
    whole = cli_world.Zero(stage=3, dtype="auto", divided_early=True)
    assert decoded("recipe=my.yaml", "engine=zero3").engine == whole
    assert "no use" not in capsys.readouterr().err
    assert decoded("recipe=my.yaml", "engine=zero2").engine == cli_world.Zero(stage=2, dtype="auto")
    assert "engine=zero2 has no use for the recipe's divided_early\n" in capsys.readouterr().err
    assert decoded("recipe=my.yaml", "engine=eager").engine == cli_world.Eager(dtype="auto")
    assert "engine=eager has no use for the recipe's stage, divided_early\n" in capsys.readouterr().err


def test_a_setting_that_is_wrong_by_itself_is_not_dropped_in_silence(world, capsys):
    Path("my.yaml").write_text("draw:\n  model: {kind: cat}\n  engine: {dtype: fp23}\n")
    assert "engine.dtype" in refused(capsys, "draw", "recipe=my.yaml", "engine=zero2")


def test_references_follow_what_the_command_line_says():
    config = decoded("recipe=quick/pets", "run_dir=elsewhere", "seed=9")
    assert config.data_dir == Path("elsewhere/data") and config.note == "seed 9 in elsewhere/data"


def test_a_group_file_may_build_on_another():
    assert decoded("model=cat/large").model == cli_world.Cat(dim=64, whiskers=4)


def test_a_recipe_of_ones_own_may_use_the_shipped_groups(world):
    Path("my.yaml").write_text("defaults:\n  - /model/dog@draw.model: small\n  - _self_\ndraw:\n  count: 11\n")
    config = decoded("recipe=my.yaml")
    assert config.count == 11 and config.model == cli_world.Dog(dim=16)


def test_values_in_every_form():
    config = decoded("model.kind=cat", 'prompts=["a small, red circle","b=c"]', "rate=1e-4", "note=runs/x y")
    assert config.prompts == ("a small, red circle", "b=c") and config.rate == 1e-4 and config.note == "runs/x y"
    assert decoded("model={kind: dog, dim: 3}", "rate=null").model == cli_world.Dog(dim=3)


@pytest.mark.parametrize(
    "text",
    ["a=b", "2026_11", "007", "1e3", "true", "a, b", "一只猫", "a: b {c}", "$5", "a\nb", "x'y", '"', "[", "a]", " x "],
)
def test_text_is_taken_as_it_was_typed(text):
    assert decoded("model.kind=cat", f"note={text}").note == text


def test_text_in_quotes_is_taken_without_them():
    assert decoded("model.kind=cat", """note='null'""").note == "null"
    assert decoded("model.kind=cat", r"""note="say \"hi\" \\ to \n" """.strip()).note == r'say "hi" \ to \n'


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("一只猫", ("一只猫",)),
        ("[一只猫]", ("一只猫",)),
        ("[一只猫, ein Hund]", ("一只猫", "ein Hund")),
        ("cat", ("cat",)),
        ("a red ring, small", ("a red ring, small",)),
        ("[0, 1]", ("0", "1")),
        ("[true, null]", ("true", "null")),
        ("???", ("???",)),
        ("[???]", ("???",)),
        ("${run_dir}", ("${run_dir}",)),
        ("[costs ${, or $ {x}]", ("costs ${", "or $ {x}")),
        ('["a, b", \'c "d"\', e]', ("a, b", 'c "d"', "e")),
        ("[]", ()),
    ],
)
def test_nothing_in_a_prompt_is_a_list_a_number_or_a_reference_that_was_not_meant_as_one(typed, told):
    assert decoded("model.kind=cat", f"prompts={typed}").prompts == told


def test_nothing_in_a_recipes_prompt_is_a_reference():
    Path("my.yaml").write_text("draw:\n  model: {kind: cat}\n  prompts: ['${seed} cats', '???']\n")
    assert decoded("recipe=my.yaml").prompts == ("${seed} cats", "???")


@pytest.mark.parametrize(
    "name", ["2026", "2026_11", "2026-11-29", "1e3", "007", "true", "nan", "a=b", "数据", "a b", "~x"]
)
def test_a_folder_may_have_any_name(name, monkeypatch):
    assert decoded("model.kind=cat", f"run_dir=./{name}", f"data_dir={name.strip('~')}").run_dir == Path(name)
    assert json.loads(Path(name, "exit.json").read_text())["code"] == 0 and cli_world.SEEN[
        -1
    ].data_dir.name == name.strip("~")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x1b[1m", "x" * 300, "~no-such-user/x", "\udcff"])
def test_what_is_no_folder_is_refused_before_anything_is_made(capsys, name):
    assert "run_dir: got" in refused(capsys, "draw", "model.kind=cat", f"run_dir={name}")
    assert not list(Path().iterdir())


def test_another_kind_is_chosen_without_the_keys_that_a_file_gave_to_the_one_before():
    Path("my.yaml").write_text("draw:\n  model: {kind: cat, whiskers: 7, dim: 9}\n  engine: {kind: zero, stage: 2}\n")
    assert decoded("recipe=my.yaml", "model.kind=dog", "engine.kind=eager").model == cli_world.Dog()
    assert decoded("recipe=my.yaml", "model.dim=3", "model.kind=dog").model == cli_world.Dog(dim=3)
    assert decoded("recipe=my.yaml", "model.kind=cat").model == cli_world.Cat(whiskers=7, dim=9)
    assert decoded("recipe=my.yaml", "engine.stage=3").engine == cli_world.Zero(stage=3)


def test_a_stage_that_needs_a_word_takes_it_first():
    assert cli.main(["tell-tale", "truth", "loud=true"]) == 0
    assert cli_world.SEEN[-1] == cli_world.TellConfig(what="truth", loud=True)
    assert cli.main(["tell_tale", "what=tale"]) == 0


@pytest.mark.parametrize("extra", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_what_launchers_append_is_dropped(extra):
    assert cli.main(["draw", *extra, "model.kind=cat", "count=5"]) == 0
    assert cli.main([*extra, "draw", "model.kind=cat", "count=5"]) == 0
    assert cli_world.SEEN[-1].count == 5


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["drew"], "unknown stage 'drew'; did you mean 'draw'?"),
        (["later"], "unknown stage 'later'"),  # listed, but its program is not installed
        (["draw", "recipe=quick/pets", "modle.dim=3"], "modle: unknown key; did you mean 'model'?"),
        (["draw", "recipe=quick/pets", "model.dmi=3"], "model.dmi: unknown key; did you mean 'dim'?"),
        (["draw", "+recipe=quick/pets", "+cuont=3"], "cuont: unknown key; did you mean 'count'?"),
        (["draw", "recipe=quick/pet"], "recipe=quick/pet: no such file"),
        (["draw", "recipe=quick/pet"], "did you mean 'quick/pets'?"),
        (["draw", "recipe=gone.yaml"], "recipe=gone.yaml: no such file"),
        (["draw", "recipe=bad"], "unknown section 'tell-tail'; did you mean 'tell-tale'?"),
        (["draw", "model=cat/smal"], "did you mean 'cat/small'?"),
        (["draw", "model.kind=cow"], "model.kind: got 'cow'"),
        (["draw"], "model: required, but not given"),
        (["draw", "count"], "'count': not of the form key=value"),
        (["draw", "count=1,2"], "a list is written 'count=[a,b]'"),
        (["draw", "model={dim:"], "model: cannot read '{dim:'"),
        (["draw", "recipe=quick/pets", "count.more=1"], "count.more: count is 7 and has no keys below it"),
        (["draw", "note=${nowhere}"], "'nowhere' not found"),
        (["draw", "note=???"], "note"),
        (["tell-tale", "lies"], "what: got 'lies'; choose from tale, truth"),
    ],
)
def test_a_wrong_word_is_answered_in_one_line_without_hydras_advice(capsys, words, answer):
    said = refused(capsys, *words)
    assert answer in said and "+" not in said.replace("'+", "") and said.startswith("tokscale")


NINES = "9" * 5000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)

DOUBLING = "draw: {a0: [1, 1], " + ", ".join(f"a{i}: [${{a{i - 1}}}, ${{a{i - 1}}}]" for i in range(1, 40)) + "}"


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("draw:\n\tcount: 1\n", ":2:1: a tab; indent with spaces"),
        ("draw:\n  count: 1\n  count: 2\n", ":3:3: the key 'count' stands there twice"),
        ("draw: {}\nshared: {}\ndraw: {}\n", ":3:1: the key 'draw' stands there twice"),
        (b"draw:\n  note: \x01\n", ":2: the character '\\x01' may not stand in YAML"),
        (b"draw:\n  note: \0\n", ":2: the character '\\x00' may not stand in YAML"),
        (b"draw:\n  note: \xff\n", ":2: byte 0xff is no UTF-8"),
        ("draw: {}".encode("utf-16"), ":1: byte 0xff is no UTF-8"),
        ("draw: !frame 1\n", ":1:7: the tag '!frame' is unknown"),
        ("draw: !!python/object/apply:os.system [true]\n", ":1:7: the tag"),
        ("draw: !!set {a, b}\n", ":1:7: the tag"),
        ("draw: !!binary x\n", ":1:7: the tag"),
        ("draw: [1, 2]\n", "section 'draw' is [1, 2]; it must hold keys"),
        ("shared: 7\n", "section 'shared' is 7; it must hold keys"),
        ("- draw\n", ":1: holds a list"),
        ("draw\n", ":1: holds a str"),
        ("1: {}\n", "the key 1 is no text"),
        ("draw: {count: 1\n", ":2:1:"),
        ("draw: 'x\n", ":2:1:"),
        ("a: 1\n---\nb: 2\n", ":2:1: expected a single document"),
        ("draw: &x {y: *x}\n", ":1:14: *x stands inside or before &x"),
        ("draw: *x\n", ":1:7: *x stands inside or before &x"),
        (BOMB, "more than 100000 values, its aliases expanded"),
        ("draw: {note: " + "[" * 200 + "]" * 200 + "}\n", "levels deep"),
        ("draw: {note: " + "[" * 20000 + "]" * 20000 + "}\n", ":1:"),
        (f"draw: {{count: {NINES}}}\n", ":1:15: not readable as a number"),
        ("draw: {count: 99999999999999999999}\n", "count: got an integer of 67 bits"),
        ("draw: {rate: .inf}\n", "rate: got inf; give a finite number"),
        ("draw: {rate: .nan}\n", "rate: got nan; give a finite number"),
        ("draw: {rate: 1e999}\n", "rate: got inf; give a finite number"),
        ("draw: {<<: 3}\n", ":1:12:"),
        ("draw: {? [1]: 2}\n", "unhashable key"),
        ("draw: {run_dir: 2026}\n", "run_dir: got 2026, which is no path; put the name in quotes"),
        ("draw: {note: '${draw.note}'}\n", "note"),
        ("draw: {note: '${'}\n", "my.yaml"),
        ("draw: {note: '${oc.decode:x}'}\n", "references: ${key.below}"),
        ("draw: {seed: 1, note: '${a}', a: '${note}'}\n", "leads back to itself"),
        (
            "draw: {a0: [1, 1], " + ", ".join(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']" for i in range(1, 40)) + "}",
            "grow",
        ),
        ("defaults: 3\n", "my.yaml: cannot be composed"),
        ("defaults: [3]\n", "my.yaml: cannot be composed"),
        ("defaults: [{a: {b: c}}]\n", "my.yaml: cannot be composed"),
        ("defaults: [nowhere]\n", "my.yaml: cannot be composed"),
        ("defaults: [other]\n", "other.yaml:2:1: a tab"),
        ("x: " + "y" * 300_000, "at most 262144 are read"),
    ],
)
def test_whatever_a_recipe_holds_is_answered_with_its_path_and_line(capsys, content, answer):
    Path("my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("other.yaml").write_text("x:\t1\n\ty: 1\n")
    said = refused(capsys, "draw", "model.kind=cat", "recipe=my.yaml")
    assert answer in said and len(said) < 2000 and said.startswith("tokscale draw: ")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("count: 1_000", 1000),
        ("count: 0x10", 16),
        ("count: +5", 5),
        ("count: 08", 8),
        ("count: '010'", 10),
        ("count: 1e3", 1000),
        ("count: 1_1", "1_1 is the number 11 in YAML; write that, or put it in quotes"),
        ("count: 2026_11", "2026_11 is the number 202611"),
        ("count: 010", "010 is a number to the base of 8"),
        ("count: -0_7", "to the base of 8"),
        ("count: 1:30", "1:30 is a number to the base of 60 in YAML; put it in quotes, as text"),
        ("count: on", "count: got 'true'; input should be a valid integer"),
        ("count: No", "count: got 'false'; input should be a valid integer"),
        ("rate: 1e-3", 0.001),
        ("rate: .5", 0.5),
        ("rate: -.5", -0.5),
        ("rate: 1.", 1.0),
        ("rate: 1E-3", 0.001),
        ("rate: 1_0.5", "1_0.5 is the number 10.5"),
        ("rate: 1:30.5", "1:30.5 is a number to the base of 60"),
        ("rate: yes", "rate: got 'true'; input should be a valid number"),
        ("note: 2026-11-29", "2026-11-29"),
        ("note: 2026-11-29 10:00:00", "2026-11-29 10:00:00"),
        ("note: '1:30'", "1:30"),
        ("note: 12:30:00", "12:30:00 is a number to the base of 60"),
        ("note: no", "note: got False; text is needed; yes, no, on, off, true and false are no words unless in quotes"),
        ("note: 7", "note: got 7; text is needed; put it in quotes"),
        ("note: y", "y"),
        ("loud: on", True),
        ("loud: No", False),
        ("loud: y", True),
        ("prompts: [yes, a cat]", "prompts[0]: got True; text is needed; yes, no, on,"),
        ("prompts: [1:30]", "1:30 is a number to the base of 60"),
        ("data_dir: 2026_11", "2026_11 is the number 202611"),
        ("data_dir: off", "data_dir: got False, which is no path; put the name in quotes"),
    ],
)
def test_what_yaml_takes_for_something_else_is_read_as_it_was_meant_or_refused(capsys, written, read):
    stage = "tell-tale" if written.startswith("loud") else "draw"
    Path("my.yaml").write_text(f"{stage}: {{{written}}}\n")
    words = ["recipe=my.yaml", *(["model.kind=cat"] if stage == "draw" else [])]
    key = written.partition(":")[0]
    if isinstance(read, str) and " " in read and not read.startswith("2026-11-29 "):
        assert read in refused(capsys, stage, *words)
    elif stage == "draw":
        assert getattr(decoded(*words), key) == read
    else:
        assert cli.main([stage, "truth", *words]) == 0
        assert getattr(cli_world.SEEN[-1], key) is read


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("count=1_000", 1000),
        ("count=010", 10),
        ("count=1e3", 1000),
        ("count=1_1", "count: got 1_1; write the number 11"),
        ("count=2026_11", "count: got 2026_11; write the number 202611"),
        ("model={kind: cat, dim: 1_1}", "model: got 1_1; write the number 11"),
        ("count=1:30", "count: got '1:30'; input should be a valid integer"),
        ("count=on", "count: got 'on'; input should be a valid integer"),
        ("count=true", "count: got 'true'; input should be a valid integer"),
        ("rate=.5", 0.5),
        ("rate=1e-3", 0.001),
        ("note=1_1", "1_1"),
        ("note=no", "no"),
        ("note=010", "010"),
        ("note=1:30", "1:30"),
    ],
)
def test_the_command_line_has_no_surprises_of_that_kind(capsys, typed, read):
    key, words = typed.partition("=")[0], ["model.kind=cat", typed] if not typed.startswith("model") else [typed]
    if isinstance(read, str) and ":" in read and key != "note":
        assert read in refused(capsys, "draw", *words)
    else:
        assert getattr(decoded(*words), key) == read


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_recipe_that_is_no_file_is_refused(capsys, make):
    make(Path("my.yaml"))
    assert "my.yaml: is no regular file" in refused(capsys, "draw", "recipe=my.yaml")


def test_a_recipe_may_begin_with_a_byte_order_mark_and_merge_mappings():
    Path("my.yaml").write_bytes(b"\xef\xbb\xbfshared: &a {seed: 3}\ndraw: {<<: *a, count: 9, model: {kind: cat}}\n")
    assert (decoded("recipe=my.yaml").seed, decoded("recipe=my.yaml").count) == (3, 9)


def test_several_mistakes_are_all_named(capsys):
    said = refused(capsys, "draw", "recipe=quick/pets", "cuont=1", "model.dmi=2", "rate=fast")
    assert said.count("\n") == 2


# --------------------------------------------------------------------------------------------- ends of a stage


def test_the_end_is_told_and_kept(capsys):
    assert cli.main(["draw", "model.kind=cat", "run_dir=here"]) == 0
    said = capsys.readouterr().out
    assert "draw: drew 3" in said and "grid: here/grid.png" in said and "next: tokscale tell-tale run_dir=here" in said
    exit_file, metrics = (json.loads(Path("here", name).read_text()) for name in ("exit.json", "stages/draw.json"))
    assert exit_file["code"] == 0 and exit_file["stage"] == "draw"
    assert metrics["metrics"] == {"per_second": 2.5} and metrics["outputs"] == {"grid": "here/grid.png"}


def test_whoever_works_from_a_recipe_goes_on_with_it(capsys):
    assert cli.main(["draw", "recipe=quick/pets", "run_dir=here", "count=2"]) == 0
    assert "next: tokscale tell-tale recipe=quick/pets run_dir=here\n" in capsys.readouterr().out


def test_a_skipped_stage_keeps_the_metrics_of_the_run_that_did_the_work():
    decoded("model.kind=cat", "run_dir=here", "count=4")
    decoded("model.kind=cat", "run_dir=here", "count=0")
    assert json.loads(Path("here/stages/draw.json").read_text())["summary"] == "drew 4"


@pytest.mark.parametrize(("fail", "code"), [("data", 65), ("bug", 1), ("disk", 74), ("interrupt", 130)])
def test_every_failure_has_its_code_and_leaves_it_behind(capsys, fail, code):
    decoded("model.kind=cat", "run_dir=here")
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", f"fail={fail}"]) == code
    assert json.loads(Path("here/exit.json").read_text())["code"] == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.startswith("tokscale draw: ") and said.count("\n") == 1
    assert ("the traceback is in here/logs/rank_0000.log" in said) == (fail == "bug")
    assert fail == "interrupt" or "in _draw" in Path("here/logs/rank_0000.log").read_text()


def test_a_disk_that_is_full_is_named_with_its_folder(capsys):
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", "fail=disk"]) == 74
    assert "here: No space left on device; free space" in capsys.readouterr().err


def test_who_is_refused_gives_back_how_the_folder_was_left_unless_another_job_works_there():
    decoded("model.kind=cat", "run_dir=here")
    left = Path("here/exit.json").read_bytes()
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", "fail=another run"]) == 64
    assert Path("here/exit.json").read_bytes() == left
    # The job that works there began at the same time: did its own failure find a success, it would not be written.
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", "fail=in use"]) == 69
    assert not Path("here/exit.json").exists()


def test_jobs_that_begin_together_may_both_take_away_how_the_last_one_ended(tmp_path, monkeypatch):
    (tmp_path / EXIT_FILE).write_text("{}")
    read = Path.read_bytes

    def taken_before(path: Path) -> bytes:
        path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", taken_before)
    Attempt(tmp_path, "draw", ProcessEnv()).begin()
    assert read_exit(tmp_path) is None


def test_how_a_folder_was_left_may_be_taken_away_while_somebody_looks(tmp_path, monkeypatch):
    (tmp_path / EXIT_FILE).write_text("{}")
    opened = files.open_regular

    def taken_before(path: Path, **options: Any) -> int:
        path.unlink()
        return opened(path, **options)

    monkeypatch.setattr(files, "open_regular", taken_before)
    assert read_exit(tmp_path) is None


def test_a_misspelt_key_makes_no_folder_but_is_noted_in_one_that_is_there():
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", "cuont=1"]) == 64 and not Path("here").exists()
    decoded("model.kind=cat", "run_dir=here")
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", "cuont=1"]) == 64
    assert json.loads(Path("here/exit.json").read_text())["code"] == 64


def test_debugging_shows_where(capsys, monkeypatch):
    monkeypatch.setenv("TOKSCALE_DEBUG", "1")
    assert cli.main(["draw", "model.kind=cat", "run_dir=here", "fail=data"]) == 65
    assert "Traceback" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- help


def test_the_list_of_stages(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert "draw       draw pets" in said and "tell-tale  tell tales" in said and "later" not in said


def test_every_key_of_a_stage_with_default_and_meaning(capsys):
    assert cli.main(["draw", "--help", "all"]) == 0
    said = capsys.readouterr().out
    assert "usage: tokscale draw [recipe=NAME] [key=value ...]" in said
    assert "model=cat/large|cat/small|dog/small" in said
    assert "  count: integer = 1\n      How many." in said
    assert "model: cat (keys below) | dog (keys below), required" in said
    assert "with kind=dog: Barks." in said and "Length of the dog." in said
    assert "run_dir: path = runs/default" in said


def test_help_is_one_screen_with_a_line_for_each_key(capsys):
    assert cli.main(["draw", "--help"]) == 0
    said = capsys.readouterr().out
    assert "count: integer = 1 # How many" in said and "model: cat | dog, see --help model, required" in said
    assert "whiskers" not in said and max(map(len, said.splitlines())) <= 120


def test_help_on_what_is_below_one_key(capsys):
    for words, shown, hidden in (
        (["--help", "count"], "count: integer = 1\n      How many.", "note"),
        (["--help", "model"], "model.dog  kind=dog: Barks.", "whiskers:"),
        (["--help", "model.dog"], "Length of the dog.", "whiskers"),
        (["--help", "model.cat.dim"], "Length of the cat.", "whiskers"),
        (["model=cat/small", "--help"], "whiskers: 4", "Barks"),
    ):
        assert cli.main(["draw", *words]) == 0
        said = capsys.readouterr().out
        assert shown in said and hidden not in said
    assert "there is no such key; did you mean 'model'?" in refused(capsys, "draw", "--help", "modle")


def test_help_of_a_stage_with_a_word(capsys):
    assert cli.main(["tell-tale", "--help"]) == 0
    assert "usage: tokscale tell-tale <what> [recipe=NAME]" in capsys.readouterr().out


def test_without_the_training_extra_a_stage_says_what_to_install():
    program = (
        "import sys; sys.modules['hydra'] = None; from tokscale.cli import main; sys.exit(main(['sample', 'a=1']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 69 and "pip install 'tokscale[train]'" in ended.stderr
