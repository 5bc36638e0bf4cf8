"""Which dead letters are sent again, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from daemon.dead_letters.progress import MOST_CHARS, Progress
from daemon.errors import StreamError
from daemon.streams.dead_letters import StoredLetter, printable

NOT_SELECTED = "not selected"

_SLACK = 400
"""Characters for those of one reading that the target refuses."""


class Found(NamedTuple):
    """A letter in its store: where it lies, and what it is, or why it can't be read."""

    place: str
    offset: int
    letter: StoredLetter | str


class Store(Protocol):
    """Dead letters as they were written, in the order of each place, up to the end as it was when they were opened."""

    url: str
    progress: dict[str, Progress]

    def open(self, *, again: bool) -> None:
        """Go on after the last call; ``again``: begin with the oldest that is there.

        Raises:
            StreamError: it can't be read.
        """

    def read(self) -> Iterator[list[Found]]:
        """Letters that were not sent yet, a few hundred at a time.

        Raises:
            StreamError: it can't be read any further.
        """

    def save(self) -> None:
        """Make ``progress`` durable.

        Raises:
            StreamError: it can't be noted.
        """

    def close(self) -> None:
        """Give back what is held."""


class Target(Protocol):
    """Where records are sent."""

    url: str

    def open(self) -> None:
        """Make ready.

        Raises:
            StreamError: there is nothing there that can be written to.
        """

    def refuses(self, letter: StoredLetter) -> str | None:
        """Why this record can't be sent there; None: it can."""

    def send(self, letters: list[StoredLetter]) -> dict[int, str]:
        """Send them in order, and see them durable; by index, why some were refused.

        Raises:
            DeliveryError: not durable in time. Any of them may have been sent.
        """

    def close(self) -> None:
        """Give back what is held."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which letters are sent."""

    reasons: frozenset[str] = frozenset()
    """Empty: any."""
    since_s: float | None = None
    """Of the record's own time, in seconds since the epoch; a record without one is in no span of time."""
    until_s: float | None = None
    partition: str | None = None
    """Origin: ``topic/number``, or the number alone."""
    first: int | None = None
    """Least offset at the origin."""
    last: int | None = None
    max_replays: int = 3
    limit: int | None = None

    def why_not(self, letter: StoredLetter) -> str | None:
        """Why the letter is left; None: it is sent."""
        if not self._selects(letter):
            return NOT_SELECTED
        if letter.replays >= self.max_replays:
            return f"replayed {self.max_replays} times or more already (--max-replays)"
        if letter.cut is not None:
            return "too large to be kept in a dead letter: send the record itself again, from its origin"
        return None

    def _selects(self, letter: StoredLetter) -> bool:
        if self.reasons and letter.reason not in self.reasons:
            return False
        if self.partition is not None and self.partition not in (letter.partition, letter.partition.rpartition("/")[2]):
            return False
        if (self.first is not None and letter.offset < self.first) or (
            self.last is not None and letter.offset > self.last
        ):
            return False
        if self.since_s is None and self.until_s is None:
            return True
        time_s = letter.time_s
        return (
            time_s is not None
            and (self.since_s is None or time_s >= self.since_s)
            and (self.until_s is None or time_s < self.until_s)
        )


@dataclass
class Summary:
    """What became of the letters that were looked at."""

    sent: Counter[str] = field(default_factory=Counter)
    """By reason of the letter; in a dry run, what would be sent."""
    left: Counter[str] = field(default_factory=Counter)
    """By why it was left."""
    refused: Counter[str] = field(default_factory=Counter)
    """By what the target said; these are left as well."""

    def lines(self, source: str, target: str, *, dry: bool) -> list[str]:
        """For a terminal."""
        sent, left = self.sent.total(), self.left.total() + self.refused.total()
        lines = [f"{'would send' if dry else 'sent'} {sent} of {sent + left} dead letters of {source} to {target}"]
        lines += [f"  {count:>8}  {printable(reason, 40)}" for reason, count in self.sent.most_common()]
        if left:
            lines.append(f"left {left}")
            lines += [f"  {count:>8}  {printable(why)}" for why, count in (self.left + self.refused).most_common()]
        return lines


def replay(store: Store, target: Target, wanted: Wanted, *, dry: bool, say: Callable[[str], None]) -> Summary:
    """Send what is wanted, and note what was sent: at least once, in the order of each place.

    Each few hundred are durable at the target before they are noted as sent. ``say`` gets a line a letter in a dry run,
    in which nothing is sent or noted.

    Raises:
        StreamError: the store can't be read, or its progress not noted.
        DeliveryError: the target did not take them in time; what was noted is not sent again.
    """
    summary = Summary()
    for found in store.read():
        chosen: list[tuple[Found, StoredLetter]] = []
        room = None if wanted.limit is None else wanted.limit - summary.sent.total()
        for item in found:
            if room is not None and len(chosen) >= room:
                break
            letter = item.letter
            why = letter if isinstance(letter, str) else wanted.why_not(letter) or target.refuses(letter)
            if why is None and isinstance(letter, StoredLetter):
                chosen.append((item, letter))
                store.progress[item.place].sent(item.offset)
            else:
                summary.left[str(why)] += 1
                store.progress[item.place].leave(item.offset)
        if dry:
            for item, letter in chosen:
                say(_line(item, letter))
        elif chosen:
            _check_room(store)
            refused = target.send([letter for _, letter in chosen])
            for at, why in refused.items():
                item = chosen[at][0]
                store.progress[item.place].leave(item.offset)
                summary.refused[why] += 1
            store.save()
            chosen = [pair for at, pair in enumerate(chosen) if at not in refused]
        summary.sent.update(letter.reason for _, letter in chosen)
        if wanted.limit is not None and summary.sent.total() >= wanted.limit:
            break
    return summary


def _check_room(store: Store) -> None:
    """Before anything is sent: what can't be noted as sent would be sent again."""
    for place, progress in store.progress.items():
        try:
            progress.note(MOST_CHARS - _SLACK)
        except ValueError as error:
            raise StreamError(
                f"{store.url}: {place} before offset {progress.next}: {error}, more than can be noted; what was "
                "sent so far is. Send those in between first, without --reason and the like, or begin with --again"
            ) from None


def _line(found: Found, letter: StoredLetter) -> str:
    size = "tombstone" if letter.value is None else f"{len(letter.value)} B"
    try:
        time = (
            "-" if letter.time_s is None else datetime.fromtimestamp(letter.time_s, UTC).isoformat("T", "milliseconds")
        )
    except (OverflowError, ValueError, OSError):
        time = f"{letter.time_s:g}"
    parts = [printable(letter.origin), printable(letter.reason, 40), size, time, f"replays {letter.replays}"]
    return "  ".join([*parts, printable(letter.detail)]).rstrip()
