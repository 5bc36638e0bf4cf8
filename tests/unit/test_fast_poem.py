from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import adapters.fast as fast
from adapters.fast.core.betting import BET_STATE, EntropyCdf, bet
from adapters.fast.core.losses import softmax_entropy
from tests.unit import blobs

one_thread = blobs.one_thread
GAMMA, CLIP = 1 / (8 * math.sqrt(3)), 1.8


def poem(kind: str = "layer", **options):
    return fast.build("poem", blobs.trained(kind), blobs.reference(kind), **options)


def moved(adapter) -> float:
    return float((adapter._store["theta"] - adapter._adapted.source).norm())


def run(adapter, batches: int, change=lambda x: x, rows: int = 64) -> list[torch.Tensor]:
    return [adapter(change(blobs.rows(rows, seed=1000 + seed)[0])) for seed in range(batches)]


def play(u: np.ndarray) -> np.ndarray:
    """States of bettors (N, 4) after rows u (N, T), one bettor a row."""
    states = np.zeros((len(u), BET_STATE))
    bet(u.T.flatten(), list(range(len(u))) * u.shape[1], states, GAMMA, CLIP)
    return states


# The bet.


def test_without_a_shift_nobody_gets_rich():
    u = np.random.default_rng(0).uniform(size=(2000, 60))
    wealth = np.exp(play(u)[:, 2])
    assert abs(wealth.mean() - 1.0) < 4 * wealth.std() / math.sqrt(len(u))
    states, ever = np.zeros((len(u), BET_STATE)), np.zeros(len(u), dtype=bool)
    for t in range(u.shape[1]):
        bet(u[:, t], list(range(len(u))), states, GAMMA, CLIP)
        ever |= states[:, 2] > math.log(10.0)
    assert ever.mean() <= 0.1


@pytest.mark.parametrize(("low", "high", "sign"), [(0.4, 1.0, 1), (0.0, 0.6, -1)])
def test_under_a_shift_the_bet_goes_the_right_way_and_pays(low: float, high: float, sign: int):
    states = play(np.random.default_rng(0).uniform(low, high, size=(50, 300)))
    assert (np.sign(states[:, 0]) == sign).all()
    assert (states[:, 2] > math.log(100.0)).all()


def test_one_row_is_bet_on_by_the_written_rule():
    states = np.array([[0.5, 0.02, 1.0, 7.0]])
    (moved_to,) = bet(np.array([0.9]), None, states, 0.1, CLIP)
    assert moved_to == pytest.approx(0.25 * 0.81 + 0.75 * 0.9)
    gradient = 0.4 / 1.2
    squares = 0.02 + gradient**2
    expected = [0.5 + 0.1 * gradient / math.sqrt(squares), squares, 1.0 + math.log(1.2), 8.0]
    np.testing.assert_allclose(states[0], expected)


@given(st.lists(st.floats(0.0, 1.0) | st.just(math.nan), max_size=60), st.floats(0.01, 5.0))
def test_bets_are_bounded_and_what_they_ask_for_stays_a_share(u: list[float], gamma: float):
    states = np.zeros((1, BET_STATE))
    given_u = np.array(u, dtype=np.float64)
    moved_to = bet(given_u, None, states, gamma, CLIP)
    assert abs(states[0, 0]) <= CLIP and np.isfinite(states).all()
    assert states[0, 3] == np.isfinite(given_u).sum()
    finite = np.isfinite(given_u)
    assert ((moved_to[finite] >= 0) & (moved_to[finite] <= 1)).all()


def test_rows_of_several_bettors_are_bet_on_apart():
    u = np.random.default_rng(1).uniform(size=40)
    index = (np.arange(40) % 3).tolist()
    together = np.zeros((3, BET_STATE))
    moved_to = bet(u, index, together, GAMMA, CLIP)
    for who in range(3):
        alone, mine = np.zeros((1, BET_STATE)), np.array(index) == who
        np.testing.assert_array_equal(bet(u[mine], None, alone, GAMMA, CLIP), moved_to[mine])
        np.testing.assert_array_equal(alone[0], together[who])


# The distribution of the source's entropies.


@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=30), st.lists(st.floats(0.0, 2.0), max_size=10))
@example([2.225073858507e-311], [5e-324])
def test_the_distribution_rises_from_0_to_1_and_can_be_inverted(source: list[float], others: list[float]):
    cdf = EntropyCdf(torch.tensor(source, dtype=torch.float64), 2.0)
    h = np.sort(np.array([*source, *others]))
    u = cdf(h)
    assert ((u >= 0) & (u <= 1)).all() and (np.diff(u) >= 0).all()
    np.testing.assert_allclose(cdf.inverse(u), h, rtol=0, atol=1e-6)


def test_equal_entropies_lie_in_the_middle_of_their_step():
    cdf = EntropyCdf(torch.tensor([0.0, 0.0, 0.0, 1.0]), 2.0)
    np.testing.assert_allclose(cdf(np.array([0.0, 1.0, 2.0])), [0.375, 0.875, 1.0])


def test_rows_weigh_what_their_class_is_worth():
    cdf = EntropyCdf(torch.tensor([0.5, 1.0]), 2.0, torch.tensor([3.0, 1.0]))
    np.testing.assert_allclose(cdf(np.array([0.5, 1.0])), [0.375, 0.875])


# The adapter.


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_without_a_shift_it_moves_far_less_than_tent_and_under_one_it_adapts(norm: str):
    tent = fast.build("tent", blobs.trained(norm), optimizer="sgd", lr=0.01)
    still, pale = poem(norm, lr=0.01), poem(norm, lr=0.01)
    run(tent, 40), run(still, 40), run(pale, 40, blobs.pale)
    assert moved(still) < 0.1 * moved(tent)
    assert moved(pale) > 4 * moved(still)
    assert float(pale.diagnostics["log_wealth"]) > math.log(1000) > float(still.diagnostics["log_wealth"])
    assert float(pale.diagnostics["epsilon"]) > 0.3 > float(still.diagnostics["epsilon"])


def test_entropies_go_back_to_those_of_the_source_and_answers_get_better():
    x = [blobs.pale(blobs.rows(500, seed=seed)[0]) for seed in range(2)]
    y = [blobs.rows(500, seed=seed)[1] for seed in range(2)]
    adapter = poem(lr=0.2)
    source = float(softmax_entropy(blobs.trained()(blobs.reference().exemplars_x).detach()).mean())

    def apart() -> float:
        return abs(float(softmax_entropy(torch.cat([adapter.predict(part) for part in x])).mean()) - source)

    before, right = apart(), blobs.accuracy([adapter.predict(part) for part in x], y)
    run(adapter, 60, blobs.pale)
    assert apart() < 0.75 * before
    assert blobs.accuracy([adapter.predict(part) for part in x], y) > right + 0.02


def test_overconfidence_is_corrected_too():
    adapter = poem(lr=0.2)
    x = blobs.rows(500, seed=3, noise=0.3)[0]  # nearer to the centres than source rows
    before = float(softmax_entropy(adapter.predict(x)).mean())
    for seed in range(40):
        adapter(blobs.rows(64, seed=1000 + seed, noise=0.3)[0])
    assert float(adapter.diagnostics["epsilon"]) < -0.3
    assert float(softmax_entropy(adapter.predict(x)).mean()) > before


def test_batch_norm_keeps_the_sources_statistics():
    adapter, frozen = poem("batch"), fast.build("none", blobs.trained("batch"))
    x, _ = blobs.rows(32, seed=0)
    torch.testing.assert_close(adapter(blobs.pale(x)), frozen(blobs.pale(x)))


@pytest.mark.parametrize("norm", ["batch", "ema_norm"])
def test_with_other_statistics_the_source_is_measured_with_those_too(norm: str):
    adapter, tent = (
        poem("batch", lr=0.01, norm=norm),
        fast.build("tent", blobs.trained("batch"), optimizer="sgd", lr=0.01),
    )
    run(adapter, 40), run(tent, 40)
    assert abs(float(adapter.diagnostics["epsilon"])) < 0.35
    assert moved(adapter) < 0.1 * moved(tent)


def test_there_are_bets_but_no_steps_in_the_first_rows():
    adapter = poem(lr=0.1, delayed_start=100)
    run(adapter, 3, blobs.pale, rows=33)
    assert moved(adapter) == 0.0 and float(adapter._store["bettor"][0, 3]) == 99
    run(adapter, 1, blobs.pale, rows=33)
    assert moved(adapter) > 0.0


def test_with_several_steps_rows_are_still_bet_on_once():
    once, thrice = poem(lr=0.01, delayed_start=0), poem(lr=0.01, delayed_start=0, steps=3)
    run(once, 1, blobs.pale), run(thrice, 1, blobs.pale)
    assert torch.equal(once._store["bettor"], thrice._store["bettor"])
    assert moved(thrice) > 2 * moved(once)


def test_the_weighted_loss_leaves_out_rows_above_the_margin():
    adapter, without = (poem(lr=0.1, delayed_start=0, weighted=True, e_margin=0.2, momentum=0.0) for _ in range(2))
    x = blobs.pale(blobs.rows(64, seed=0)[0])
    unsure = softmax_entropy(adapter.predict(x)) >= 0.2
    assert 0 < int(unsure.sum()) < len(x)
    x = torch.cat([x[~unsure], x[unsure]])  # bets on the rows that count come first
    adapter(x)
    without(x[: int((~unsure).sum())])
    share = float((~unsure).double().mean())
    step = adapter._store["theta"] - adapter._adapted.source
    torch.testing.assert_close(step, share * (without._store["theta"] - without._adapted.source), rtol=1e-3, atol=1e-7)


def test_exemplars_count_by_the_prior_of_their_class():
    x, y = blobs.rows(256, seed=2)
    one_class = replace(blobs.reference(), class_prior=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    mine = replace(blobs.reference(), exemplars_x=x[y == 0], exemplars_y=y[y == 0])
    states = []
    for reference in (one_class, mine):
        adapter = fast.build("poem", blobs.trained(), reference)
        adapter(x)
        states.append(adapter._store["bettor"])
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("missing", ["reference", "exemplars"])
def test_without_exemplars_it_is_refused(missing: str):
    empty = replace(blobs.reference(), exemplars_x=torch.zeros(0, 6), exemplars_y=torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="use 'eta'"):
        fast.build("poem", blobs.trained(), None if missing == "reference" else empty)
