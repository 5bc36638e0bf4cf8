"""The simulator's own bundle: trained and packed in seconds on the first start, then kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from daemon import __version__
from daemon.streams.simsource import SimOptions

FACTORY = "daemon.streams.simmodel:build"
_REFERENCE_ROWS, _CALIBRATION_ROWS = 4_096, 16_384


def ensure_bundle(
    state_dir: Path,
    source: str,
    detector: str = "cusum",
    arl0: float = 200_000,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """The folder of the bundle for this simulator's seed, detector and rate of false alarms; made when not there.

    Its rows are drawn from the fresh array: one draw to train on, another as reference, a third to calibrate.
    """
    seed = SimOptions.parse(source).seed
    path = state_dir / f"simulator-{__version__}-seed{seed}-{detector}-{arl0:g}"
    if (path / "manifest.json").is_file():
        return path
    from daemon.packing import pack
    from daemon.streams import simmodel
    from daemon.streams.simulator import AgeingArray

    progress("first start: training the simulator's model")
    model = simmodel.build()
    model.load_state_dict(simmodel.train(seed))
    array = AgeingArray(seed)
    x, y = array.source_data(_REFERENCE_ROWS, draw=1)
    held = array.source_data(_CALIBRATION_ROWS, draw=2)
    pack(path, model=model.eval(), factory=FACTORY, x=x, y=y, calibration=held, watch=(detector,), progress=progress)
    return path
