"""`bench checkpoint` as it is typed, on a model so small that only the shape of the report can be judged."""

import json

from tokscale import cli

SMALLEST = ("dim=32", "depth=1", "world=1", "other_world=2", "rounds=1")


def test_the_report_has_a_row_for_each_number_that_was_promised(tmp_path):
    folder, report = tmp_path / "work", tmp_path / "report.json"
    folder.mkdir()
    assert cli.main(["bench", "checkpoint", *SMALLEST, f"folder={folder}", f"out={report}"]) == 0
    found = json.loads(report.read_text())["rows"]
    names = [row["name"].split("/")[1] for row in found]
    loads = ["load-2-ranks", "resume-verify-read"]
    assert names == ["async", "sync", "step-beside-a-save", *loads, "export", "export-sha256-alone"]
    assert all(row["ours"] > 0 and row["baseline"] > 0 and row["unit"] == "s" for row in found)
    assert all(abs(row["ratio"] - row["baseline"] / row["ours"]) < 1e-9 for row in found)
    assert [row["target"] for row in found] == [10.0, None, None, 1 / 1.5, 1 / 1.05, 0.7, None]
    assert not list(folder.iterdir())
