"""The LoRA family: peft's adapters beside the weights of plain models, merged back into plain weights."""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import adapters.slow as slow
from adapters.slow.lora_family.merged import ADAPTER
from adapters.slow.lora_family.targets import find_targets
from adapters.slow.snapshot import Snapshot
from tests.check_adapter import MODELS, K, build_model

pytestmark = pytest.mark.sweep


torch.set_num_threads(1)

KINDS = ["lora", "dora", "vera", "randlora", "oft", "hra", "ia3"]
STARTS = ["default", "pissa", "olora", "eva", "corda", "corda_keep"]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in KINDS),
    *(("lora", {"init": start}) for start in STARTS),
    ("lora", {"alora": True}),
    ("lora", {"plus": 16.0}),
    ("lora", {"freeze_a": True}),
    ("lora", {"selective": True}),
    ("ia3", {"inputs": True}),
]


def rows_of(kind: str, n: int = 96) -> tuple[Tensor, Tensor]:
    shape = MODELS[kind][1]
    y = torch.arange(n) % K
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(3)) + y.reshape(-1, *[1] * len(shape))
    return x, y


def given_of(x: Tensor, y: Tensor, seed: int = 0) -> slow.Given:
    return slow.Given(
        task="classification", seed=seed, draw=lambda n: (x[:n], y[:n]), reference=(x, y), frozen=nn.Identity()
    )


def trained(model: nn.Module, method: slow.SlowMethod, x: Tensor, y: Tensor, **options: Any) -> slow.BurstResult:
    memory = Snapshot(x.numpy(), y.numpy(), x.numpy()[:8], y.numpy()[:8])
    chosen = slow.BurstOptions(**{"steps": 15, "optimizer": "adam", "lr": 0.01, **options})
    return slow.run_burst(model, method, memory, chosen, task="classification", seed=0)


def move(trainee: slow.Trainee, seed: int = 1) -> None:
    """Set what moves well away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in trainee.parameters:
            leaf += 0.3 * torch.randn(leaf.shape, generator=generator)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_the_start_is_the_model_and_the_result_what_was_trained(name: str, options: dict[str, Any], kind: str) -> None:
    model, (x, y) = build_model(kind), rows_of(kind, 24)
    trainee = slow.get(name, **options).begin(model, given_of(x, y))
    with torch.no_grad():
        known = dict(model.named_parameters())
        assert all(torch.equal(value, known[key]) for key, value in trainee.values().items())
        torch.testing.assert_close(trainee.module(x), model(x), rtol=1e-6, atol=1e-6)
        move(trainee)
        answers = trainee.module(x)
        served = slow.apply_delta(model, trainee.values()).eval()(x)
        torch.testing.assert_close(served, answers, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(answers, model(x), atol=1e-3)


@pytest.mark.parametrize("kind", ["cnn_bn1d", "cnn_bn2d", "gru", "transformer"])
@pytest.mark.parametrize("name", KINDS)
def test_a_burst_learns_is_repeatable_and_leaves_the_served_model_alone(name: str, kind: str) -> None:
    model, (x, y) = build_model(kind), rows_of(kind)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    first, second = trained(model, slow.get(name), x, y), trained(model, slow.get(name), x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert first.reason == "done" and first.loss_after < first.loss_before - 0.02
    assert first.delta.keys() == second.delta.keys()
    assert all(torch.equal(first.delta[key], second.delta[key]) for key in first.delta)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["lora", "vera", "randlora", "hra"])
def test_another_seed_draws_another_start(name: str) -> None:
    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    made = []
    for seed in (0, 0, 1):
        trainee = slow.get(name, **({"init": "default"} if name == "lora" else {})).begin(model, given_of(x, y, seed))
        move(trainee)
        made.append(trainee.values()["0.weight"].detach())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


class Averaged(nn.Module):
    def __init__(self, rnn: nn.RNNBase, features: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(features, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(("make", "features"), [
    (lambda: nn.GRU(3, 8, batch_first=True), 8),
    (lambda: nn.LSTM(3, 8, batch_first=True, num_layers=2, bidirectional=True), 16),
    (lambda: nn.LSTM(3, 8, batch_first=True, proj_size=4), 4),
    (lambda: nn.RNN(3, 8, batch_first=True, num_layers=2, dropout=0.5), 8),
])  # fmt: skip
def test_every_weight_of_a_recurrent_layer_moves(make: Callable[[], nn.RNNBase], features: int) -> None:
    torch.manual_seed(0)
    model, (x, y) = Averaged(make(), features).eval(), rows_of("gru")
    delta = trained(model, slow.get("lora", train_head=False), x, y).delta
    assert delta.keys() == {f"rnn.{key}" for key, _ in model.rnn.named_parameters() if key.startswith("weight")}
    assert all(not torch.equal(value, model.get_parameter(key)) for key, value in delta.items())


def test_attention_is_adapted_where_it_is_used_by_its_weights() -> None:
    model, (x, y) = build_model("transformer"), rows_of("transformer")
    delta = trained(model, slow.get("lora"), x, y).delta
    moved = {key for key, value in delta.items() if not torch.equal(value, model.get_parameter(key))}
    assert {"layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight", "layer.linear1.weight"} <= moved


def test_a_layer_answers_as_pefts_own_does() -> None:
    """The same factors in peft's own layers, put into the model in peft's own way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 5, 2), nn.Flatten())
    x = torch.randn(7, 6)
    method = slow.get("lora", rank=2, alpha=3, init="default", train_head=False, head=True)
    items, module = method.build(model, given_of(x, torch.zeros(7)))
    move(method.trainee(items, module))
    own = copy.deepcopy(model)
    peft.LoraModel(own, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "3"]), ADAPTER)
    with torch.no_grad():
        for item, layer in zip(items, (own[0], own[3]), strict=True):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.copy_(method.factor_a(item).reshape(a.shape))
            b.copy_(method.factor_b(item).reshape(b.shape))
        torch.testing.assert_close(module(x), own(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "peft_name", "own"), [
    ("dora", "Lora", {"r": 4, "use_dora": True, "lora_alpha": 4}),
    ("vera", "Vera", {"r": 4}),
    ("randlora", "RandLora", {"r": 4, "randlora_alpha": 16}),
    ("hra", "HRA", {"r": 4}),
    ("ia3", "IA3", {"feedforward_modules": []}),
    ("oft", "OFT", {"r": 0, "oft_block_size": 3, "use_cayley_neumann": False}),
])  # fmt: skip
def test_a_merged_weight_is_the_one_that_peft_merges(name: str, peft_name: str, own: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    options: dict[str, Any] = {"block": 3} if name == "oft" else {} if name == "ia3" else {"rank": 4}
    method = slow.get(name, train_head=False, **options)
    x = torch.randn(7, 6)
    items, module = method.build(model, given_of(x, torch.zeros(7)))
    move(method.trainee(items, module))
    other = nn.Sequential(copy.deepcopy(model[0]))
    tuner = getattr(peft, f"{peft_name}Model")(
        other, getattr(peft, f"{peft_name}Config")(target_modules=["0"], **own), ADAPTER
    )
    moved = {key: leaf for key, leaf in items[0].layer.named_parameters() if "base_layer" not in key}
    with torch.no_grad():
        for key, leaf in other[0].named_parameters():
            if "base_layer" not in key:
                leaf.copy_(moved[key])
        for key in ("vera_A", "vera_B", "randlora_A", "randlora_B"):
            if getattr(items[0].layer, key, None) is not None:
                setattr(other[0], key, getattr(items[0].layer, key))
        merged = tuner.merge_and_unload()[0]
    values = module.weights()
    torch.testing.assert_close(values["0.weight"], merged.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values.get("0.bias", model[0].bias), merged.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "own"), [("pissa", "pissa"), ("olora", "olora")])
def test_a_start_from_the_weights_is_pefts(start: str, own: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    method = slow.get("lora", rank=3, alpha=6, init=start)
    (item,), _ = method.build(model, given_of(torch.zeros(1, 6), torch.zeros(1)))
    other = nn.Sequential(copy.deepcopy(model[0]))
    peft.LoraModel(other, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=own), ADAPTER)
    torch.testing.assert_close(item.offset_RC, other[0].get_delta_weight(ADAPTER), rtol=1e-4, atol=1e-5)


def test_the_head_moves_only_where_it_is_asked_to() -> None:
    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    assert trained(model, slow.get("ia3"), x, y).delta.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert trained(model, slow.get("ia3", train_head=False), x, y).delta.keys() == {"0.weight", "0.bias"}
    adapted = trained(model, slow.get("lora", rank=1, train_head=False, head=True), x, y).delta
    assert adapted.keys() == {"0.weight", "2.weight"}
    assert torch.linalg.matrix_rank(adapted["2.weight"] - model[2].weight, rtol=1e-3) <= 2
    with pytest.raises(ValueError, match="choose one: for head=True give train_head=False"):
        slow.get("lora", head=True)


def test_chosen_layers_alone_are_adapted() -> None:
    model, (x, y) = build_model("mlp_bn1d"), rows_of("mlp_bn1d")
    method = slow.get("lora", layers=["3"], train_head=False)
    assert trained(model, method, x, y).delta.keys() == {"3.weight"}
    assert "did you mean" in (slow.get("lora", layers=["33"]).check(model) or "")
    assert "in 2 to adapt" in (slow.get("lora", layers="2").check(model) or "")


def test_selective_keeps_the_share_with_the_largest_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, K)).eval()
    with torch.no_grad():
        model[3].weight *= 1e-3  # so little comes through that the layers before it have no gradient to speak of
    x, y = rows_of("mlp_plain")
    method = slow.get("lora", selective=True, share=0.25, init="default", train_head=False)
    assert trained(model, method, x, y).delta.keys() == {"3.weight"}
    least = slow.get("lora", selective=True, share=0.01, train_head=False)
    assert len(trained(model, least, x, y).delta) == 1


def test_rates_of_lora_plus_and_a_frozen_a() -> None:
    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    plain = slow.get("lora", plus=16.0).begin(model, given_of(x, y))
    assert [group.rate for group in plain.groups] == [1.0, 16.0, 1.0]
    assert [tuple(group.parameters[0].shape) for group in plain.groups] == [(6, 6), (16, 6), (K, 16)]
    frozen = slow.get("lora", freeze_a=True).begin(model, given_of(x, y))
    assert [tuple(leaf.shape) for leaf in frozen.parameters] == [(16, 6), (K, 16), (K,)]


def test_alora_divides_a_rows_gradient_by_its_norm_up_to_a_cap() -> None:
    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    trainee = slow.get("lora", alora=True, init="default").begin(model, given_of(x, y))
    a, b = (group.parameters[0] for group in trainee.groups[:2])
    for leaf in trainee.parameters:
        leaf.grad = torch.ones_like(leaf)
    trainee.scale_gradients()
    torch.testing.assert_close(b.grad, torch.full_like(b, 10.0))
    torch.testing.assert_close(a.grad[0], (a[0].norm() ** 2 + 0.01).rsqrt().expand(6))
    assert all(bool((leaf.grad == 1).all()) for leaf in trainee.groups[2].parameters)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("lora", {"rank": 0}, "rank is 0; it must be a number, 1 or more"),
    ("lora", {"rank": float("nan")}, "rank is nan"),
    ("lora", {"rank": 2.5}, "rank is 2.5; it must be a whole number"),
    ("lora", {"alpha": 0}, "alpha is 0"),
    ("lora", {"init": "gaussian"}, "init is 'gaussian'; it must be one of default, pissa"),
    ("lora", {"share": 0}, "share is 0"),
    ("lora", {"alora": True, "alpha": 4}, "alora is on, which has no scale"),
    ("lora", {"freeze_a": True, "plus": 4}, "A has no rate then"),
    ("lora", {"ranks": 4}, "did you mean 'rank'"),
    ("hra", {"rank": 7}, "only with an even rank.*give 8, or allow_start_off=True"),
    ("oft", {"block": 1}, "block is 1"),
    ("vera", {"d_initial": 0}, "d_initial is 0"),
    ("randlora", {"alpha": -1}, "alpha is -1"),
])  # fmt: skip
def test_a_wrong_option_is_refused_by_its_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slow.get(name, **options)


def test_a_start_away_from_the_model_is_for_those_who_ask() -> None:
    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    off = slow.get("hra", rank=1, allow_start_off=True).begin(model, given_of(x, y))
    assert not torch.allclose(off.module(x), model(x), atol=1e-2)
    asked = slow.get("hra", rank=2)
    asked.rank = 1  # as a method would that promises more than it holds
    with pytest.raises(ValueError, match="'0.weight' starts .* away from the model.*allow_start_off=True"):
        asked.begin(model, given_of(x, y))


def test_a_model_without_anything_to_adapt_is_refused_with_what_to_use() -> None:
    only_head = nn.Linear(4, 3)
    for name in KINDS:
        method = slow.get(name)
        problem = method.check(only_head)
        assert problem is not None and "use 'head'" in problem
        with pytest.raises(ValueError, match="use 'head'"):
            method.begin(only_head, given_of(torch.zeros(2, 4), torch.zeros(2)))
        assert slow.get(name, head=True, train_head=False).check(only_head) is None
    narrow = nn.Sequential(nn.Conv1d(1, 4, 1), nn.Flatten(), nn.Linear(8, 3))
    assert "of 2 inputs or more" in (slow.get("oft").check(narrow) or "")
    assert slow.get("lora").check(narrow) is None


def test_corda_keep_says_that_it_needs_reference_exemplars() -> None:
    x, y = rows_of("mlp_plain")
    bare = slow.Given(
        task="classification", seed=0, draw=lambda n: (x, y), reference=(x[:0], y[:0]), frozen=nn.Identity()
    )
    with pytest.raises(ValueError, match="needs reference exemplars.*use 'corda'"):
        slow.get("lora", init="corda_keep").begin(build_model("mlp_plain"), bare)


class Tied(nn.Module):
    def __init__(self, tie_head: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        (self.head if tie_head else self.second).weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tie_head", [True, False])
def test_tied_weights_stay_tied(name: str, tie_head: bool) -> None:
    torch.manual_seed(0)
    model = Tied(tie_head).eval()
    x = torch.randn(9, 5)
    trainee = slow.get(name).begin(model, given_of(x, torch.zeros(9)))
    move(trainee)
    served = slow.apply_delta(model, trainee.values())
    assert served.first.weight is (served.head if tie_head else served.second).weight
    torch.testing.assert_close(served(x), trainee.module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", KINDS)
def test_weights_of_another_precision_keep_it_and_train_in_their_own(name: str, dtype: torch.dtype) -> None:
    model, (x, y) = build_model("mlp_plain").to(dtype), rows_of("mlp_plain")
    x = x.to(dtype)
    trainee = slow.get(name).begin(model, given_of(x, y))
    assert all(leaf.dtype in (torch.float32, torch.float64) for leaf in trainee.parameters)
    assert torch.equal(trainee.module(x), model(x))
    move(trainee)
    delta = trainee.values()
    assert {value.dtype for value in delta.values()} == {dtype}
    torch.testing.assert_close(slow.apply_delta(model, delta)(x), trainee.module(x))


@pytest.mark.parametrize("name", KINDS)
def test_dead_channels_and_pruned_weights_stay_finite(name: str) -> None:
    model, (x, y) = build_model("cnn_bn1d"), rows_of("cnn_bn1d")
    with torch.no_grad():
        model[0].weight[2] = 0
    prune.random_unstructured(model[3], "weight", amount=0.5)
    result = trained(model, slow.get(name), x, y)
    assert result.reason == "done" and {"0.weight", "3.weight_orig"} <= result.delta.keys()
    served = slow.apply_delta(model, result.delta).eval()
    with torch.no_grad():
        assert served(x).isfinite().all()
    assert bool((served[3].weight[model[3].weight_mask == 0] == 0).all())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(KINDS),
    groups=st.sampled_from([1, 2, 4]),
    wide=st.integers(1, 3),
    kernel=st.integers(1, 3),
    dimensions=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_convolution_of_any_shape_is_merged_exactly(
    name: str, groups: int, wide: int, kernel: int, dimensions: int, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](4, 4 * wide, kernel, groups=groups, padding=1, stride=2)
    model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(2, 4, *[4] * dimensions)
    model(x)
    method = slow.get(name)
    if method.check(model) is not None:
        assert name in ("oft", "hra") and conv.weight[0].numel() == 1
        return
    trainee = method.begin(model, given_of(x, torch.zeros(2), seed))
    move(trainee, seed)
    torch.testing.assert_close(slow.apply_delta(model, trainee.values())(x), trainee.module(x), rtol=1e-5, atol=1e-5)


def test_a_nan_in_a_gradient_ends_the_burst() -> None:
    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    x[:] = 3e38
    for name in KINDS:
        result = trained(model, slow.get(name), x, y)
        assert result.reason == "non-finite" and result.delta == {}


def test_targets_are_the_matrices_that_can_be_seen() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Embedding(3, 2), nn.GRUCell(5, 2), nn.Linear(8, 2)]
    found = find_targets(nn.Sequential(*layers))
    assert [(t.name, t.rows, t.columns, t.bias) for t in found] == [
        ("0.weight", 8, 18, "0.bias"),
        ("3.weight_ih", 6, 5, "3.bias_ih"),
        ("3.weight_hh", 6, 2, "3.bias_hh"),
    ]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"slow method 'lora' needs the extra: pip install homeostat\[peft\]"):
        slow.get("lora")
    assert slow.get("ln_tuning").name == "ln_tuning"


def test_the_package_is_imported_by_a_burst_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(slow.__file__).parent
    assert not [
        path
        for path in folder.rglob("*.py")
        if re.search(r"^\s*(import|from) (peft|transformers)\b", path.read_text(), re.M)
    ]
    asked = []

    def broken(name: str) -> None:
        asked.append(name)
        raise ImportError("torch is too old")

    model, (x, y) = build_model("mlp_plain"), rows_of("mlp_plain")
    method = slow.get("lora")
    monkeypatch.setattr("adapters.slow.lora_family.merged.importlib.import_module", broken)
    assert method.check(model) is None and asked == []
    with pytest.raises(ValueError, match=r"peft can't be imported \(torch is too old\); run: pip install --upgrade"):
        method.begin(model, given_of(x, y))
    assert asked == ["peft"]


def test_ln_tuning_ends_where_pefts_does() -> None:
    model, (x, y) = build_model("mlp_ln"), rows_of("mlp_ln")
    delta = trained(model, slow.get("ln_tuning", train_head=False), x, y).delta
    assert delta.keys() == {"1.weight", "1.bias"}
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it knows of no layer type but those with inputs and outputs
        peft.LNTuningModel(other, peft.LNTuningConfig(target_modules=["1"]), ADAPTER)
    assert sum(leaf.numel() for leaf in other.parameters() if leaf.requires_grad) == sum(
        map(Tensor.numel, delta.values())
    )
    with torch.no_grad():
        other[1].ln_tuning_layers[ADAPTER].weight.copy_(delta["1.weight"])
        other[1].ln_tuning_layers[ADAPTER].bias.copy_(delta["1.bias"])
    torch.testing.assert_close(slow.apply_delta(model, delta)(x), other(x))
    assert slow.get("ln_tuning").select(model).keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert "use 'norm_affine'" in (slow.get("ln_tuning").check(build_model("mlp_bn1d")) or "")
