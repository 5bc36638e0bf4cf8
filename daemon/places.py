"""Where a worker keeps and leaves things, by its settings; nothing is opened and nothing heavy imported."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from daemon.errors import SettingsError
from daemon.settings import Settings


def is_simulated(settings: Settings) -> bool:
    """Whether the stream is the embedded one."""
    return settings.source.startswith("sim:")


def dead_letters_url(settings: Settings) -> str:
    """Beside the source where that is Kafka, else a file in the state's folder, which is made.

    Raises:
        SettingsError: the folder can't be made.
    """
    if settings.dead_letters:
        return settings.dead_letters
    if settings.source.startswith("kafka:") and urlsplit(settings.source).path.strip("/"):
        return settings.source.rstrip("/") + ".dead-letters"
    if is_simulated(settings):
        return "null:"
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError([f"HOMEOSTAT_STATE_DIR={settings.state_dir}: {error.strerror}"]) from None
    return f"file:{settings.state_dir / 'dead-letters.jsonl'}"


def checkpoint_folder(settings: Settings) -> Path | None:
    """Where snapshots go; None when there are none."""
    folder = settings.checkpoint.dir
    if folder is not None:
        return None if str(folder) == "off" else folder
    return None if is_simulated(settings) else settings.state_dir / "checkpoints"
