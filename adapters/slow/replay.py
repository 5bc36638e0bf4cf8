"""The replay memory: the newest rows, a balanced rest, and reference exemplars that are never evicted."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from adapters.slow.rows import Array, Rows, Screen
from adapters.slow.snapshot import Mix, Snapshot, gather
from adapters.slow.store import Store, fits_half, half_serves
from adapters.slow.strata import Codes, Pruning


class Replay:
    """Bounded memory of labelled rows, on the host.

    The newest ``round(recent_share * capacity_rows)`` rows are always held. The others are kept in balance, so that
    neither a class that the stream has not shown for long nor a rare way of being of that class is forgotten: when the
    memory is full, an eighth of them gives way at once, first from the largest strata (class and segment), in these
    from the fullest clusters of inputs, in these from the fullest octaves of age (`adapters.slow.strata`).

    Reference exemplars come on top of ``capacity_rows``, are never evicted and are not part of the state: they belong
    to the bundle. Rows with a value that is not finite or a label that is not a class are dropped and counted. What is
    held does not depend on how the rows came in batches.

    Args:
        input_shape: shape of one input.
        capacity_rows: most rows kept, reference exemplars not counted.
        classes: number of classes; None for regression, whose strata are the segments alone.
        seed: of the evictions.
        reference_x: (r, *input_shape) exemplars; None for none.
        reference_y: (r,) their labels.
        recent_share: share of the capacity that holds the newest rows.
        max_bytes: most memory for the rows and the exemplars together; it lowers ``capacity_rows``.
        half: keep inputs as float16 while that loses nothing that counts (`half_serves`), else as float32.
        clusters: clusters of inputs, over all strata; 1 for none.
        horizon_rows: age in rows beyond which rows leave as soon as room is needed, for streams whose labels change
            their meaning; None: none is too old.
        recency: share of a draw that comes from the newest rows alone.
        balance: from 0, every row held is as likely in a draw, to 1, every class held is.
        pinned: whether a snapshot's batches come in page-locked memory, when there is CUDA.

    Raises:
        ValueError: a number is out of range, the shapes do not fit, or a reference exemplar is unusable.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        capacity_rows: int,
        *,
        classes: int | None,
        seed: int,
        reference_x: ArrayLike | None = None,
        reference_y: ArrayLike | None = None,
        recent_share: float = 0.5,
        max_bytes: int | None = None,
        half: bool = False,
        clusters: int = 32,
        horizon_rows: int | None = None,
        recency: float = 0.0,
        balance: float = 0.0,
        pinned: bool = False,
    ) -> None:
        for name, value in (("capacity_rows", capacity_rows), ("clusters", clusters), ("horizon_rows", horizon_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if not 0 <= recent_share <= 1:
            raise ValueError(f"recent_share is {recent_share}; it must be in [0, 1]")
        if balance and classes is None:
            raise ValueError(f"balance is {balance}; it is for classification: regression has no classes to balance")
        self._screen = Screen(input_shape, classes)
        self._reference = self._screen.empty(0)
        if reference_x is not None and reference_y is not None:
            self._reference = self._screen(reference_x, reference_y)
            if lost := len(np.asarray(reference_y)) - len(self._reference.y):
                raise ValueError(f"{lost} reference exemplars are not finite or have no valid label; pack them again")
        elif reference_x is not None or reference_y is not None:
            raise ValueError("reference_x and reference_y go together; give both or neither")
        self.dropped = 0
        """Rows refused so far: not finite, or a label that is not a class."""
        self._mix = Mix(recency=recency, balance=balance)
        self._pinned = pinned and torch.cuda.is_available()
        self._recent_share, self._horizon = recent_share, horizon_rows
        self._asked_rows, self._max_bytes = capacity_rows, max_bytes
        self._codes = Codes(self._reference.x)
        self._arrived = 0
        self._pruning = Pruning(clusters, self._codes.width, seed)
        self._half_asked = half and half_serves(self._reference.x)
        self._empty(self._half_asked)

    def _empty(self, half: bool) -> None:
        """Start without rows, as many as the bytes allow."""
        row = self._screen.empty(1)
        row_bytes = Store.row_bytes(row, self._codes.width, half=half)
        self.capacity_rows = self._asked_rows
        """Most rows kept."""
        if self._max_bytes is not None:
            taken = sum(array.nbytes for array in self._reference)
            self.capacity_rows = min(self._asked_rows, (self._max_bytes - taken) // row_bytes)
            if self.capacity_rows < 1:
                raise ValueError(
                    f"max_bytes is {self._max_bytes}; the reference exemplars take {taken} and one row {row_bytes}: "
                    "allow more, or pack fewer exemplars"
                )
        self._recent_rows = round(self._recent_share * self.capacity_rows)
        self._store = Store(row, self.capacity_rows, self._codes.width, half=half)
        self._order = np.zeros(0, np.int64)  # Slots of the store, by arrival.
        self._free = np.arange(self.capacity_rows)[::-1].copy()

    def __len__(self) -> int:
        """Rows held, reference exemplars not counted."""
        return len(self._order)

    @property
    def reference_rows(self) -> int:
        """Number of protected reference exemplars."""
        return len(self._reference.y)

    @property
    def reference_x(self) -> Array:
        """(r, *input_shape) protected reference exemplars."""
        return self._reference.x

    @property
    def reference_y(self) -> Array:
        """(r,) their labels."""
        return self._reference.y

    @property
    def bytes(self) -> int:
        """Host memory of the rows and the reference exemplars, taken at construction.

        It grows once at most, when a row comes that half precision can't hold, and not beyond ``max_bytes``.
        """
        return self._store.bytes + sum(array.nbytes for array in self._reference)

    @property
    def arrived(self) -> int:
        """Rows taken so far."""
        return self._arrived

    @property
    def half(self) -> bool:
        """Whether inputs are kept as float16."""
        return self._store.half

    def add(self, x: ArrayLike, y: ArrayLike, segment: ArrayLike = 0) -> int:
        """Take in rows, oldest first.

        Args:
            x: (n, *input_shape).
            y: (n,) classes or targets.
            segment: one stratum for all rows, or (n,).

        Returns:
            int: rows taken; the others are counted in ``dropped``.

        Raises:
            ValueError: the shapes do not fit.
        """
        rows = self._screen(x, y, segment)
        self.dropped += len(np.asarray(y)) - len(rows.y)
        if len(rows.y):
            if self.half and not fits_half(rows.x):
                self._widen()
            arrival = np.arange(self._arrived, self._arrived + len(rows.y))
            self._arrived += len(rows.y)
            self._insert(rows, arrival, self._codes(rows.x))
        return len(rows.y)

    def _insert(self, rows: Rows, arrival: NDArray[np.int64], codes: NDArray[np.float32]) -> None:
        start = 0
        while start < len(rows.y):
            if not len(self._free):
                self._prune(int(arrival[start]), len(rows.y) - start)
            stop = min(len(rows.y), start + len(self._free))
            self._free, slots = np.split(self._free, [len(self._free) - (stop - start)])
            part = slice(start, stop)
            self._store.write(slots, Rows(*(column[part] for column in rows)), arrival[part], codes[part])
            self._order = np.concatenate((self._order, slots))
            start = stop

    def _prune(self, now: int, coming: int) -> None:
        """Make room in the full memory for the row number ``now`` and the ones that follow."""
        balanced = self.capacity_rows - self._recent_rows
        # With the row that comes, these are the newest ones.
        bound = len(self._order) - max(self._recent_rows - 1, 0)
        if not balanced:
            kept = np.arange(min(coming, len(self._order)), len(self._order))
        else:
            # Rows beyond the horizon are the first ones: the order is that of arrival.
            late = 0
            if self._horizon is not None:
                late = int((now - self._store.arrival[self._order[:bound]] > self._horizon).sum())
            keep = min(bound - late, bound - max(1, balanced // 8))
            kept = np.arange(late, bound)
            if keep < len(kept):
                kept = late + self._survivors(self._order[late:bound], now, keep)
            kept = np.concatenate((kept, np.arange(bound, len(self._order))))
        gone = np.delete(self._order, kept)
        self._free, self._order = gone[::-1].copy(), self._order[kept]

    def _survivors(self, slots: NDArray[np.int64], now: int, keep: int) -> NDArray[np.int64]:
        store, unit = self._store, self.capacity_rows
        label = np.zeros_like(slots) if self._screen.classes is None else store.y[slots]
        columns = label, store.segment[slots], store.arrival[slots], store.codes[slots]
        return self._pruning(*columns, now=now, unit=unit, keep=keep)

    def _widen(self) -> None:
        """Go over to float32 for good, with as many of the rows as fit."""
        rows, arrival, codes = self.rows(), self._store.arrival[self._order], self._store.codes[self._order]
        self._empty(half=False)
        self._insert(rows, arrival, codes)

    def sample(self, rng: np.random.Generator, n: int, reference_share: float) -> tuple[Array, Array]:
        """Draw ``n`` rows with replacement: x (n, *input_shape) float32 and y (n,).

        ``round(n * reference_share)`` of them are reference exemplars; all are while the memory has no rows of its
        own, none are when there are no exemplars.

        Raises:
            ValueError: there is nothing to draw from.
        """
        y = self._store.y[self._order]
        drawn = self._mix.draw(rng, n, reference_share, y, self._recent, self.reference_rows)
        drawn = drawn._replace(own=self._order[drawn.own])
        return gather(drawn, (self._store.x, self._store.y), (self._reference.x, self._reference.y), pinned=False)

    @property
    def _recent(self) -> int:
        return min(len(self), self._recent_rows)

    def rows(self) -> Rows:
        """Copies of all rows held, oldest first, reference exemplars not among them."""
        store = self._store
        x = store.x[self._order].astype(np.float32, copy=False)
        return Rows(x, store.y[self._order], store.segment[self._order])

    def snapshot(self) -> Snapshot:
        """A copy to draw from in another thread; the reference exemplars are shared, as nothing ever writes them."""
        return Snapshot(
            self._store.x[self._order],
            self._store.y[self._order],
            self._reference.x,
            self._reference.y,
            self._recent,
            self._mix,
            self._pinned,
        )

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a state to fit: the sizes, and the exemplars' checksum."""
        crc = zlib.crc32(self._reference.y.tobytes(), zlib.crc32(self._reference.x.tobytes()))
        return {
            "capacity_rows": self._asked_rows,
            "recent_rows": round(self._recent_share * self._asked_rows),
            "max_bytes": self._max_bytes,
            "half_asked": self._half_asked,
            "reference_crc": crc,
        }

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rows held and all that later evictions hang on; without the reference exemplars."""
        return {
            **self._fingerprint(),
            **self._store.read(self._order),
            "arrived": self._arrived,
            "dropped": self.dropped,
            "half": self.half,
            "pruning": self._pruning.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            ValueError: the state is of a memory of another size, input shape or with other reference exemplars.
        """
        for name, own in self._fingerprint().items():
            if state.get(name) != own:
                raise ValueError(
                    f"the saved replay memory has {name} {state.get(name)}, this one {own}; start it empty"
                )
        if state["x"].shape[1:] != self._screen.input_shape:
            raise ValueError(
                f"the saved replay memory holds inputs of shape {state['x'].shape[1:]}, "
                f"this one {self._screen.input_shape}; start it empty"
            )
        self._empty(state["half"])
        self._insert(Rows(state["x"], state["y"], state["segment"]), state["arrival"], state["codes"])
        self._arrived, self.dropped = state["arrived"], state["dropped"]
        self._pruning.load_state_dict(state["pruning"])
