"""Peak host memory of whole conversions, each in a process of its own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "streaming.py"
# What is copied beside the stacked arrays: blocks and files in the making.
SLACK = 100 * 2**20


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    specification = importlib.util.spec_from_file_location("streaming", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversions_hold_two_stacked_arrays_and_not_the_model(streaming: ModuleType, tmp_path: Path) -> None:
    total, largest = streaming.make_checkpoint(tmp_path / "model", streaming.shape(layers=24, width=512))
    limit = 2 * largest + SLACK
    # Else a copy of the whole model would pass too.
    assert limit < total
    for case in ("load_sharded", "save_sharded", "import", "export", "pack", "load_packed", "unpack"):
        assert streaming.run(case, tmp_path)["above"] < limit, case
