"""Where a recording comes from: a file, a range of a Kafka topic, or the simulator."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daemon.bundle import Manifest
from daemon.errors import StreamError
from daemon.evaluation.recording import Recording
from daemon.opening import open_label_stream
from daemon.places import is_simulated
from daemon.records import F32, RawBatch
from daemon.settings import Settings
from daemon.streams.codecs import Codec, codec
from daemon.streams.fileio import FileUrl
from daemon.streams.files import FileSource

SIMULATED_ROWS = 20_000
_POLL = 4_096


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which recording, and which part of it."""

    file: Path | None = None
    records: int | None = None
    """The first so many rows; all when None, of the simulator `SIMULATED_ROWS`."""
    first: int | None = None
    """Kafka: offset in each partition to begin at."""
    stop: int | None = None
    """Kafka: offset in each partition to end before."""
    last: int | None = None
    """The newest so many rows."""
    changes: tuple[int, ...] | None = None
    """Rows at which the world changed; None: as the file's array `segment` says."""
    order: str = "native"


@dataclass(frozen=True, slots=True)
class Read:
    """A recording, and what was left out of it."""

    recording: Recording
    unreadable: int = 0
    """Records that could not be decoded: they have no row."""


def read(wanted: Wanted, settings: Settings, manifest: Manifest) -> Read:
    """The recording that is wanted.

    Raises:
        StreamError: naming the file, topic or option, what is wrong, and what to do.
    """
    decoder = codec(settings.codec, tuple(manifest.input_shape), settings.registry)
    ranged = wanted.first is not None or wanted.stop is not None
    if ranged and (wanted.file is not None or not settings.source.startswith("kafka:")):
        raise StreamError("--from and --to are offsets of a kafka:// HOMEOSTAT_SOURCE: else use --records or --last")
    if wanted.file is not None:
        found = _file(wanted.file, settings, manifest, decoder)
    elif settings.source.startswith("kafka:"):
        from daemon.evaluation.reading_kafka import read_range

        raws = read_range(settings, decoder, first=wanted.first, stop=wanted.stop, last=wanted.last)
        found = _of_batches(raws, settings, manifest, decoder, f"HOMEOSTAT_SOURCE={settings.source}")
    elif is_simulated(settings):
        found = Read(_simulated(settings, wanted))
    else:
        raise StreamError(
            f"HOMEOSTAT_SOURCE={settings.source}: give the recording as FILE, or a kafka:// topic or sim:// as source"
        )
    recording = _cut(found.recording, wanted)
    classes = manifest.outputs if manifest.task == "classification" else None
    problem = _problem(recording, classes)
    if problem:
        raise StreamError(f"{recording.name}: {problem}")
    return replace(found, recording=recording)


def _problem(recording: Recording, classes: int | None) -> str | None:
    """Why it can't be replayed."""
    if not len(recording):
        return "no rows"
    if not recording.known.any():
        return (
            "no label: nothing can be scored. A file needs y (npz array, CSV column, JSON field), "
            "or the labels' stream in HOMEOSTAT_LABELS, joined by id"
        )
    if not recording.valid.any():
        return "no row is finite"
    beyond = np.flatnonzero(recording.y >= classes) if classes is not None else np.empty(0, np.int64)
    if len(beyond):
        row = int(beyond[0])
        return f"row {row}: y is {recording.y[row]}, and the bundle's model knows classes 0 to {(classes or 0) - 1}"
    return None


def _cut(recording: Recording, wanted: Wanted) -> Recording:
    """The asked-for rows, in the asked-for order, with the asked-for changes."""
    rows = np.arange(len(recording))
    if wanted.records is not None:
        rows = rows[: wanted.records]
    if wanted.last is not None:
        rows = rows[-wanted.last :]
    if wanted.order == "iid":
        rows = np.random.default_rng(0).permutation(rows)
    moved = tuple(change - int(rows[0]) for change in recording.changes) if len(rows) else ()
    changes = wanted.changes if wanted.changes is not None else moved
    if wanted.order == "iid":
        changes = ()  # shuffled, no row is later than another
    beyond = [change for change in wanted.changes or () if not 0 < change < len(rows)]
    if beyond:
        raise StreamError(f"--changes={beyond[0]}: rows 1 to {len(rows) - 1} of {recording.name} can be changes")
    return Recording(
        x=recording.x[rows],
        y=recording.y[rows],
        times_s=recording.times_s[rows] if wanted.order == "native" else np.arange(len(rows), dtype=np.float64),
        keys=None if recording.keys is None else [recording.keys[row] for row in rows.tolist()],
        changes=tuple(change for change in changes if 0 < change < len(rows)),
        name=recording.name,
    )


def _file(path: Path, settings: Settings, manifest: Manifest, decoder: Codec) -> Read:
    if path.suffix.lower() == ".npz":
        return Read(_npz(path, manifest))
    if not path.is_file():
        raise StreamError(f"{path}: no such file")
    url = FileUrl.parse(f"file:{path}", "FILE")
    source = FileSource(url.url, codec("json", tuple(manifest.input_shape)), variable="FILE")
    source.open(None)
    raws = []
    try:
        while not source.ended:
            if len(raw := source.poll(_POLL, 0.0)):
                raws.append(raw)
    finally:
        source.close()
    return _of_batches(raws, settings, manifest, decoder, str(path), labels=bool(settings.labels))


def _npz(path: Path, manifest: Manifest) -> Recording:
    shape = tuple(manifest.input_shape)
    try:
        # Opened here: of a damaged archive numpy leaves its own file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in ("x", "y", "ts", "segment", "key") if name in data.files}
            has = ", ".join(data.files) or "nothing"
    except FileNotFoundError:
        raise StreamError(f"{path}: no such file") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StreamError(f"{path}: not an npz archive of plain arrays: {error}") from None
    if missing := [name for name in ("x", "y") if name not in arrays]:
        raise StreamError(f"{path}: no array {missing[0]} in it; there are: {has}. x is (N, *shape), y (N,)")
    x, size = arrays["x"], int(np.prod(shape))
    if x.dtype.kind not in "fiub" or x.shape[1:] not in (shape, (size,)):
        raise StreamError(f"{path}: x is {x.dtype} of shape {x.shape}; the model takes rows of {list(shape)}")
    for name, array in arrays.items():
        if name != "x" and array.shape != (len(x),):
            raise StreamError(f"{path}: {name} has shape {array.shape}; x has {len(x)} rows")
    for name, kinds in (("y", "fiub"), ("ts", "fiu")):
        if name in arrays and arrays[name].dtype.kind not in kinds:
            raise StreamError(f"{path}: {name} is {arrays[name].dtype}, not numbers")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and the row is answered as invalid
        rows = x.astype(np.float32).reshape(len(x), *shape)
    keys = arrays.get("key")
    return Recording(
        x=rows,
        y=_labels(arrays["y"].astype(np.float64), manifest.task, path),
        times_s=arrays["ts"].astype(np.float64) if "ts" in arrays else np.arange(len(x), dtype=np.float64),
        keys=None if keys is None else [str(key).encode() for key in keys.tolist()],
        changes=_segments(arrays["segment"]) if "segment" in arrays else (),
        name=str(path),
    )


def _segments(segment: NDArray[np.generic]) -> tuple[int, ...]:
    """Rows at which (N,) segments change."""
    return tuple((np.flatnonzero(segment[1:] != segment[:-1]) + 1).tolist())


def _labels(y: NDArray[np.float64], task: str, where: object) -> NDArray[np.int64] | NDArray[np.float64]:
    """(N,) classes, -1 where unknown, or targets, NaN where unknown."""
    if task == "regression":
        return np.where(np.isfinite(y), y, np.nan)
    finite = np.isfinite(y)
    broken = np.flatnonzero(finite & (y != np.floor(y)))
    if len(broken):
        raise StreamError(f"{where}: row {broken[0]}: y is {y[broken[0]]:g}, and the bundle's model is a classifier")
    return np.where(finite & (y >= 0), np.nan_to_num(y), -1).astype(np.int64)


def _of_batches(
    raws: list[RawBatch], settings: Settings, manifest: Manifest, decoder: Codec, name: str, labels: bool = True
) -> Read:
    """Rows of raw batches, in their order; labels that did not come inside are joined by id, the first for each."""
    decoded = [(raw, raw.batch if raw.batch is not None else decoder.decode(raw)) for raw in raws]
    x: F32 = np.concatenate([np.empty((0, *manifest.input_shape), np.float32), *(batch.x for _, batch in decoded)])
    invalid = ~np.concatenate([np.ones(0, bool), *(batch.valid for _, batch in decoded)])
    x[invalid] = np.nan  # as they were: their x was zeroed when they were refused
    given = [label for _, batch in decoded for label in batch.y]
    if labels and any(label is None for label in given):
        late = _late_labels(settings)
        ids = [identity for _, batch in decoded for identity in batch.ids]
        given = [late.get(identity) if y is None else y for identity, y in zip(ids, given, strict=True)]
    y = np.array([np.nan if label is None else float(label) for label in given], np.float64)
    keys = [raw.keys[row] for raw, batch in decoded for row in batch.rows]
    recording = Recording(
        x=x,
        y=_labels(y, manifest.task, name),
        times_s=np.concatenate([np.empty(0), *(batch.times_s for _, batch in decoded)]),
        keys=keys if any(key is not None for key in keys) else None,
        name=name,
    )
    return Read(recording, sum(len(batch.dead) for _, batch in decoded))


def _late_labels(settings: Settings, patience: Callable[[int], bool] = lambda polls: polls < 100) -> dict[str, float]:
    """Every label of the label stream by id; the first that came counts, as it does for the daemon."""
    source = open_label_stream(settings)
    if source is None:
        return {}
    found: dict[str, float] = {}
    source.open(None)
    try:
        quiet = 0
        while patience(quiet):
            labels = source.poll(0.1)
            quiet = 0 if len(labels) else quiet + 1
            for identity, y in zip(labels.ids, labels.y, strict=True):
                found.setdefault(identity, float(y))
            if not len(labels) and source.at_end():
                break
    finally:
        source.close()
    return found


def _simulated(settings: Settings, wanted: Wanted) -> Recording:
    from daemon.streams.simsource import EPOCH_S, SimOptions
    from daemon.streams.simulator import AgeingArray

    rows = wanted.records or SIMULATED_ROWS
    array = AgeingArray(SimOptions.parse(settings.source).seed)
    x, y = array.rows(0, rows)
    return Recording(
        x=x,
        y=y,
        times_s=EPOCH_S + np.arange(rows, dtype=np.float64),
        changes=tuple(event.row for event in array.schedule(1 + rows // 19_456) if event.row < rows),
        name=settings.source,
    )
