"""What a team does without a daemon: all weights trained anew by the clock, and served whatever they are worth."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from daemon.bundle import Bundle
from daemon.evaluation.answers import Frozen, Replayed, answers, empty, same_as_frozen, write_rows
from daemon.evaluation.measure import Stopwatch
from daemon.evaluation.recording import Clock, Plan, Recording, batches
from daemon.records import F32
from daemon.settings import Settings
from daemon.signals import Rows
from tests.streams import sources
from tests.streams.data import I64
from tests.streams.sources import Recipe

EVERY = 500
"""Rows between two trainings at the least."""
TENTH, QUARTER = 10, 4
"""Of a long stream they lie a tenth of it apart; of images, whose training takes minutes, a quarter."""


def rows_between(rows: int, *, images: bool) -> int:
    """Rows of the stream between two trainings."""
    return max(EVERY, rows // (QUARTER if images else TENTH))


def trained(model: nn.Module, recipe: Recipe, x: F32, y: I64) -> nn.Module:
    """``model``, which is not changed, trained on by the recipe that it was made with, on rows x (n, *shape), y (n,).

    Fewer rows than a batch of the recipe are given back untrained.
    """
    if len(y) < recipe.batch:
        return model
    return sources.train(
        replace(
            recipe,
            build=lambda: copy.deepcopy(model).requires_grad_(True),
            rows=lambda part, count: (x, y),
            trained=None,
        )
    )


def replay_refit(
    recipe: Recipe, settings: Settings, bundle: Bundle, recording: Recording, plan: Plan, frozen: Replayed
) -> Replayed:
    """Answer the stream by the latest training; each begins from the packed model.

    It is trained on all labels known by then and the bundle's reference exemplars. The first training comes once there
    is a label.
    """
    twin, result, clock = Frozen(settings, bundle), empty(len(recording)), Clock(recording, plan)
    between = rows_between(len(recording), images=recipe.images)
    reference_x = twin.reference.exemplars_x.cpu().numpy()
    reference_y = twin.reference.exemplars_y.cpu().numpy().astype(np.int64)
    known, learnt, since = np.empty(0, np.int64), 0, 0
    serving, learning, model = Stopwatch(), Stopwatch(), twin.model

    def answer(x: F32) -> Rows:
        with torch.inference_mode():
            return answers(model(twin.upload(x)), twin.kind)

    for part in batches(len(recording), plan.batch_rows):
        known = np.concatenate((known, clock.due(part.start)))
        if part.start - since >= between:
            since = part.start
            if len(known) > learnt:
                learnt = len(known)
                x = np.concatenate((recording.x[known], reference_x))
                y = np.concatenate((recording.y[known].astype(np.int64), reference_y))
                with learning.running():
                    model = trained(twin.model, recipe, x, y)
        rows = np.flatnonzero(recording.valid[part]) + part.start
        with serving.running():
            found = answer(recording.x[rows])
        write_rows(result, rows, found)
        result.adapted[rows] = model is not twin.model
    result.seconds, result.slow_seconds = serving.seconds, learning.seconds
    result.source_error = twin.source_error(lambda x: answer(x).prediction, plan.batch_rows)
    result.frozen_source_error = twin.source_error(lambda x: twin.answer(x).prediction, plan.batch_rows)
    result.same = same_as_frozen(result, frozen)
    return result
