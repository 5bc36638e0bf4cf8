"""`homeostat evaluate`: a recording through all configurations, then the table, the JSON and the page."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from daemon.bundle import Bundle
from daemon.config import load_settings
from daemon.detector_settings import check_calibrated, check_detectors
from daemon.errors import HomeostatError, SettingsError, StreamError
from daemon.evaluation.answers import Frozen, Progress, Replayed
from daemon.evaluation.baselines import FROZEN, REFIT_ROWS, RefusedError, replay_baseline
from daemon.evaluation.configurations import DAEMON, METHODS, Configuration, configurations, relevant
from daemon.evaluation.near import Near, near_future
from daemon.evaluation.reading import Read, Wanted, read
from daemon.evaluation.recording import Plan, Recording, revealed
from daemon.evaluation.replay import replay
from daemon.evaluation.report import Line, Report, as_json, terminal
from daemon.evaluation.score import WINDOW, score
from daemon.evaluation.store import Store, key
from daemon.logs import StatusLine, configure
from daemon.opening import load_bundle


@dataclass(frozen=True, slots=True)
class Request:
    """What to replay and how; see the help of the command."""

    wanted: Wanted = field(default_factory=Wanted)
    plan: Plan = field(default_factory=Plan)
    """Its seed is replaced by each of ``seeds``."""
    seeds: Sequence[int] = (0,)
    methods: Sequence[str] = METHODS
    configurations: Sequence[str] = ()
    refit_rows: int = REFIT_ROWS
    window: int = WINDOW
    state: Path | None = None
    json: Path | None = None
    html: Path | None = None


def evaluate(request: Request) -> int:
    """Run it and print what was found; returns 0.

    Raises:
        HomeostatError: naming the option, the variable or the file, and what to do.
    """
    problems = [
        f"{option}={path}: no such folder"
        for option, path in (("--json", request.json), ("--html", request.html))
        if path is not None and not path.parent.is_dir()
    ]
    if problems:
        raise SettingsError(problems)
    settings = load_settings()
    check_detectors(settings)
    made = configurations(settings, request.methods, request.configurations)
    status = StatusLine(sys.stderr)
    configure(settings.log_level, settings.log_format, status)
    store = Store(request.state or settings.state_dir / "evaluate")
    bundle = load_bundle(settings, status.show)
    check_calibrated(settings, bundle.calibration["detectors"])
    status.show("reading the recording")
    found = read(request.wanted, settings, bundle.manifest)
    status.clear()
    if len(found.recording) < request.plan.batch_rows:
        raise StreamError(
            f"{found.recording.name}: {len(found.recording)} rows, fewer than a batch of {request.plan.batch_rows}: "
            "give more rows, or fewer with --batch"
        )
    report = Session(request, bundle, found, store, status).run(made)
    print(terminal(report), flush=True)
    if request.json is not None:
        _write(request.json, "--json", json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    if request.html is not None:
        from daemon.evaluation.page import page

        _write(request.html, "--html", page(report))
    return 0


class Session:
    """One recording, replayed configuration by configuration."""

    def __init__(self, request: Request, bundle: Bundle, found: Read, store: Store, status: StatusLine) -> None:
        self._request, self._bundle, self._found = request, bundle, found
        self._store, self._status = store, status
        self._recording: Recording = found.recording
        self._digest = self._recording.digest()
        self._near: Near = near_future(self._recording, request.plan.batch_rows)
        self._frozen: Replayed | None = None
        self._done = 0

    def run(self, made: Sequence[Configuration]) -> Report:
        """Replay what is not known yet, write down each result at once, and score all."""
        request, recording = self._request, self._recording
        total = sum(len(self._seeds(each)) for each in made)
        runs: dict[str, list[Replayed] | str] = {}
        reused = 0
        for each in made:
            results: list[Replayed] = []
            for plan in self._plans(each):
                outcome, known = self._one(each, plan, total)
                reused += known
                self._done += 1
                if isinstance(outcome, str):
                    runs[each.name] = outcome
                    break
                results.append(outcome)
            else:
                runs[each.name] = results
            if each.name == FROZEN:
                self._frozen = results[0]
        self._status.clear()
        frozen = self._frozen
        assert frozen is not None
        twin = Frozen(made[0].settings, self._bundle)
        lines = []
        for each in made:
            replays = runs[each.name]
            if isinstance(replays, str):
                lines.append(Line(each.name, each.kind, None, [], replays))
                continue
            found = score(replays, frozen, recording, twin, self._near, window=request.window)
            lines.append(Line(each.name, each.kind, found, replays, None))
        scale = float(self._bundle.calibration["loss_scale"])
        return Report(
            recording=recording,
            task=self._bundle.manifest.task,
            bundle=self._bundle.hash,
            plan=request.plan,
            seeds=list(request.seeds),
            lines=lines,
            near=self._near,
            loss_scale=scale,
            labels=int(revealed(recording, request.plan).sum()),
            unreadable=self._found.unreadable,
            reused=reused,
            total=self._done,
            store=self._store.path,
            window=request.window,
            refit_rows=request.refit_rows,
            twin=twin,
        )

    def _seeds(self, each: Configuration) -> Sequence[int]:
        return self._request.seeds if each.seeded else self._request.seeds[:1]

    def _plans(self, each: Configuration) -> Iterator[Plan]:
        return (replace(self._request.plan, seed=seed) for seed in self._seeds(each))

    def _one(self, each: Configuration, plan: Plan, total: int) -> tuple[Replayed | str, bool]:
        """One configuration with one seed: the result or why it is refused, and whether it was known."""
        known = key(
            each.kind,
            each.name if each.kind != "daemon" else "",
            relevant(each.settings),
            [plan.batch_rows, plan.delay, plan.label_share, plan.seed if each.seeded else 0],
            self._digest,
            self._bundle.hash,
            self._request.refit_rows,
        )
        name = each.name if len(self._request.seeds) < 2 else f"{each.name}, seed {plan.seed}"
        place = f"{self._done + 1} of {total}: {name}"
        if (found := self._store.get(known)) is not None:
            self._say(f"{place}: known from {self._store.path}")
            return found, True
        bar = _Bar(self._status, place, len(self._recording))
        outcome: Replayed | str
        try:
            outcome = self._replay(each, plan, bar.show)
        except RefusedError as error:
            outcome = str(error)
        except HomeostatError as error:
            if each.name == DAEMON:
                raise
            outcome = str(error)
        self._store.put(known, each.name, outcome)
        if isinstance(outcome, str):
            self._say(f"{place}: refused: {outcome}")
        else:
            self._say(f"{place}: {bar.seconds():.1f} s")
        return outcome, False

    def _replay(self, each: Configuration, plan: Plan, progress: Progress) -> Replayed:
        recording, asks = self._recording, self._near.asks
        if each.kind == "daemon":
            return replay(
                each.settings, self._bundle, recording, plan, progress=progress, frozen=self._frozen, asks=asks
            )
        return replay_baseline(
            each.name,
            each.settings,
            self._bundle,
            recording,
            plan,
            refit_rows=self._request.refit_rows,
            progress=progress,
            frozen=self._frozen,
            asks=asks,
        )

    def _say(self, text: str) -> None:
        """A line where there is no terminal; the bar says it all where there is one."""
        if not self._status.active:
            print(f"evaluate: {text}", file=sys.stderr, flush=True)


class _Bar:
    """Progress of one replay on the status line, four times a second."""

    WIDTH = 24

    def __init__(self, status: StatusLine, place: str, rows: int) -> None:
        self._status, self._place, self._rows = status, place, rows
        self._began = self._shown = time.monotonic()

    def show(self, done: int) -> None:
        """Rows done."""
        now = time.monotonic()
        if not self._status.active or now - self._shown < 0.25:
            return
        self._shown = now
        full = self.WIDTH * done // self._rows
        left = (now - self._began) * (self._rows - done) / done
        bar = "█" * full + "·" * (self.WIDTH - full)
        self._status.show(f"{self._place} {bar} {done:,} of {self._rows:,} rows, {left:.0f} s left")

    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began


def _write(path: Path, option: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StreamError(f"{option}={path}: {error}") from None
