"""What every fast adapter must do around every kind of model that it agrees to serve.

    check_adapter("tent", "cnn_bn1d", lr=0.01)

runs every check of ``CHECKS``, each on adapters of its own. A failure names the check.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adapters.fast as fast
from adapters.fast import FastAdapter
from adapters.features import FeatureTap, find_head
from adapters.reference import Reference

K = 4
LONG = os.environ.get("HOMEOSTAT_LONG") == "1"
STEPS = 5000 if LONG else 120
GROWTH_BATCHES = 2000 if LONG else 60


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 12, batch_first=True)
        self.head = nn.Linear(12, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn_bn1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(),
            Last(), nn.Linear(8, K),
        ),
        (3, 16),
    ),
    "cnn_bn2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False),
            nn.ReLU(), Last(), nn.Linear(8, K),
        ),
        (1, 12, 12),
    ),
    "cnn_bn3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), Last(), nn.Linear(4, K)),
        (1, 6, 6, 6),
    ),
    "mlp_bn1d": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, K),
        ),
        (6,),
    ),
    "mlp_ln": (lambda: nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, K)), (6,)),
    "cnn_gn": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), Last(), nn.Linear(8, K)),
        (3, 16),
    ),
    "gru": (Recurrent, (10, 3)),
    "transformer": (Transformer, (10, 3)),
    "mlp_plain": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K)), (6,)),
    "no_linear": (lambda: nn.Sequential(nn.Conv1d(3, K, 3), nn.BatchNorm1d(K), Last()), (3, 16)),
}  # fmt: skip
WITHOUT_BATCH_NORM = {"mlp_ln", "cnn_gn", "gru", "transformer", "mlp_plain"}
WITHOUT_NORM = {"gru", "mlp_plain"}
WITHOUT_HEAD = {"no_linear"}


def build_model(kind: str) -> nn.Module:
    """A model with source statistics that are not those of `batches`."""
    torch.manual_seed(7)
    make, shape = MODELS[kind]
    model = make().train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, *shape))
    return model.eval()


def batches(kind: str, count: int, rows: int = 16, seed: int = 1) -> list[Tensor]:
    """Drifted, class-sorted batches: the mean moves in steps."""
    generator = torch.Generator().manual_seed(seed)
    shape = MODELS[kind][1]
    levels = torch.arange(count) * 8 // max(count, 8) % K
    return [1.5 * torch.randn(rows, *shape, generator=generator) + float(level) for level in levels]


@cache
def reference_for(kind: str, name: str = "none") -> Reference:
    """What packing would store for the model: 64 source rows, and what the method prepares from them."""
    model, shape = build_model(kind), MODELS[kind][1]
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(5))
    head = find_head(model)
    tap = FeatureTap(model, head) if head else None
    with torch.inference_mode():
        outputs = model(x)
    features = tap.features if tap else None
    if tap:
        tap.close()
    y = outputs.argmax(1)
    y[::7] = (y[::7] + 1) % K
    y[:K] = torch.arange(K)  # every class is there
    flat = x.flatten(1)
    reference = Reference(
        input_mean=flat.mean(0),
        input_var=flat.var(0, correction=0),
        feature_mean=None if features is None else features.mean(0).clone(),
        feature_var=None if features is None else features.var(0, correction=0).clone(),
        class_prior=torch.bincount(y, minlength=K) / len(y),
        exemplars_x=x,
        exemplars_y=y,
        entropy=0.5,
        error=0.2,
    )
    method = name.rsplit("+", 1)[-1]
    cls = fast.get(method)
    if cls.check(model, reference) is None or cls.prepare.__func__ is not FastAdapter.prepare.__func__:
        prepared = cls.prepare(model, reference, x, y, **PREPARE.get(method, {}))
        if prepared:
            reference = replace(reference, prepared={method: prepared})
    return reference


PREPARE: dict[str, dict[str, Any]] = {"rna": {"steps": 20}}
"""Options of `prepare` that make it quick."""


@dataclass(frozen=True)
class Subject:
    """One method around one kind of model, to be built as often as a check wants."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        return build_model(self.kind)

    def build(self, model: nn.Module | None = None) -> FastAdapter:
        reference = reference_for(self.kind, self.name)
        return fast.build(self.name, model or self.model(), reference, **self.options)

    def batches(self, count: int, rows: int = 16) -> list[Tensor]:
        return batches(self.kind, count, rows)

    def labels(self, x: Tensor) -> Tensor:
        return torch.arange(len(x)) % K


def run(adapter: FastAdapter, subject: Subject, stream: list[Tensor]) -> list[Tensor]:
    """Outputs for a stream; a method that learns from labels gets those of each batch after it."""
    outputs = []
    for x in stream:
        outputs.append(adapter(x))
        if adapter.labelled:
            adapter.learn(x, subject.labels(x))
    return outputs


def frozen_outputs(model: nn.Module, adapter: FastAdapter, x: Tensor) -> Tensor:
    with torch.inference_mode():
        outputs = model(x)
        return outputs.softmax(1) if adapter.outputs == "probs" else outputs


def same(a: Any, b: Any) -> bool:
    """Equality to the bit of two states; NaN is equal to NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or bool(torch.eq(a, b).logical_or(a.isnan() & b.isnan()).all())
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and same(torch.from_numpy(a), torch.from_numpy(b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def plain(value: Any) -> bool:
    """Whether a state holds only what may be stored without pickle."""
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, bool, str, bytes, Tensor, np.ndarray)


def size(value: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    if isinstance(value, list):
        return sum(map(size, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def live_bytes() -> int:
    """Bytes of storage that tensors in use hold, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def the_given_model_is_never_touched(subject: Subject) -> None:
    model = subject.model()
    model.train()  # the adapter must not depend on it, nor change it
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    adapter = subject.build(model)
    for gain in (1.0, 0.5, 0.0):
        adapter.gain = gain
        run(adapter, subject, subject.batches(3))
    adapter.reset()
    assert same(dict(model.state_dict()), dict(before))
    assert str(model) == structure and model.training and not calls
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def gain_0_is_the_frozen_model_to_the_bit(subject: Subject) -> None:
    model = subject.model()
    adapter = subject.build(model)
    *drifted, last = subject.batches(5)
    run(adapter, subject, drifted)
    adapter.gain = 0.0
    expected = frozen_outputs(model, adapter, last)
    assert torch.equal(adapter.predict(last), expected)
    assert torch.equal(adapter(last), expected)
    assert torch.equal(adapter(last), expected)


def predict_gives_what_forward_will_and_changes_nothing(subject: Subject) -> None:
    for gain in (1.0, 0.4):
        adapter = subject.build()
        adapter.gain = gain
        for x in subject.batches(4):
            before = adapter.state_dict()
            predicted = adapter.predict(x)
            predicted_features = adapter.features
            assert same(adapter.state_dict(), before)
            outputs = adapter(x)
            if adapter.backward:  # without gradients torch picks other kernels for a transformer
                torch.testing.assert_close(predicted, outputs, rtol=1e-5, atol=2e-5)
            else:
                assert torch.equal(predicted, outputs)
            assert (adapter.features is None) == (subject.kind == "no_linear")
            if adapter.features is not None:
                torch.testing.assert_close(adapter.features, predicted_features, rtol=1e-5, atol=2e-5)
                assert not adapter.features.requires_grad and len(adapter.features) == len(x)
            if adapter.labelled:
                adapter.learn(x, subject.labels(x))


def outputs_are_those_before_the_update(subject: Subject) -> None:
    adapter = subject.build()
    run(adapter, subject, subject.batches(3))
    x = subject.batches(4)[-1]
    other = subject.build()
    other.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(other.predict(x), adapter(x), rtol=1e-5, atol=2e-5)


def one_bad_row_gets_nan_and_touches_nothing_else(subject: Subject) -> None:
    for bad in (float("nan"), float("inf")):
        with_row, without_row = subject.build(), subject.build()
        for x in subject.batches(3):
            dirty = torch.cat([x[:5], x[:1], x[5:]])
            dirty[5].view(-1)[0] = bad
            outputs, clean = with_row(dirty), without_row(x)
            assert outputs[5].isnan().all()
            assert torch.equal(outputs[[*range(5), *range(6, len(dirty))]], clean)
            if with_row.features is not None:
                assert with_row.features[5].isnan().all() and len(with_row.features) == len(dirty)
            if with_row.labelled:
                labels = subject.labels(x)
                with_row.learn(dirty, torch.cat([labels[:5], labels[:1], labels[5:]]))
                without_row.learn(x, labels)
            assert same(with_row.state_dict(), without_row.state_dict())


def a_batch_without_usable_rows_changes_nothing(subject: Subject) -> None:
    adapter = subject.build()
    x = subject.batches(1)[0]
    for _ in range(2):  # before the first usable batch, and after
        before = adapter.state_dict()
        for call in (adapter.forward, adapter.predict):
            outputs = call(torch.full_like(x, torch.nan))
            assert outputs.shape == (len(x), K) and outputs.isnan().all()
            assert adapter.features is None or len(adapter.features) == len(x)
            assert call(x[:0]).shape == (0, K)
            assert adapter.features is None or len(adapter.features) == 0
        assert same(adapter.state_dict(), before)
        adapter(x)


def hard_batches_stay_finite(subject: Subject) -> None:
    adapter = subject.build()
    x = subject.batches(1)[0]
    for hard in (x[:1], x[:1].expand_as(x), torch.zeros_like(x), x[:2], 1e4 * x):
        for _ in range(3):
            assert adapter(hard).isfinite().all()
    assert adapter(x).isfinite().all()


def a_long_class_sorted_stream_stays_finite(subject: Subject) -> None:
    adapter = subject.build()
    outputs = run(adapter, subject, subject.batches(STEPS if not subject.options else STEPS // 4, rows=8))
    assert all(bool(output.isfinite().all()) for output in outputs)


def memory_does_not_grow(subject: Subject) -> None:
    """Once every bounded memory is full: what is in use, and the state, are as large as before."""
    adapter = subject.build()
    x, y = subject.batches(1, rows=8)[0], torch.arange(8) % K

    def feed(count: int) -> tuple[int, int]:
        for _ in range(count):
            adapter(x)
            if adapter.labelled:
                adapter.learn(x, y)
        return live_bytes(), size(adapter.state_dict())

    fill = max(GROWTH_BATCHES, 2 * _memory_rows(adapter) // len(x))
    before = feed(fill)
    after = feed(GROWTH_BATCHES)
    assert after[1] <= before[1] and after[0] <= before[0] + 1024


def _memory_rows(adapter: FastAdapter) -> int:
    """Rows that it stores at most: its memory has to be full before growth can be told."""
    bounds = ("capacity", "memory_size", "filter_K", "max_pairs")
    return max((int(getattr(adapter.options, name, None) or 0) for name in bounds), default=0)


def reset_is_construction_to_the_bit(subject: Subject) -> None:
    adapter = subject.build()
    at_start, stream = adapter.state_dict(), subject.batches(4)
    first = run(adapter, subject, stream)
    adapter.reset()
    assert same(adapter.state_dict(), at_start)
    assert all_equal(first, run(adapter, subject, stream))
    adapter.reset(slots=[0])
    assert same(adapter.state_dict(), at_start)
    if not adapter.slotted:
        try:
            adapter.reset(slots=[1])
        except ValueError as error:
            assert "slot 0" in str(error)
        else:
            raise AssertionError("a slot that there is not was reset")


def a_stored_state_goes_on_to_the_bit(subject: Subject) -> None:
    adapter, other = subject.build(), subject.build()
    stream = subject.batches(8)
    adapter.gain = 0.7
    run(adapter, subject, stream[:4])
    stored = adapter.state_dict()
    assert plain(stored)
    expected = run(adapter, subject, stream[4:])
    other.load_state_dict(stored)
    assert other.gain == 0.7
    assert all_equal(expected, run(other, subject, stream[4:]))
    assert same(adapter.state_dict(), other.state_dict())


def a_stored_state_is_a_copy(subject: Subject) -> None:
    adapter = subject.build()
    stored = adapter.state_dict()
    kept = copy.deepcopy(stored)
    run(adapter, subject, subject.batches(3))
    assert same(stored, kept)
    adapter.load_state_dict(stored)
    run(adapter, subject, subject.batches(3))
    assert same(stored, kept)


def two_runs_are_the_same(subject: Subject) -> None:
    one, two = subject.build(), subject.build()
    for x in subject.batches(4):
        assert torch.equal(one(x), two(x, check_finite=False))
    assert same(one.state_dict(), two.state_dict())


def slots_are_separate_or_declared_shared(subject: Subject) -> None:
    adapter = subject.build()
    stream = subject.batches(4)
    slots = torch.arange(len(stream[0])) % 3
    if not adapter.slotted:
        other = subject.build()
        assert all_equal([adapter(x, slots=slots) for x in stream], [other(x) for x in stream])
        return
    if not _several_slots_possible(adapter):
        return
    alone = [subject.build() for _ in range(3)]
    for x in stream:
        predicted, outputs = adapter.predict(x, slots=slots), adapter(x, slots=slots)
        torch.testing.assert_close(predicted, outputs, rtol=1e-5, atol=1e-5)
        for slot, single in enumerate(alone):
            torch.testing.assert_close(outputs[slots == slot], single(x[slots == slot]), rtol=1e-5, atol=1e-5)
    adapter.reset(slots=[1])
    x = stream[0]
    torch.testing.assert_close(adapter.predict(x, slots=[1] * len(x)), subject.build().predict(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.predict(x, slots=[2] * len(x)), alone[2].predict(x), rtol=1e-5, atol=1e-5)


def half_precision_stays_finite_and_out_of_the_state(subject: Subject) -> None:
    """Under bf16 autocast, here on the CPU: statistics and what is learnt keep the precision they have without."""
    model = subject.model()
    adapter, plainly = subject.build(model), subject.build()
    x = subject.batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        adapter.gain = 0.0
        with torch.inference_mode():
            expected = model(x)
        if adapter.outputs == "logits":
            assert torch.equal(adapter.predict(x), expected)
        adapter.gain = 1.0
        outputs = run(adapter, subject, subject.batches(4))
    run(plainly, subject, subject.batches(4))
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert _dtypes(adapter.state_dict()) == _dtypes(plainly.state_dict())


def _dtypes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dtypes(inner) for key, inner in value.items()}
    return value.dtype if isinstance(value, Tensor) else None


def on_a_gpu_the_outputs_are_those_of_the_cpu(subject: Subject) -> None:
    """Where there is one; in full and in half precision, and without waiting for it more than once a batch."""
    if not torch.cuda.is_available():
        return
    reference = reference_for(subject.kind, subject.name).to("cuda")
    here, there, half = subject.build(), None, None
    there = fast.build(subject.name, subject.model().cuda(), reference, **subject.options)
    half = fast.build(subject.name, subject.model().cuda(), reference, **subject.options)
    for x in subject.batches(3):
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-2, atol=1e-2)
        with torch.autocast("cuda", torch.bfloat16):
            assert half(x.cuda()).isfinite().all()


def _several_slots_possible(adapter: FastAdapter) -> bool:
    """Optimisers of the library keep no state per slot."""
    return getattr(adapter.options, "optimizer", "sgd") in ("sgd", "adam")


CHECKS: list[Callable[[Subject], None]] = [
    the_given_model_is_never_touched,
    gain_0_is_the_frozen_model_to_the_bit,
    predict_gives_what_forward_will_and_changes_nothing,
    outputs_are_those_before_the_update,
    one_bad_row_gets_nan_and_touches_nothing_else,
    a_batch_without_usable_rows_changes_nothing,
    hard_batches_stay_finite,
    a_long_class_sorted_stream_stays_finite,
    memory_does_not_grow,
    reset_is_construction_to_the_bit,
    a_stored_state_goes_on_to_the_bit,
    a_stored_state_is_a_copy,
    two_runs_are_the_same,
    slots_are_separate_or_declared_shared,
    half_precision_stays_finite_and_out_of_the_state,
    on_a_gpu_the_outputs_are_those_of_the_cpu,
]


def check_adapter(name: str, kind: str, **options: Any) -> None:
    """Run every check on the method ``name`` around a model of this kind; AssertionError names the check."""
    subject = Subject(name, kind, options)
    for check in CHECKS:
        try:
            check(subject)
        except Exception as error:
            error.add_note(f"{name} on {kind} with {options}: {check.__name__}")
            raise
