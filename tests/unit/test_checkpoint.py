"""Snapshots: equal after a round trip, atomic, refused by name when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from daemon.checkpoint import Snapshot, Store, decode, encode, read
from daemon.errors import CheckpointError
from daemon.inspecting import digest

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.bool_, np.uint8]), hnp.array_shapes(max_dims=3, max_side=4)
)
trees = st.recursive(
    plain | arrays, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def snapshot(sequence: int = 1, **state: object) -> Snapshot:
    return Snapshot(sequence, "abc", "hash", {"t/0": 5}, {}, dict(state))


@given(trees)
def test_any_state_tree_is_equal_after_a_round_trip(tree: object) -> None:
    assert digest(decode(encode(tree))) == digest(tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_tensors_keep_type_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    back = decode(encode({"t": tensor}))["t"]
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)


def test_numbers_beyond_64_bits_survive() -> None:
    state = np.random.PCG64(1).state["state"]
    assert decode(encode(state)) == state


def test_restored_arrays_can_be_written_to() -> None:
    back = decode(encode({"a": np.zeros(3)}))
    back["a"][0] = 1.0
    assert back["a"][0] == 1.0


def test_objects_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Path can't be written"):
        encode({"x": Path("/")})


def test_newest_is_used_and_older_ones_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    for number in range(1, 5):
        store.write(snapshot(number, value=number))
    found = store.newest()
    assert found is not None and found.state == {"value": 4}
    assert [path.name for path in store.files()] == ["checkpoint-000000000004.bin", "checkpoint-000000000003.bin"]


def test_an_empty_folder_has_no_snapshot(tmp_path: Path) -> None:
    assert Store(tmp_path).newest() is None


@given(data=st.data())
def test_any_damaged_byte_is_noticed_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = Store(tmp_path_factory.mktemp("checkpoints"))
    store.write(snapshot(1, value="old"))
    path = store.write(snapshot(2, value="new", array=np.arange(20.0)))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = store.newest()
    assert found is not None and found.state == {"value": "old"}
    assert len(store.refused) == 1 and str(path) in store.refused[0]


@given(length=st.integers(0, 80))
def test_a_truncated_file_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    store = Store(tmp_path_factory.mktemp("checkpoints"))
    path = store.write(snapshot(1, array=np.arange(50.0)))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=path.name):
        read(path)


def test_only_damaged_snapshots_stop_the_start(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(snapshot(1)).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="restore one from a backup"):
        store.newest()


def test_a_newer_schema_is_refused_by_version(tmp_path: Path) -> None:
    path = Store(tmp_path).write(snapshot(1))
    content = bytearray(path.read_bytes())
    content[8] = 99
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="schema version 99"):
        read(path)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-000000000007.bin.tmp").write_bytes(b"half")
    store = Store(tmp_path)
    assert list(tmp_path.iterdir()) == [] and store.newest() is None


def test_a_failed_write_leaves_the_older_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write(snapshot(1, value="old"))

    def no_space(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        store.write(snapshot(2, value="new"))
    found = store.newest()
    assert found is not None and found.state == {"value": "old"} and len(list(tmp_path.iterdir())) == 1
