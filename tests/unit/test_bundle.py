from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from daemon.bundle import FILES, build_model, load_weights, open_bundle
from daemon.errors import BundleError
from daemon.inspecting import digest, inspect
from daemon.packing import pack
from daemon.source_data import read_rows
from tests.unit.worlds import FACTORY, build, bundle, source_rows


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle(), tmp_path / "bundle"))


def test_a_bundle_gives_back_the_model_that_was_packed() -> None:
    opened = open_bundle(bundle(), FACTORY)
    assert digest(opened.model.state_dict()) == digest(build().state_dict())
    assert opened.manifest.input_shape == [4] and opened.manifest.outputs == 3


@pytest.mark.parametrize("name", FILES)
def test_an_edited_or_missing_file_is_refused_by_name(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: does not match"):
        open_bundle(copied, FACTORY)
    (copied / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing"):
        open_bundle(copied, FACTORY)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 99}, "schema version 99"),
        ({"task": "poetry"}, "poetry"),
        ({"input_shape": []}, "input_shape"),
        ({"input_shape": [0]}, "input_shape"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_manifest_is_refused(copied: Path, change: dict[str, object], problem: str) -> None:
    file = copied / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BundleError, match=f"manifest.json: .*{problem}"):
        open_bundle(copied, FACTORY)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="HOMEOSTAT_BUNDLE=.*no manifest.json"):
        open_bundle(tmp_path, FACTORY)


def test_a_bundle_can_not_make_the_daemon_import_its_factory() -> None:
    with pytest.raises(BundleError, match=f"HOMEOSTAT_FACTORY={FACTORY}"):
        open_bundle(bundle())


@pytest.mark.parametrize("factory", ["build", ":build", "no_module:build", "json:build", "json:dumps", "os:getcwd"])
def test_a_factory_that_gives_no_module_is_refused_by_variable_name(factory: str) -> None:
    with pytest.raises(BundleError, match=f"HOMEOSTAT_FACTORY={factory}"):
        build_model(factory)


def test_weights_that_do_not_fit_are_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="w.safetensors: the weights don't fit"):
        load_weights(build(), {"0.weight": torch.zeros(1)}, tmp_path / "w.safetensors")


class Numbers(nn.Module):
    def __init__(self, value: float, flat: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.value, self.flat = value, flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.head(x) * self.value
        return outputs[:, 0] if self.flat else outputs


@pytest.mark.parametrize(
    ("model", "rows", "shift", "problem"),
    [
        (build(), 60, 0, "too few"),
        (build(), 300, 3, "labels run from"),
        (build(), 300, 0.5, "labels run from"),
        (Numbers(float("nan")), 300, 0, "not all finite"),
        (Numbers(1.0, flat=True), 300, 0, "classifier"),
        (nn.Linear(5, 3), 300, 0, "can't run on rows"),
    ],
)
def test_data_or_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, model: nn.Module, rows: int, shift: float, problem: str
) -> None:
    x, y = source_rows(rows)
    with pytest.raises(BundleError, match=problem):
        pack(tmp_path / "out", model=model, factory=FACTORY, x=x, y=y + shift)
    assert not (tmp_path / "out").exists()


def test_an_npz_or_csv_loses_its_rows_that_are_not_finite(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[1.0, 2], [np.nan, 0], [3, 4]]), y=np.array([0, 1, 2]))
    (tmp_path / "a.csv").write_text("id,a,y,b,ts\nr,1,0,2,9\ns,,1,0,9\nt,3,2,4,9\n")
    for name in ("a.npz", "a.csv"):
        x, y = read_rows(tmp_path / name)
        assert x.tolist() == [[1, 2], [3, 4]] and y.tolist() == [0, 2]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY", b"nonsense"])
def test_a_damaged_npz_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BundleError, match="a.npz: "):
        read_rows(tmp_path / "a.npz")


def test_a_bare_array_called_npz_is_refused_by_name(tmp_path: Path) -> None:
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(BundleError, match="a.npz: "):
        read_rows(tmp_path / "a.npz")


def test_digests_tell_states_apart_that_differ_in_the_last_bit() -> None:
    one = torch.tensor([1.0], dtype=torch.float64)
    assert digest({"a": one}) == digest({"a": one.clone()}) != digest({"a": one + 2**-52})


def test_an_incomplete_bundle_is_refused_by_inspect(copied: Path) -> None:
    (copied / "calibration.json").unlink()
    with pytest.raises(BundleError, match="calibration.json"):
        inspect(copied)
