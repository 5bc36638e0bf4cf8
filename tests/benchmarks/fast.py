"""What every fast method costs, as a ratio to the plain forward: ``python -m tests.benchmarks.fast``.

Plain forward (eval, inference mode) and adapter are called in turn on the same rows, in random order within a round;
the ratio is taken round by round and its median shown, with the quartiles in the lines printed on the way. One thread;
on a CPU the clock is the process's own time, which what else runs on the machine does not lengthen.

Extra memory is what torch's allocator is asked for: what the adapter keeps after it was built and called three times,
plus the peak of one call over the peak of a plain forward. On a CPU it is added up from torch's profiler, on a GPU from
its allocator; rows parked in host memory, and what a library keeps outside torch, are not in it.

Slots: the same adapter with a state per sensor, all rows of a batch from different ones of ``--slots`` sensors, over
the adapter with one state. ``--write FILE`` puts the tables between the marks of that file.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import adapters.fast as fast
from adapters.fast import FastAdapter
from tests.benchmarks import fast_readme
from tests.benchmarks.errors import code_version, names, told
from tests.benchmarks.fast_models import KINDS, Made, make
from tests.streams import models as source_models

BATCHES = (1, 16, 64, 256)
MIDDLE_BATCH = 64
"""At which memory, slots and the share of rows kept are measured."""
WANTED = {"norm": 1.3, "tent": 2.6, "lame": 1.2}
"""Geometric mean over the models, at every batch."""
WANTED_SLOTS = 1.5
"""The same for a state per sensor, over one state."""
WARM_UP, FEWEST_ROUNDS = 2, 5
CUMULATIVE = {"eta", "eata"}
"""Their diagnostics count the rows kept since the start, others those of the batch."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One method on one model and batch."""

    method: str
    model: str
    batch: int
    slots: int = 0
    """Sensors; 0: one state."""
    ratio: float
    """Median over the rounds of adapted/plain; with slots, of slotted/shared."""
    low: float
    high: float
    """Quartiles of it."""
    rounds: int
    ms: float
    """Median milliseconds a batch."""
    plain_ms: float
    extra_bytes: int | None = None
    kept: float | None = None
    """Share of the rows that the method learnt from, where it chooses."""
    syncs: int | None = None
    """How often a batch made the host wait for the GPU."""


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler logs every start
    torch.set_num_threads(1)
    costs: list[Cost] = []
    started = time.monotonic()
    counts = {}
    for kind in asked.models:
        made = make(kind)
        gc.collect()
        gc.freeze()  # looking through what is imported at every measurement takes longer than the measurements
        counts[kind] = made.parameters
        print(f"{kind}: {made.parameters:,} parameters", flush=True)
        costs += _of_model(made, asked)
    gc.unfreeze()
    text = report(costs, counts, asked.slots)
    print(f"\n{text}\n\n{wanted_line(costs)}")
    print(f"{time.monotonic() - started:.0f} s, {time.process_time():.0f} s of CPU", file=sys.stderr)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n", encoding="utf-8")
    if asked.write:
        command = " ".join(["python -m tests.benchmarks.fast", *map(shlex.quote, told(sys.argv[1:]))])
        fast_readme.write(asked.write, "bench", f"`{command}`\n\n{text}\n\n{wanted_line(costs)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fast", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", type=names, default=fast.names(), help="also woc+eata and the like")
    parser.add_argument("--models", type=names, default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in names(text)], default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=100, help="most rounds of a pair")
    parser.add_argument("--seconds", type=float, default=0.1, help="end a pair's rounds after this long")
    parser.add_argument("--slots", type=int, default=1_000, help="sensors; 0: no rows for slots")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--write", type=Path, help="file whose tables are to be replaced")
    return parser.parse_args()


def _of_model(made: Made, asked: argparse.Namespace) -> list[Cost]:
    device = torch.device(asked.device)
    model = made.model.to(device)
    costs = []
    for method in asked.methods:
        build = _builder(method, made, device)
        if build is None:
            continue
        extra = extra_bytes(model, build, made.batches(MIDDLE_BATCH, 1)[0].to(device))
        for batch in asked.batches:
            batches = [x.to(device) for x in made.batches(batch, 8)]
            costs.append(_cost(model, build, batches, asked, method, made.kind, extra))
            _show(costs[-1])
            if asked.slots and build().slotted and batch == MIDDLE_BATCH:
                costs.append(_slots_cost(build, batches, asked, method, made.kind))
                _show(costs[-1])
    return costs


def _builder(method: str, made: Made, device: torch.device) -> Callable[[], FastAdapter] | None:
    """How to build the method around the model; None where it can't serve it."""
    cls, known = fast.get(method), made.reference.to(device)
    x, y = made.x.to(device), made.y.to(device)
    for part in method.split("+"):
        if source_models.prepares(fast.get(part)):
            stem = f"bench-{made.kind}-{part}-{code_version(part)}"
            known = source_models.prepared_from(x, y, made.model, known, fast.get(part), stem)
    ready = known.to(device)
    return None if cls.check(made.model, ready) else lambda: cls(made.model, ready)


def _cost(
    model: torch.nn.Module, build: Callable[[], FastAdapter], batches: list[Tensor], asked: argparse.Namespace,
    method: str, kind: str, extra: int,
) -> Cost:  # fmt: skip
    @torch.inference_mode()
    def plain(x: Tensor) -> Tensor:
        outputs: Tensor = model(x)
        return outputs

    adapter = build()
    plain_ms, ms = paired(plain, adapter, batches, asked.rounds, asked.seconds)
    low, ratio, high = _quartiles(plain_ms, ms)
    return Cost(
        method=method, model=kind, batch=len(batches[0]), ratio=ratio, low=low, high=high, rounds=len(ms),
        ms=statistics.median(ms), plain_ms=statistics.median(plain_ms), extra_bytes=extra,
        kept=_kept(build(), batches, method), syncs=_syncs(adapter, batches[0]),
    )  # fmt: skip


def _slots_cost(
    build: Callable[[], FastAdapter], batches: list[Tensor], asked: argparse.Namespace, method: str, kind: str
) -> Cost:
    shared, slotted = build(), build()
    batch = len(batches[0])
    everyone = torch.randperm(asked.slots, generator=torch.Generator().manual_seed(0))
    groups = [group for group in everyone.split(batch) if len(group) == batch] or [everyone.repeat(batch)[:batch]]
    for group in everyone.split(256):  # every sensor has been seen before the clock runs
        slotted(batches[0][:1].expand(len(group), *batches[0].shape[1:]).clone(), slots=group)
    position = iter(range(10**9))

    def with_slots(x: Tensor) -> Tensor:
        return slotted(x, slots=groups[next(position) % len(groups)])

    shared_ms, ms = paired(shared, with_slots, batches, asked.rounds, asked.seconds)
    low, ratio, high = _quartiles(shared_ms, ms)
    return Cost(
        method=method, model=kind, batch=batch, slots=asked.slots, ratio=ratio, low=low, high=high, rounds=len(ms),
        ms=statistics.median(ms), plain_ms=statistics.median(shared_ms),
    )  # fmt: skip


def paired(
    one: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    batches: list[Tensor],
    rounds: int,
    seconds: float,
) -> tuple[list[float], list[float]]:
    """Milliseconds of both calls on the same rows, round by round, in random order within a round."""
    rng = random.Random(0)
    clock = _device_clock if batches[0].is_cuda else time.process_time
    for x in batches[:WARM_UP]:
        one(x)
        other(x)
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        deadline = clock() + seconds
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and clock() > deadline:
                break
            x = batches[number % len(batches)]
            for which in rng.sample((0, 1), 2):
                before = clock()
                (one, other)[which](x)
                times[which].append(1e3 * (clock() - before))
    finally:
        gc.enable()
    return times


def _device_clock() -> float:
    """Seconds, once the GPU has done all it was asked for."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _quartiles(plain_ms: list[float], ms: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles([b / a for a, b in zip(plain_ms, ms, strict=True)], n=4)
    return low, middle, high


def _kept(adapter: FastAdapter, batches: list[Tensor], method: str) -> float | None:
    """Share of rows that the method learns from, where its diagnostics say so; at one size of batch."""
    counts: list[int] = []
    if len(batches[0]) != MIDDLE_BATCH:
        return None
    for x in batches:
        adapter(x)
        selected = adapter.diagnostics.get("selected")
        if selected is None:
            return None
        counts.append(int(selected.sum()) if selected.dtype == torch.bool else int(selected.flatten()[-1]))
    kept = counts[-1] if CUMULATIVE & set(method.split("+")) else sum(counts)
    return kept / sum(map(len, batches))


def _syncs(adapter: FastAdapter, x: Tensor) -> int | None:
    """How often one batch, known to be finite, makes the host wait; None on a CPU."""
    if not x.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapter(x, check_finite=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def extra_bytes(model: torch.nn.Module, build: Callable[[], FastAdapter], x: Tensor) -> int:
    """Bytes that the adapter keeps, plus the peak of one call over the peak of a plain forward."""
    made: list[FastAdapter] = []

    @torch.inference_mode()
    def plain() -> None:
        model(x)

    def use() -> None:
        made.append(build())
        for _ in range(3):
            made[0](x)

    measure = _cuda_memory if x.is_cuda else _cpu_memory
    plain()
    kept = measure(use)[1]
    return kept + measure(lambda: made[0](x))[0] - measure(plain)[0]


def _cuda_memory(call: Callable[[], object]) -> tuple[int, int]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def _cpu_memory(call: Callable[[], object]) -> tuple[int, int]:
    """Highest and last sum of the bytes allocated and freed, in the order of the profiler's events."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # The trace as JSON, which says the same, takes a hundred times as long as the call.
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def _show(cost: Cost) -> None:
    parts = [f"{cost.ratio:6.2f} ({cost.low:.2f} to {cost.high:.2f}, {cost.rounds} rounds) {cost.ms:9.3f} ms"]
    if cost.extra_bytes is not None:
        parts.append(f"{cost.extra_bytes / 2**20:8.2f} MiB more")
    if cost.kept is not None:
        parts.append(f"{cost.kept:.0%} of the rows kept")
    if cost.syncs is not None:
        parts.append(f"{cost.syncs} waits")
    name = f"{cost.method}, {cost.slots} slots" if cost.slots else cost.method
    print(f"  {name:26} batch {cost.batch:4}: {', '.join(parts)}", flush=True)


def report(costs: list[Cost], parameters: dict[str, int], slots: int) -> str:
    """All tables, as Markdown."""
    shared = [cost for cost in costs if not cost.slots]
    kinds, methods = list(parameters), list(dict.fromkeys(cost.method for cost in costs))
    batches = sorted({cost.batch for cost in shared})
    at = {(c.method, c.model, c.batch): c for c in shared}
    middle = MIDDLE_BATCH if MIDDLE_BATCH in batches else batches[-1]
    listed = ", ".join(f"{kind} {count:,}" for kind, count in parameters.items())
    parts = [f"Parameters: {listed}.", f"Time of a batch of {middle} over that of the plain forward:"]
    rows = [[m, *(_number(at.get((m, kind, middle)), "ratio") for kind in kinds)] for m in methods]
    parts.append(fast_readme.table(["method", *kinds], rows))
    parts.append(
        "By batch, geometric mean over the models that the method serves; the share of rows kept, where it chooses:"
    )
    by_batch = [
        [m, *(_mean_text(geometric_mean(shared, m, b)) for b in batches), _kept_text(shared, m)] for m in methods
    ]
    parts.append(fast_readme.table(["method", *(f"batch {b}" for b in batches), "kept"], by_batch))
    parts.append(f"Extra memory in MiB at a batch of {MIDDLE_BATCH}:")
    rows = [[m, *(_memory(at.get((m, kind, middle))) for kind in kinds)] for m in methods]
    parts.append(fast_readme.table(["method", *kinds], rows))
    if slotted := [cost for cost in costs if cost.slots]:
        parts.append(
            f"A state for each of {slots:,} sensors, every row of a batch of {middle} another sensor's, over one state:"
        )
        at = {(c.method, c.model, c.batch): c for c in slotted}
        wide = list(dict.fromkeys(cost.method for cost in slotted))
        rows = [[m, *(_number(at.get((m, kind, middle)), "ratio") for kind in kinds)] for m in wide]
        parts.append(fast_readme.table(["method", *kinds], rows))
    return "\n\n".join(parts)


def geometric_mean(costs: Iterable[Cost], method: str, batch: int) -> float | None:
    """Of the ratios over all models at one batch; None without any."""
    ratios = [cost.ratio for cost in costs if cost.method == method and cost.batch == batch and not cost.slots]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def _number(cost: Cost | None, field: str) -> str:
    return "–" if cost is None else f"{getattr(cost, field):.2f}"


def _mean_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _memory(cost: Cost | None) -> str:
    return "–" if cost is None or cost.extra_bytes is None else f"{cost.extra_bytes / 2**20:.2f}"


def _kept_text(costs: list[Cost], method: str) -> str:
    shares = [cost.kept for cost in costs if cost.method == method and cost.kept is not None]
    return f"{statistics.mean(shares):.0%}" if shares else ""


def wanted_line(costs: list[Cost]) -> str:
    """What was wanted of which method, and whether it is so at every batch."""
    found = []
    for method, wanted in WANTED.items():
        means = {b: geometric_mean(costs, method, b) for b in sorted({cost.batch for cost in costs})}
        values = {batch: mean for batch, mean in means.items() if mean is not None}
        if not values:
            continue
        batch = max(values, key=lambda batch: values[batch])
        verdict = "reached" if values[batch] <= wanted else "not reached"
        found.append(f"{method} <= {wanted}: {verdict} ({values[batch]:.2f} at batch {batch})")
    for method in WANTED:
        slotted = [cost.ratio for cost in costs if cost.method == method and cost.slots]
        if slotted:
            mean = math.exp(statistics.mean(map(math.log, slotted)))
            verdict = "reached" if mean <= WANTED_SLOTS else "not reached"
            found.append(f"{method} with slots <= {WANTED_SLOTS} of shared: {verdict} ({mean:.2f})")
    return f"wanted: {', '.join(found) or 'nothing of these methods'}"


if __name__ == "__main__":
    main()
