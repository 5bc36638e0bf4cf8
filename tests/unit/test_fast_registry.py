from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import adapters.fast as fast
from adapters.fast import EmaNorm, Tent
from adapters.fast.core.registry import register
from adapters.fast.core.share import share

NAMES = [
    "ada_mix_norm", "ada_npc", "alpha_norm", "auto", "cafa", "cotta", "deyo", "dpcore", "drm", "eata", "ema_norm",
    "error_memory", "eta", "feature_align", "gain_control", "gala", "iabn", "info_max", "input_prompt", "label_shift",
    "lame", "nhl", "none", "norm", "note", "poem", "psmt", "recap", "reliable", "rmt", "rna", "roid", "rotta", "rpl",
    "sar", "self_learning", "t3a", "tent", "unmix_norm", "vida", "woc",
]  # fmt: skip


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()


def test_all_methods_are_found_by_name():
    assert fast.names() == NAMES
    for name in fast.names():
        cls = fast.get(name)
        assert cls.name == name and cls.outputs in ("logits", "probs") and cls.__doc__
        assert cls.__module__ == f"adapters.fast.{name}"
        assert getattr(fast, cls.__name__) is cls


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="'tant'; there are: ada_mix_norm, ada_npc"):
        fast.get("tant")
    with pytest.raises(AttributeError, match="Tant"):
        _ = fast.Tant


def test_only_the_module_asked_for_is_imported():
    code = (
        "import sys, adapters.fast as fast; fast.get('norm'); from adapters.fast import Lame; "
        "loaded = [m for m in sys.modules if m.startswith('adapters.fast.') and '.core' not in m]; "
        "assert sorted(loaded) == ['adapters.fast.lame', 'adapters.fast.norm'], loaded; "
        "assert 'pytorch_optimizer' not in sys.modules and 'daemon' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_class_is_usable_alone():
    x = torch.randn(8, 6)
    assert Tent(model())(x).shape == (8, 4)
    assert EmaNorm(model(), memory_rows=10)(x).shape == (8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "tent: lr: Input should be greater than 0"),
        ({"learning_rate": 1.0}, "learning_rate: Extra inputs.*Its options are: head, .*optimizer, lr"),
        ({"steps": "many"}, "steps: .*valid integer"),
        ({"head": "classifier"}, "no layer 'classifier'; its linear layers: 0, 2"),
    ],
)
def test_a_wrong_option_is_a_value_error_that_says_what_there_is(options, message: str):
    with pytest.raises(ValueError, match=message):
        fast.build("tent", model(), **options)


def test_wrappers_compose_by_name():
    adapter = fast.build("woc+gala+eta", model(), d_margin=0.2, window=5, alpha=0.0)
    assert adapter.name == "woc+gala+eta" and isinstance(adapter, fast.get("woc"))
    assert adapter.inner.name == "gala+eta" and adapter.inner.options.window == 5
    assert adapter.method.name == "eta" and adapter.method.options.d_margin == 0.2
    assert fast.build("woc", model(), inner="eta").method.name == "eta"
    assert fast.get("woc+gala+eta") is fast.get("woc+gala+eta")
    with pytest.raises(ValueError, match="'eta' is no wrapper"):
        fast.get("eta+woc")
    with pytest.raises(ValueError, match="'lame' takes no gradient steps.*use 'tent'"):
        fast.build("woc+lame", model())
    with pytest.raises(ValueError, match="eta: learning_rate: Extra inputs"):
        fast.build("woc+eta", model(), learning_rate=1.0)


def test_two_methods_can_not_have_one_name():
    with pytest.raises(ValueError, match="two adapters are called 'tent'"):
        register("tent")(EmaNorm)
    assert EmaNorm.name == "ema_norm"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.plain = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x)) * self.plain


def test_the_copy_shares_memory_keeps_ties_and_needs_no_gradient():
    given = Tied()
    copied = share(given)
    assert copied.inner.weight is copied.outer.weight is not given.inner.weight
    for mine, theirs in zip(copied.parameters(), given.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr() and not mine.requires_grad and theirs.requires_grad
    assert copied.plain.data_ptr() == given.plain.data_ptr()
    assert given.training and not copied.training


def test_hooks_stay_with_their_owner():
    given, calls = model(), []
    held = object.__new__(type("Uncopyable", (), {"__deepcopy__": lambda *_: pytest.fail("a hook was copied")}))
    given[0].register_forward_hook(lambda *_, held=held: calls.append(1))
    given.register_forward_pre_hook(lambda *_: calls.append(1))
    share(given)(torch.randn(2, 6))
    assert not calls
    given(torch.randn(2, 6))
    assert len(calls) == 2


@pytest.mark.parametrize("layer", [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.GRU(4, 4), nn.LSTM(4, 4)])
def test_layers_that_compute_or_cache_their_weights_are_copied_right(layer: nn.Module):
    x = torch.randn(3, 4)
    with torch.inference_mode():
        torch.testing.assert_close(share(layer)(x), layer(x), rtol=0, atol=0)
