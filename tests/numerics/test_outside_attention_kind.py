"""An attention kind that one file adds: every oracle test takes it from the registry and holds it to its definition."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokscale.base.errors import ConfigError
from tokscale.nn.attention.pattern import KINDS, AttentionKind, AttentionPattern, attention_kind
from tokscale.nn.config import StackConfig
from tokscale.nn.layout import TokenLayout

TESTS = Path(__file__).parents[1]
ORACLES = {
    "unit/nn/test_attention_pattern.py": {
        "test_every_query_sees_itself": 1,
        "test_kinds_of_the_grid_see": 2,
        "test_pairs_count": 3,
        "test_a_shorter_sequence": 1,
    },
    "unit/nn/test_flex_order.py": {"test_the_reordered_mask": 4},
    "numerics/test_attention_backends.py": {
        "test_every_backend_is_the_dense_oracle": 16,
        "test_padding_masks": 4,
        "test_every_dtype": 3,
        "test_the_fast_paths_are_chosen": 1,
    },
    "numerics/test_cache_decoding.py": {
        "test_decoding_equals": 7,
        "test_what_is_kept": 1,
        "test_a_position_that_only_the_device": 1,
    },
}
"""The tests that hold a kind's parts to each other, and how often each runs for one that reads no options."""

RUN = """
import sys
import pytest

class Adds:
    def pytest_sessionstart(self):
        import row_pairs_kind

sys.exit(pytest.main(sys.argv[1:], plugins=[Adds()]))
"""


def test_a_kind_in_one_file_is_held_to_its_definition_by_every_oracle_test():
    files = [str(TESTS / file) for file in ORACLES]
    command = [sys.executable, "-c", RUN, "-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "row_pairs", *files]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=os.environ.copy())
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    for tests in ORACLES.values():
        for name, count in tests.items():
            assert len(re.findall(rf"::{name}\S*\[.*row_pairs.* PASSED", ended.stdout)) == count, name


@pytest.mark.parametrize("missing", ["mask_mod", "fast_path", "retention", "backends", "needs_grid"])
def test_a_kind_without_one_of_its_parts_cannot_be_added(missing):
    parts = {
        "name": "half",
        "backends": ("dense", "sdpa"),
        "needs_grid": False,
        "mask_mod": lambda self, pattern, device: None,
        "fast_path": lambda self, pattern: None,
        "retention": lambda self, pattern: None,
    }
    del parts[missing]
    with pytest.raises(TypeError, match=missing):
        attention_kind(type("ResidualBranch", (AttentionKind,), parts))
    assert "half" not in KINDS


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(TypeError, match="'full' is there already"):
        attention_kind(type(KINDS["full"]))


def test_an_unknown_kind_is_answered_with_the_nearest_in_code_and_in_configurations():
    with pytest.raises(ConfigError, match="attn_types: got 'axial_roww'; did you mean 'axial_row'"):
        AttentionPattern("axial_roww", TokenLayout(2, 2, 2))
    with pytest.raises(ValueError, match="got 'axial_roww'; did you mean 'axial_row'"):
        StackConfig(dim=8, depth=1, attn_types=("axial_roww",))
