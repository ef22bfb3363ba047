"""`bench gpu`, whole, with tiny sizes on a CPU; and what a section that fails or hangs does to the others."""

import json
from pathlib import Path

import pytest

from tokscale import cli
from tokscale.bench.acceptance import process
from tokscale.bench.acceptance.process import SectionProcess
from tokscale.bench.acceptance.sections import SECTIONS
from tokscale.bench.stepping import idle_share

TARGETS = ("numerics", "losses", "saving")


def test_the_whole_list_runs_anywhere(tmp_path):
    report = tmp_path / "report"
    slow = "seconds=100000"  # whatever else this machine does
    assert cli.main(["bench", "gpu", "device=cpu", "sizes=tiny", slow, f"report={report}"]) == 0
    rows = [json.loads(line) for line in (report / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    sections = {name: [row for row in rows if row["name"].startswith(f"gpu/{name}/")] for name in SECTIONS}
    assert all(sections.values())
    for name in TARGETS:  # what has a right answer has it here
        held = [row for row in sections[name] if row.get("target")]
        assert held and all(row["ratio"] >= row["target"] for row in held)
    families = {row["name"].split("/")[2] for row in sections["training"]}
    assert families == {"dalle", "maskgit", "parti", "rqtransformer"}
    page = (report / "README.md").read_text()
    assert "| losses | 9 | 0 |" in page and "gpu/quickstart/evaluate/time" in page
    assert (report / "trace.json.gz").stat().st_size > 1000


def setting(folder: Path) -> dict[str, str]:
    return {"device": "cpu", "sizes": "tiny", "folder": str(folder), "scratch": str(folder)}


def test_a_section_that_fails_or_takes_too_long_ends_alone(tmp_path, monkeypatch):
    sections = SectionProcess(setting(tmp_path), tmp_path / "log.txt")
    try:
        monkeypatch.setattr(process, "START_SECONDS", 0.0)
        with pytest.raises(TimeoutError, match="longer than its 0 s"):
            list(sections.rows("machine", 0.2))
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
            list(sections.rows("nothing", 3600))
        assert "gpu/machine/host-to-device/throughput" in [row["name"] for row in sections.rows("machine", 3600)]
    finally:
        sections.close()


@pytest.mark.parametrize("section", ["nothing", "trainin"])
def test_a_section_of_unknown_name_is_refused(section, tmp_path, capsys):
    assert cli.main(["bench", "gpu", f"sections=[{section}]", "device=cpu", f"report={tmp_path}"]) == 64
    assert f"unknown section '{section}'" in capsys.readouterr().err


def test_the_share_without_work_is_what_no_kernel_covers():
    assert idle_share([(0, 1), (2, 4), (3, 5)]) == pytest.approx(0.2)
    assert idle_share([(0, 9), (2, 4)]) == 0 and idle_share([]) is None
