"""`bench scale`: the law that is fitted, and that real processes are counted and drawn."""

import pytest

from tokscale.base.config import decode
from tokscale.bench import scale
from tokscale.bench.file_calls import count_file_calls
from tokscale.bench.scale import ScaleBench, law


@pytest.mark.parametrize("a,b", [(3.0, 0.0), (2.0, 1.0), (0.5, 2.0)])
def test_the_law_of_exact_counts_is_found(a, b):
    found = law({world: max(a * world**b, 1.0) for world in (2, 4, 8, 64)})
    assert found == pytest.approx((a, b))


def test_calls_are_counted_below_the_folders_alone(tmp_path):
    (tmp_path / "in").mkdir()
    with count_file_calls(tmp_path / "in") as calls:
        (tmp_path / "in" / "a").write_text("x")
        (tmp_path / "out").write_text("x")
        (tmp_path / "in" / "a").stat()
        (tmp_path / "in" / "a").rename(tmp_path / "in" / "b")
        list((tmp_path / "in").iterdir())
    (tmp_path / "in" / "b").read_text()
    assert dict(calls) == {"opens": 2, "stats": 1, "writes": 1}


@pytest.mark.long
def test_real_processes_are_counted_and_drawn(tmp_path):
    config = decode(ScaleBench, {"worlds": [2, 4], "units": 20, "figure": tmp_path / "scale.png"})
    rows = {row["name"]: row for row in scale.rows(config)}
    for part in ("resume", "preflight", "message"):
        assert rows[f"scale/{part}/others/messages"]["ours"] == 0
    assert rows["scale/resume/others/opens"]["ours"] == 0 and (tmp_path / "scale.png").exists()
