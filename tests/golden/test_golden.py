from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.__main__ import main
from tests.golden.cases import METHODS, Case, cases, options_of, run

FOLDER = Path(os.environ.get("HOMEOSTAT_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
COVERED = [case for case in cases(FOLDER) if case.covered] if FOLDER.is_dir() else []


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder() -> Path:
    if not FOLDER.is_dir():
        pytest.skip(f"no golden vectors at {FOLDER}; HOMEOSTAT_GOLDEN names their folder")
    return FOLDER


@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.name)
def test_the_published_outputs_are_reproduced(case: Case):
    result = run(case)
    assert not result.problems, result.line()
    assert result.compared >= 8  # an output for each of the 8 batches at least


def test_every_method_that_is_mapped_has_cases(folder: Path):
    assert {case.method for case in cases(folder) if case.covered} == set(METHODS)


def a_case(folder: Path, to: Path, method: str) -> Path:
    """A golden folder of one case, to be damaged."""
    chosen = next(case for case in cases(folder) if case.method == method)
    (to / "cases").mkdir()
    for part in ("weights", "batches"):
        (to / part).symlink_to(folder / part)
    (to / "models.py").symlink_to(folder / "models.py")
    for suffix in (".json", ".npz"):
        shutil.copy(folder / "cases" / (chosen.name + suffix), to / "cases")
    return to / "cases" / f"{chosen.name}.npz"


@pytest.mark.parametrize(("method", "key"), [("tent", "logits/7"), ("tent", "final/n1.bias"), ("lame", "kernel/0")])
def test_one_changed_number_fails_the_run(folder: Path, tmp_path: Path, capsys, method: str, key: str):
    path = a_case(folder, tmp_path, method)
    assert main([str(tmp_path)]) == 0
    arrays = dict(np.load(path))
    changed = arrays[key].astype(np.float64)
    changed.flat[0] = np.nan if key.startswith("logits") else changed.flat[0] + 0.01
    arrays[key] = changed
    np.savez(path, **arrays)
    assert main([str(tmp_path)]) == 1
    assert f"{key}: differs" in capsys.readouterr().out


def test_a_setting_that_ours_lacks_fails_the_case_instead_of_being_ignored(folder: Path):
    case = next(case for case in cases(folder) if case.method == "tent")
    for setting in ({"episodic": True}, {"temperature": 2.0}):
        changed = Case(case.folder, json.loads(json.dumps(case.info)) | {"hyper": setting})
        with pytest.raises(ValueError, match=next(iter(setting))):
            options_of(changed)
        assert run(changed).problems


def test_a_folder_without_cases_is_an_error(tmp_path: Path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no cases" in capsys.readouterr().err
