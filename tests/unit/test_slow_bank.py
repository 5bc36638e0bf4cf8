"""Regimes planted in features come back and are found; the bank keeps its bounds and its state to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.slow.bank import CLOSE, Bank, Entry
from adapters.slow.signature import LEAST_ROWS, MOST_ROWS, Signature, distance, signature
from daemon import checkpoint

torch.set_num_threads(1)
D = 16


def window(regime: int, rng: np.random.Generator, rows: int = 160, run: int = 1) -> torch.Tensor:
    """Features of five classes in runs; a regime moves them all, by about a deviation, and correlates them."""
    own = np.random.default_rng(regime)
    centres = np.random.default_rng(99).normal(size=(5, D))
    y = (np.cumsum(rng.integers(1, 5, rows // run + 2)) % 5).repeat(run)[:rows]
    noise = rng.normal(size=(rows, D)) + 0.5 * rng.normal(size=(rows, 1))
    shift = own.normal(size=D) if regime else np.zeros(D)
    return torch.tensor(centres[y] + noise + 1.5 * shift)


def look(regime: int, seed: int, rows: int = 160, run: int = 1) -> Signature:
    found = signature(window(regime, np.random.default_rng([regime, seed]), rows, run))
    assert found is not None
    return found


def delta(value: float, size: int = 4) -> dict[str, torch.Tensor]:
    return {"head.weight": torch.full((size,), value)}


@pytest.mark.parametrize("run", [1, 5])
def test_a_regime_that_comes_back_is_found_and_one_that_is_new_is_not(run: int) -> None:
    bank = Bank(capacity=8, max_bytes=1 << 20)
    for regime in range(6):
        bank.add(delta(float(regime)), look(regime, 0, run=run), {"regime": regime})
    assert len(bank) == 6
    answers = [[bank.nearest(look(regime, seed, run=run)) for seed in range(1, 21)] for regime in range(6)]
    right = [entry is not None and entry.record["regime"] == r for r, row in enumerate(answers) for entry in row]
    assert np.mean(right) >= 0.95
    assert not any(entry and entry.record["regime"] != r for r, row in enumerate(answers) for entry in row)
    strangers = [bank.nearest(look(regime, 1, run=run)) for regime in range(10, 40)]
    assert sum(entry is not None for entry in strangers) == 0


@pytest.mark.parametrize(("rows", "run", "share"), [(160, 1, 0.01), (160, 5, 0.02), (320, 20, 0.06)])
def test_two_windows_of_one_regime_are_rarely_taken_for_two(rows: int, run: int, share: float) -> None:
    apart = [distance(look(0, seed, rows, run), look(0, seed + 1, rows, run)) for seed in range(0, 400, 2)]
    assert np.mean(np.array(apart) > CLOSE) <= share
    assert 0.3 < np.median(apart) < 1.2


def test_a_change_of_spread_alone_is_another_regime() -> None:
    rng = np.random.default_rng(0)
    one, wider = signature(window(0, rng)), signature(window(0, rng) * 2)
    assert one is not None and wider is not None and distance(one, wider) > CLOSE


def test_a_feature_that_never_moves_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    dead = torch.zeros(160, 1, dtype=torch.float64)
    same, again, other = (signature(torch.cat([window(regime, rng), dead], 1)) for regime in (0, 0, 1))
    assert same is not None and again is not None and other is not None
    assert distance(same, again) < CLOSE < distance(same, other)


def test_a_window_of_few_rows_has_no_signature_and_rows_not_finite_do_not_count() -> None:
    features = window(0, np.random.default_rng(0), LEAST_ROWS)
    assert signature(features) is not None
    spoilt = features.clone()
    spoilt[3, 2] = float("nan")
    assert signature(spoilt) is None
    longer = window(0, np.random.default_rng(0), 100)
    spoilt = torch.cat([longer, torch.full((5, D), float("inf"), dtype=torch.float64)])
    found, clean = signature(spoilt), signature(longer)
    assert found is not None and clean is not None and torch.equal(found.mean, clean.mean)
    with pytest.raises(ValueError, match=r"must be \(rows, features\)"):
        signature(torch.zeros(40))


def test_rows_in_runs_are_worth_less() -> None:
    assert look(0, 0, 320, run=1).rows > 200 > look(0, 0, 320, run=20).rows


def test_joined_moments_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    parts = torch.tensor(rng.normal(size=(64, 3))), torch.tensor(rng.normal(size=(64, 3)) + 2)
    one, other = (Signature(part.mean(0), part.var(0, correction=0), 64.0) for part in parts)
    both = torch.cat(parts)
    joined = one.joined(other)
    assert joined.mean.tolist() == pytest.approx(both.mean(0).tolist())
    assert joined.var.tolist() == pytest.approx(both.var(0, correction=0).tolist())
    assert joined.rows == 128 and Signature(one.mean, one.var, MOST_ROWS).joined(other).rows == MOST_ROWS


def test_a_regime_learnt_anew_takes_the_newer_delta_and_keeps_its_uses() -> None:
    bank = Bank(4, 1 << 20)
    first = bank.add(delta(1.0), look(0, 0), {"version": 1})
    assert first is not None
    bank.used(first.number)
    second = bank.add(delta(2.0), look(0, 1), {"version": 2})
    assert second is not None and len(bank) == 1
    assert (second.uses, second.record) == (1, {"version": 2})
    assert torch.equal(bank.entries[0].delta["head.weight"], torch.full((4,), 2.0))
    assert second.signature.rows > first.signature.rows


def test_the_least_used_gives_way_and_of_those_the_one_untouched_for_longest() -> None:
    bank = Bank(3, 1 << 20)
    numbers = []
    for regime in range(3):
        entry = bank.add(delta(regime), look(regime, 0), {"regime": regime})
        assert entry is not None
        numbers.append(entry.number)
    bank.used(numbers[0])
    bank.add(delta(3.0), look(3, 0), {"regime": 3})
    assert [entry.record["regime"] for entry in bank.entries] == [0, 2, 3]
    bank.used(12345)
    assert len(bank) == 3


@pytest.mark.parametrize(
    "bad", [{}, {"w": torch.tensor([1.0, float("nan")])}, {"w": torch.zeros(100_000)}], ids=["empty", "nan", "large"]
)
def test_what_can_not_be_kept_is_refused_and_moves_nothing(bad: dict[str, torch.Tensor]) -> None:
    bank = Bank(3, 100_000)
    bank.add(delta(1.0), look(0, 0), {})
    assert bank.add(bad, look(0, 1), {}) is None
    assert (bank.refused, len(bank)) == (1, 1)
    assert torch.equal(bank.entries[0].delta["head.weight"], torch.full((4,), 1.0))


def test_what_is_kept_does_not_follow_the_tensors_and_the_record_it_was_given() -> None:
    bank = Bank(3, 1 << 20)
    given_delta, record = delta(1.0), {"why": ["drift"]}
    bank.add(given_delta, look(0, 0), record)
    given_delta["head.weight"].zero_()
    record["why"].append("later")
    assert bank.entries[0].delta["head.weight"].tolist() == [1.0] * 4
    assert bank.entries[0].record == {"why": ["drift"]}


def test_features_of_another_model_are_refused() -> None:
    bank = Bank(3, 1 << 20)
    bank.add(delta(1.0), look(0, 0), {})
    other = signature(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    assert other is not None
    with pytest.raises(ValueError, match="signatures of 3 and 16 features"):
        bank.nearest(other)


@pytest.mark.parametrize(("capacity", "max_bytes"), [(0, 1), (1, 0)])
def test_a_bank_without_room_is_refused(capacity: int, max_bytes: int) -> None:
    with pytest.raises(ValueError, match="both must be 1 or more"):
        Bank(capacity, max_bytes)


LOOKS = [[look(regime, seed, 64) for seed in range(2)] for regime in range(6)]
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(1, 60)),
        st.tuples(st.just("used"), st.integers(0, 12), st.just(0)),
    ),
    max_size=25,
)


def play(bank: Bank, calls: list[tuple[str, int, int]]) -> None:
    for place, (call, number, size) in enumerate(calls):
        if call == "add":
            bank.add(delta(float(place), size), LOOKS[number][place % 2], {"regime": number, "gain": 0.1 * place})
        else:
            bank.used(number)
        assert len(bank) <= bank.capacity and bank.bytes <= bank.max_bytes


def plain(entries: tuple[Entry, ...]) -> list[Any]:
    return [
        [
            *(entry.number, entry.uses, entry.touched, entry.record, entry.signature.rows),
            *(tensor.tolist() for tensor in (*entry.delta.values(), entry.signature.mean, entry.signature.var)),
        ]
        for entry in entries
    ]


@settings(max_examples=40, deadline=None)
@given(CALLS, CALLS)
def test_the_bank_keeps_its_bounds_and_goes_on_from_a_checkpoint_to_the_bit(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    bank, other = Bank(3, 1100), Bank(3, 1100)
    play(bank, before)
    other.load_state_dict(checkpoint.decode(checkpoint.encode(bank.state_dict())))
    assert plain(other.entries) == plain(bank.entries)
    for each in (bank, other):
        play(each, after)
    assert plain(other.entries) == plain(bank.entries)
    assert other.refused == bank.refused


def test_a_smaller_bank_keeps_what_it_would_have_kept() -> None:
    bank, smaller = Bank(4, 1 << 20), Bank(2, 1 << 20)
    for regime in range(4):
        bank.add(delta(regime), look(regime, 0), {"regime": regime})
    bank.used(1)
    smaller.load_state_dict(bank.state_dict())
    assert [entry.record["regime"] for entry in smaller.entries] == [0, 3]


def test_tensors_of_any_type_survive() -> None:
    bank, other = Bank(2, 1 << 20), Bank(2, 1 << 20)
    bank.add({"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}, look(0, 0), {"gain_low": float("nan")})
    other.load_state_dict(checkpoint.decode(checkpoint.encode(bank.state_dict())))
    assert other.entries[0].delta["w"].dtype == torch.bfloat16
    assert torch.equal(other.entries[0].delta["w"], bank.entries[0].delta["w"])
