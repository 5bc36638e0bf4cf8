"""The simulator's own bundle: trained and packed in seconds on the first start, then kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from daemon import __version__
from daemon.settings import ARL0
from daemon.streams.simsource import SimOptions

FACTORY = "daemon.streams.simmodel:build"
_REFERENCE_ROWS, _CALIBRATION_ROWS = 4_096, 16_384


def ensure_bundle(
    state_dir: Path,
    source: str,
    detector: str = "cusum",
    arl0: float = ARL0,
    progress: Callable[[str], None] = lambda text: None,
    fast_name: str = "none",
    features: str | None = None,
) -> Path:
    """The folder of the bundle for this simulator's seed, detector and rate of false alarms; made when not there.

    With what the fast method ``fast_name`` prepares from source rows, if it prepares anything.

    Its rows are drawn from the fresh array: one draw to train on, another as reference, a third to calibrate.
    """
    seed = SimOptions.parse(source).seed
    prepare = _preparing(fast_name)
    watched = [detector, features] if features else [detector]
    path = state_dir / "-".join(["simulator", __version__, f"seed{seed}", *watched, f"{arl0:g}", *prepare])
    if (path / "manifest.json").is_file():
        return path
    make_bundle(path, seed, watch=(detector,), features=features, arl0=arl0, prepare=prepare, progress=progress)
    return path


def _preparing(fast_name: str) -> tuple[str, ...]:
    """The method by name if it has a step at pack time; an unknown one is left to whoever builds it."""
    import adapters.fast as fast

    name = fast_name.rpartition("+")[2]
    try:
        method = fast.get(name)
    except ValueError:
        return ()
    return (name,) if "prepare" in vars(method) else ()


def make_bundle(
    path: Path,
    seed: int,
    *,
    watch: Sequence[str] | None = None,
    features: str | None = None,
    arl0: float = ARL0,
    prepare: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Train the simulator's model and pack it to ``path``; ``watch`` names the detectors of signals to
    calibrate (None: those that every bundle has), ``features`` that of the features.
    """
    from daemon import packing
    from daemon.streams import simmodel
    from daemon.streams.simulator import AgeingArray

    progress("training the simulator's model")
    model = simmodel.build()
    model.load_state_dict(simmodel.train(seed))
    array = AgeingArray(seed)
    x, y = array.source_data(_REFERENCE_ROWS, draw=1)
    packing.pack(
        path,
        model=model.eval(),
        factory=FACTORY,
        x=x,
        y=y,
        calibration=array.source_data(_CALIBRATION_ROWS, draw=2),
        arl0=arl0,
        watch=packing.DETECTORS if watch is None else watch,
        watch_features=features,
        prepare=prepare,
        progress=progress,
    )
