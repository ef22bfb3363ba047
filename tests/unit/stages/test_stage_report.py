"""A run as a page: whole without a network, true to what was recorded, safe with any text; and several side by side."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tokscale.base.errors import ConfigError, DataError
from tokscale.cli.compose import with_key
from tokscale.dist.env import ProcessEnv
from tokscale.inference.grids import save_grid
from tokscale.runs.page import Page, slider, table
from tokscale.stages import compare, registry, report

pytest.importorskip("plotly")
ALONE = ProcessEnv()
EVIL = "<script>alert('x')</script>"


def make_run(folder: Path, seed: int = 0, lr: float = 0.01, loss: float = 1.0) -> Path:
    (folder / "samples").mkdir(parents=True)
    config = {"train": {"run_dir": str(folder), "seed": seed, "optim": {"lr": lr}, "note": EVIL}}
    config["train"] |= {"data_dir": f"{folder}/data"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": n, "time": 1e9 + n, "loss": loss / n, "lr": lr, "nonfinite_steps": float(n > 3)} for n in range(1, 6)
    ]
    rows[-1] |= {"goodput": 0.7}
    line = {"start": 1e9, "first": 0, "last": 5, "time": 1e9 + 10, "seconds": {"steps": 7.0, "saves": 2.0}}
    (folder / "goodput.jsonl").write_text(json.dumps(line) + "\n")
    rows[-1] |= {"held_out/loss": loss / 4, "held_out/loss/image": 0.1, "mfu": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listing = []
    for step in (2, 4):
        save_grid(torch.full((1, 3, 8, 8), 50 * step, dtype=torch.uint8), ["x"], folder / f"samples/step_{step}.png")
        listing.append(json.dumps({"step": step, "file": f"step_{step}.png"}) + "\n")
    (folder / "samples/training.jsonl").write_text("".join(listing))
    images = {"drawn": {"kid": 0.1413, "kid_error": 0.01, "recall": 0.8}, "reconstructed": {"kid": 0.1195}}
    (folder / "report.json").write_text(json.dumps({"request": "r", "images": images, "prompt": EVIL}))
    (folder / "env.json").write_text(json.dumps({"host": EVIL, "versions": {"torch": "2.13"}}))
    return folder


@pytest.fixture
def page(tmp_path) -> str:
    run_dir = make_run(tmp_path / "run")
    other = make_run(tmp_path / "other", lr=0.5)
    report.run(report.ReportConfig(run_dir=run_dir, data_dir=tmp_path, other=other), ALONE)
    return (run_dir / "report.html").read_text()


def own_part(page: str) -> str:
    """Without plotly's program."""
    return page[: page.index("<script>")] + page[page.rindex("<script>") :]


def test_a_page_needs_nothing_beside_it_and_runs_no_text_of_the_run(page):
    own = own_part(page)
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)', own) and "@import" not in own
    assert EVIL not in page and "&lt;script&gt;alert" in own


def test_a_page_has_what_was_recorded_and_leaves_out_the_rest(page):
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", own_part(page))
    assert headings[:3] == ["Where it stands", "Curves by step", "Images while it trained"]
    assert {"Images against real ones", "Other measures", "Difference to other", "Environment", "Incidents"} <= set(
        headings
    )
    assert "Checkpoints" not in headings and "Data" not in headings
    curves = json.loads(re.search(r'id="curves">(.*?)</script>', page)[1])
    loss = next(curve for curve in curves if curve["layout"]["title"]["text"] == "loss")
    assert [trace["name"] for trace in loss["traces"]] == ["loss", "held_out/loss"]
    assert loss["traces"][0]["y"] == [1.0, 0.5, 1 / 3, 0.25, 0.2] and loss["traces"][1]["x"] == [5]
    assert not any(trace["name"] == "mfu" for curve in curves for trace in curve["traces"])
    assert next(trace["y"] for curve in curves for trace in curve["traces"] if trace["name"] == "goodput") == [0.7]
    spent = own_part(page).partition("Where the time went")[2].partition("</table>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", spent)[:3] == ["steps that count (goodput)", "7", "70"]
    assert "train.optim.lr" in page and ">141.3<" in page and "1 up to step 4" in page


def cells(page: str, heading: str) -> list[list[str]]:
    """Of the first table below a heading."""
    rows = page.partition(f">{heading}</h2>")[2].partition("</table>")[0].split("</tr>")[:-1]
    return [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) for row in rows]


def test_what_was_measured_stands_in_tables_with_units_for_each_size(tmp_path):
    run_dir = make_run(tmp_path / "run")
    row = {"count": 1000, "kid": 0.05, "kid_error": 0.001, "fd": 57.0, "fd_is_a_level": False}
    images = {
        "drawn": row | {"recall": 0.3},
        "real": row | {"kid": -0.0001},
        "class_accuracy": {"drawn": 0.25, "about": {"network": "bright.pt"}},
        "diversity": {"within_prompt": 0.125, "between_prompts": 0.5},
    }
    accuracy = {"seen": {"exact": 0.95, "count": 125}, "two_objects": {"held_out": {"exact": 0.28, "relation": 1.0}}}
    task = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    small = {"images": images, "prompt_accuracy": accuracy, "reconstruction_psnr": 26.5}
    six = {"overall": task, "position": task | {"shown": 0.68}, "judge_accuracy": {"position": 1.0}}
    (run_dir / "report.json").write_text(json.dumps({"sizes": {"32x32": small, "48x32": {"gen6": six}}}))
    report.run(report.ReportConfig(run_dir=run_dir, data_dir=tmp_path), ALONE)
    page = own_part((run_dir / "report.html").read_text())
    assert cells(page, "Images against real ones of 32x32") == [
        ["", "images", "KID x 1000", "\u00b1", "FD", "recall"],
        ["drawn", "1,000", "50", "1", "57", "0.3"],
        ["other real images", "1,000", "-0.1", "1", "57", ""],
    ]
    assert "says little as a level" in page and '<td>drawn</td><td class="number">0.25</td>' in page
    assert '<td>within_prompt</td><td class="number">0.125</td>' in page
    assert [row[:2] for row in cells(page, "Prompt accuracy of 32x32")[1:]] == [
        ["one thing, seen in training", "0.95"],
        ["two things, held out", "0.28"],
    ]
    assert [row[0] for row in cells(page, "gen6: six questions about shapes of 48x32")] == [
        "task",
        "position",
        "overall",
    ]
    assert ["reconstruction_psnr", "26.5"] in cells(page, "Other measures of 32x32")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        report.run(report.ReportConfig(run_dir=tmp_path), ALONE)
    with pytest.raises(DataError, match=r"holds no config\.yaml"):
        make_run(tmp_path / "run")
        report.run(report.ReportConfig(run_dir=tmp_path / "run", other=tmp_path), ALONE)


def test_cells_say_numbers_as_people_do():
    shown = table([["a", 0.000123456, 12345, True, None]])
    assert ">0.0001235<" in shown and ">12,345<" in shown and "<td>yes</td>" in shown and table([]) == ""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_the_curves_and_moves_the_slider(page, tmp_path):
    """The page tells in its title what it has come to; a script error leaves the title as it was."""
    probe = (
        "<script>addEventListener('load', () => { const box = document.querySelector('.slider');"
        "const range = box.querySelector('input'); const first = box.querySelector('output').textContent;"
        "range.value = 0; range.dispatchEvent(new Event('input'));"
        "const shown = [...box.querySelectorAll('img')].filter(image => !image.hidden).map(image => image.alt);"
        "document.title = `${document.querySelectorAll('.main-svg').length > 0}, ${first}, ${shown}`;"
        "});</script></body>"
    )
    file = tmp_path / "probe.html"
    file.write_text(page.replace("</body>", probe))
    told = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=10000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "<title>true, step 4, step 2</title>" in told.stdout


def test_runs_stand_side_by_side_and_seeds_make_a_band(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", seed=0, loss=1.0), make_run(tmp_path / "b", seed=1, loss=1.2)]
    runs.append(make_run(tmp_path / "c", lr=0.5, loss=2.0))
    compare.run(compare.CompareConfig(runs=tuple(runs), out=tmp_path / "all.html"), ALONE)
    told = capsys.readouterr().out
    assert "a (2 seeds)" in told.splitlines()[0] and "0.22 ± 0.028" in told and "0.4" in told
    assert "nonfinite_steps" not in told and "more numbers are the same in all runs; all=true shows them" in told
    page = (tmp_path / "all.html").read_text()
    assert "train.optim.lr" in page
    curves = json.loads(re.search(r'id="curves">(.*?)</script>', page)[1])
    lines = [trace for curve in curves for trace in curve["traces"] if "fill" not in trace]
    colours = {(trace["name"], trace["line"]["color"]) for trace in lines}
    assert {name for name, _ in colours} == {"a (2 seeds)", "c"} and len(colours) == 2
    loss = next(curve["traces"] for curve in curves if curve["layout"]["title"]["text"] == "loss")
    assert loss[0]["y"] == pytest.approx([1.1 / n for n in range(1, 6)]) and loss[0]["name"] == "a (2 seeds)"
    (band,) = [trace for trace in loss if "fill" in trace]
    spread = 0.2 / 2**0.5
    assert band["x"] == [1, 2, 3, 4, 5, 5, 4, 3, 2, 1] and band["y"][:5] == pytest.approx(
        [(1.1 + spread / 1) / n for n in range(1, 6)]
    )
    compare.run(compare.CompareConfig(runs=tuple(runs), all=True), ALONE)
    assert "nonfinite_steps" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give two run folders"):
        compare.run(compare.CompareConfig(runs=(runs[0],)), ALONE)
    with pytest.raises(DataError, match=r"holds no config\.yaml"):
        compare.run(compare.CompareConfig(runs=(runs[0], tmp_path)), ALONE)


def test_bare_words_are_the_runs():
    stage = registry.find("compare")
    assert with_key(stage, ["runs/a", "runs/b", "all=true"]) == ['runs=["runs/a", "runs/b"]', "all=true"]
    assert with_key(stage, ["all=true"]) == ["all=true"]


def test_nothing_to_show_makes_no_section():
    page = Page("t", "w")
    page.add("empty", slider([]), table([]), page.curves({}))
    assert "empty" not in own_part(page.html())
