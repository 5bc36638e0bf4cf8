"""Normalisations by name, for gradient methods that are given one."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from adapters.fast.core.followed import Followed
from adapters.fast.core.norm_layers import Mode
from adapters.fast.core.normalisation import Normalisation, SourceStatistics
from adapters.fast.core.slots import SlotStore
from adapters.fast.core.unmix import Unmix


def make_normalisation(name: str, given: dict[str, Any], mode: Mode, store: SlotStore) -> Normalisation:
    """Return the normalisation called ``name`` with the ``given`` options; ValueError when these are wrong."""
    known: dict[str, type[Normalisation]]
    known = {"batch": Normalisation, "source": SourceStatistics, "ema_norm": Followed, "unmix_norm": Unmix}
    kind = known[name]
    try:
        options = kind.Options(**given)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors()]
        names = ", ".join(kind.Options.model_fields) or "none"
        raise ValueError(f"norm_options of {name!r}: {'; '.join(problems)}. Its options are: {names}") from None
    return kind(mode, store, options)
