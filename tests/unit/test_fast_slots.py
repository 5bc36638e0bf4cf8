from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters.fast as fast
from adapters.fast.core.slots import SlotStore
from tests.check_adapter import MODELS, Subject, same
from tests.unit.test_fast_check import REFUSED, VARIANTS

pytestmark = pytest.mark.sweep


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on models this small only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


START = {"theta": torch.tensor([1.0, -2.0]), "steps": torch.tensor([0.0], dtype=torch.float64)}
LATE = torch.full((2, 2), torch.nan)


@dataclass
class Plain:
    """What a store should do, slot by slot in a dict."""

    values: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    late: bool = False

    def of(self, slot: int) -> dict[str, Tensor]:
        start = START | ({"late": LATE} if self.late else {})
        return start | self.values.get(slot, {})


def store(resident: int) -> SlotStore:
    made = SlotStore(resident)
    for name, initial in START.items():
        made.add(name, initial)
    return made


def to_the_bit(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(7.5), theirs.nan_to_num(7.5))


def check_open(tested: SlotStore, plain: Plain, slots: list[int], *, keep: bool) -> None:
    groups = tested.open(slots, len(slots), keep=keep)
    ids = sorted(set(slots))
    assert tested.ids == ids and groups.count == len(ids) and groups.rows == len(slots)
    if groups.index is not None:
        assert [ids[k] for k in groups.index.tolist()] == slots
        assert groups.sizes.tolist() == [slots.count(slot) for slot in ids]
    for name in plain.of(ids[0]):
        wanted = torch.stack([plain.of(slot)[name] for slot in ids])
        assert to_the_bit(tested[name], wanted), f"{name} of {ids}"


SLOTS = st.lists(st.integers(-3, 8), min_size=1, max_size=7)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), SLOTS, st.integers(0, 1000)),
        st.tuples(st.just("look"), SLOTS, st.just(0)),
        st.tuples(st.just("forget"), SLOTS, st.just(0)),
        st.tuples(st.just("forget all"), st.just([0]), st.just(0)),
        st.tuples(st.just("add late"), st.just([0]), st.just(0)),
        st.tuples(st.just("store and load"), SLOTS, st.integers(1, 4)),
    ),
    max_size=25,
)


def as_plain(state: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    return {slot: {n: t[k] for n, t in state["tensors"].items()} for k, slot in enumerate(state["slots"])}


@given(steps=STEPS, resident=st.integers(1, 5))
@settings(deadline=None, max_examples=150)
def test_a_store_is_a_dict_of_slots_whatever_is_spilled(steps: list[tuple[str, list[int], int]], resident: int):
    tested, plain = store(resident), Plain()
    for what, slots, number in steps:
        if what == "write":
            check_open(tested, plain, slots, keep=True)
            ids = sorted(set(slots))
            generator = torch.Generator().manual_seed(number)
            new = {name: torch.randn(tested[name].shape, generator=generator) for name in plain.of(0)}
            wanted = torch.rand(len(ids), generator=generator) < 0.8
            before = {name: tested[name].clone() for name in new}
            tested.write(new, wanted)
            for position, slot in enumerate(ids):
                chosen = new if wanted[position] else before
                dtypes = {name: value.dtype for name, value in before.items()}
                plain.values[slot] = {name: chosen[name][position].to(dtypes[name]) for name in new}
        elif what == "look":
            before = tested.state_dict()
            check_open(tested, plain, slots, keep=False)
            assert same(tested.state_dict(), before)
        elif what.startswith("forget"):
            tested.forget(None if what == "forget all" else slots)
            for slot in list(plain.values) if what == "forget all" else slots:
                plain.values.pop(slot, None)
        elif what == "add late":
            tested.add_late("late", LATE)
            plain.late = True
        else:
            state = tested.state_dict()
            order = sorted(range(len(state["slots"])), key=lambda k: (state["slots"][k] * 7 + number) % 5)
            shuffled = {
                "slots": [state["slots"][k] for k in order],
                "tensors": {name: tensor[order] for name, tensor in state["tensors"].items()},
                "late": state["late"],
            }
            tested = store(number)
            tested.load_state_dict(shuffled)
            assert same(tested.state_dict(), shuffled)
            check_open(tested, plain, slots, keep=False)
    stored = as_plain(tested.state_dict())
    assert plain.values.keys() <= stored.keys()
    for slot, values in stored.items():
        assert all(to_the_bit(values[name], plain.of(slot)[name]) for name in plain.of(slot))


@given(batches=st.lists(SLOTS, min_size=1, max_size=12), most=st.integers(2, 6))
@settings(deadline=None, max_examples=50)
def test_no_more_slots_are_remembered_than_asked_for_and_the_oldest_go_first(batches: list[list[int]], most: int):
    tested = SlotStore(2, most)
    tested.add("seen", torch.zeros(1))
    used: dict[int, int] = {}
    for time, slots in enumerate(batches):
        tested.open(slots, len(slots), keep=True)
        tested.write({"seen": torch.ones(len(tested.ids), 1)})
        used.update(dict.fromkeys(tested.ids, time))
    state = tested.state_dict()
    kept = [used.pop(slot) for slot in state["slots"]]
    assert kept == sorted(kept) and min(kept) >= max(used.values(), default=0)
    assert len(kept) <= max(most, *(len(set(slots)) for slots in batches))
    assert (state["tensors"]["seen"] == 1.0).all()


def test_a_slot_that_comes_back_in_time_is_not_the_one_forgotten_for_it():
    tested = SlotStore(2, 3)
    tested.add("value", torch.zeros(1))
    for slot in (1, 2, 3):
        tested.open([slot], 1, keep=True)
        tested.write({"value": torch.full((1, 1), float(slot))})
    tested.open([1, 4], 2, keep=True)  # 1 is the oldest, and back
    assert tested["value"].flatten().tolist() == [1.0, 0.0]
    assert set(tested.state_dict()["slots"]) == {1, 3, 4}


def test_a_state_that_does_not_fit_changes_nothing():
    tested = store(2)
    tested.open([1, 2, 3], 3, keep=True)
    tested.write({"theta": torch.randn(3, 2)})
    before = tested.state_dict()
    slots, tensors = before["slots"], before["tensors"]
    for wrong in (
        before | {"slots": [*slots, 9]},
        before | {"slots": [1, 1, 2]},
        before | {"tensors": tensors | {"theta": torch.zeros(3, 5)}},
        before | {"tensors": tensors | {"unknown": torch.zeros(3)}},
    ):
        with pytest.raises(ValueError, match=r"not|twice|no unknown"):
            tested.load_state_dict(wrong)
        assert same(tested.state_dict(), before)


@pytest.mark.parametrize(
    "slots", [[0.5, 1.0, 2.0, 3.0], [0, 1, 2], [[0, 1, 2, 3]], torch.zeros(4), torch.zeros(4, dtype=torch.complex64), 3]
)
@pytest.mark.parametrize("name", ["norm", "ema_norm", "tent"])
def test_slots_that_are_not_one_integer_a_row_are_refused(name: str, slots: Any):
    adapter = Subject(name, "mlp_bn1d").build()
    before = adapter.state_dict()
    for call in (adapter.forward, adapter.predict):
        with pytest.raises(ValueError, match=r"slots must be \(4,\) integers"):
            call(torch.randn(4, 6), slots=slots)
    assert same(adapter.state_dict(), before)


@pytest.mark.parametrize("name", ["norm", "ema_norm", "unmix_norm", "tent"])
def test_any_integer_is_a_slot(name: str):
    far, near = Subject(name, "mlp_bn1d").build(), Subject(name, "mlp_bn1d").build()
    x = torch.randn(6, 6)
    names, same_names = [-5, 2**62, -(2**62), 2**62, -5, -5], [1, 2, 3, 2, 1, 1]
    for _ in range(2):
        # the order of the slots decides the order of sums, nothing else
        outputs = far(x, slots=torch.tensor(names))
        torch.testing.assert_close(outputs, near(x, slots=torch.tensor(same_names, dtype=torch.int16)))


class RowsLast(nn.Module):
    """Turns (B, T, C) to (T, C, B) before its norm layer: rows are no longer what comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.permute(1, 2, 0)).mean(0).T)


class TimeFlat(nn.Module):
    """Makes (B, T, C) to (B·T, C), each row's values one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.flatten(0, 1)).view(*x.shape).mean(1))


@pytest.mark.parametrize("name", ["norm", "ema_norm", "unmix_norm", "tent"])
def test_a_model_that_mixes_up_the_rows_is_refused_with_slots_and_served_without(name: str):
    adapter = fast.build(name, RowsLast().eval())
    x = torch.randn(5, 7, 4)
    assert "one after the other" in (adapter.check_slots(x) or "")
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="norm the rows of a batch do not come one after the other"):
        adapter(x, slots=[0, 1, 0, 1, 2])
    assert same(adapter.state_dict(), before)
    assert adapter(x).shape == (5, 3)


@pytest.mark.parametrize("name", ["norm", "alpha_norm", "ada_mix_norm", "ema_norm", "unmix_norm", "tent"])
def test_a_row_that_becomes_several_inside_keeps_its_slot(name: str):
    model = TimeFlat().eval()
    shared, alone = fast.build(name, model), [fast.build(name, model) for _ in range(2)]
    for seed in range(3):
        x = torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(seed)) + 1
        slots = torch.tensor([1, 0, 0, 1, 1, 0])
        outputs = shared(x, slots=slots)
        for slot, single in enumerate(alone):
            torch.testing.assert_close(outputs[slots == slot], single(x[slots == slot]), rtol=1e-5, atol=1e-5)


# Every method that keeps slots apart.


SERVED = [
    pytest.param(Subject(name, kind, VARIANTS.get(name, [{}])[0]), id=f"{name}-{kind}")
    for name in fast.names()
    for kind in MODELS
    if fast.get(name).slotted and kind not in REFUSED.get(name, set())
]


@pytest.mark.parametrize("subject", SERVED)
def test_sensors_in_any_order_adapt_as_if_each_were_alone(subject: Subject):
    generator = torch.Generator().manual_seed(3)
    fields = fast.get(subject.name).Options.model_fields
    if subject.kind == "no_linear" and "optimizer" in fields:
        # its outputs are pooled from what a BatchNorm has centred: gradients are rounding, of which Adam makes steps
        subject = replace(subject, options=subject.options | {"optimizer": "sgd"})
    alone = {slot: subject.build() for slot in range(5)}
    shared = [subject.build()]
    if "resident_slots" in fields:
        shared.append(replace(subject, options=subject.options | {"resident_slots": 2}).build())
    for x in subject.batches(5, rows=14):
        slots = torch.randint(0, 5, (14,), generator=generator)
        wanted = None
        for slot in slots.unique().tolist():
            own = alone[slot](x[slots == slot])
            wanted = own.new_empty((14, own.shape[1])) if wanted is None else wanted
            wanted[slots == slot] = own
            if alone[slot].labelled:
                alone[slot].learn(x[slots == slot], subject.labels(x)[slots == slot])
        for adapter in shared:
            torch.testing.assert_close(adapter(x, slots=slots), wanted, rtol=1e-5, atol=1e-5)
            if adapter.labelled:
                adapter.learn(x, subject.labels(x))
    states = [adapter.state_dict()["state"] for adapter in shared]
    if len(states) == 2 and "slots" in states[0]:
        ours, spilled = map(as_plain, states)
        assert ours.keys() == spilled.keys()
        assert all(same(ours[slot], spilled[slot]) for slot in ours)  # to the bit, wherever they waited
