from __future__ import annotations

import pytest

from daemon.config import RESERVED, effective, load_settings, variables
from daemon.errors import SettingsError

NAMES = [
    "SOURCE",
    "SINK",
    "LABELS",
    "DEAD_LETTERS",
    "LABEL_QUERIES",
    "LABEL_BUDGET__SHARE",
    "LABEL_BUDGET__WINDOW_ROWS",
    "CODEC",
    "BUNDLE",
    "BUNDLE_ROWS",
    "FACTORY",
    "APP_DIR",
    "STATE_DIR",
    "DEVICE",
    "AUTOCAST",
    "THREADS",
    "BATCH_ROWS",
    "LINGER_MS",
    "PROBABILITIES",
    "FAST",
    "SLOTS",
    "DETECT",
    "DETECT__NAME",
    "DETECT__FEATURES",
    "DETECT__ARL0",
    "TWIN_SHARE",
    "LABEL_WINDOW",
    "LABEL_WINDOW_BYTES",
    "SLOW",
    "SLOW__ENABLED",
    "SLOW__NAME",
    "SLOW__OPTIONS",
    "SLOW__EXACT",
    "SLOW__EXACT_ROWS",
    "SLOW__EAGER",
    "SLOW__STEPS",
    "SLOW__BATCH_ROWS",
    "SLOW__OPTIMIZER",
    "SLOW__LR",
    "SLOW__MIN_LABELS",
    "SLOW__PRICE",
    "SLOW__SECONDS",
    "SLOW__DUTY",
    "SLOW__BURST_BYTES",
    "SLOW__MEMORY_ROWS",
    "SLOW__MEMORY_BYTES",
    "SLOW__RECENCY",
    "SLOW__BALANCE",
    "SLOW__HOLDOUT_ROWS",
    "SLOW__MAX_QUERIES",
    "SLOW__ALPHA",
    "SLOW__RUN_ROWS",
    "SLOW__REFERENCE_SHARE",
    "SLOW__REFERENCE_MARGIN",
    "SLOW__REGIMES",
    "SLOW__PSEUDO_LABELS",
    "SLOW__INLINE",
    "VERSIONS",
    "CHECKPOINT",
    "CHECKPOINT__DIR",
    "CHECKPOINT__EVERY_S",
    "CHECKPOINT__EVERY_BATCHES",
    "CHECKPOINT__KEEP",
    "DELIVERY",
    "OVERLOAD__ENABLED",
    "OVERLOAD__LAG_S",
    "OVERLOAD__MAX_ROWS",
    "OVERLOAD__SAMPLE",
    "OVERLOAD__PATIENCE_S",
    "SHED",
    "KAFKA__GROUP",
    "KAFKA__INSTANCE_ID",
    "KAFKA__START",
    "KAFKA__OUT_OF_RANGE",
    "KAFKA__MAX_REBUILD",
    "KAFKA__SESSION_TIMEOUT_MS",
    "KAFKA__BOOTSTRAP_TIMEOUT_S",
    "KAFKA__TRANSACTION_MS",
    "KAFKA__TRANSACTION_TIMEOUT_MS",
    "KAFKA__METADATA_MAX_AGE_MS",
    "KAFKA__BULK",
    "KAFKA__PRODUCER_LINGER_MS",
    "KAFKA__COMPRESSION",
    "KAFKA__SECURITY_PROTOCOL",
    "KAFKA__SASL_MECHANISM",
    "KAFKA__USERNAME",
    "KAFKA__PASSWORD",
    "KAFKA__PASSWORD_FILE",
    "KAFKA__TOKEN_FILE",
    "KAFKA__SSL_CAFILE",
    "KAFKA__SSL_CERTFILE",
    "KAFKA__SSL_KEYFILE",
    "KAFKA__SSL_PASSWORD_FILE",
    "KAFKA__SSL_CHECK_HOSTNAME",
    "KAFKA__SSL_RELOAD_S",
    "MQTT__CLIENT_ID",
    "MQTT__IN_FLIGHT",
    "MQTT__SESSION_EXPIRY_S",
    "MQTT__KEEPALIVE_S",
    "MQTT__CONNECT_TIMEOUT_S",
    "MQTT__TLS",
    "MQTT__USERNAME",
    "MQTT__PASSWORD_FILE",
    "MQTT__SSL_CAFILE",
    "MQTT__SSL_CERTFILE",
    "MQTT__SSL_KEYFILE",
    "REGISTRY__URL",
    "REGISTRY__USERNAME",
    "REGISTRY__PASSWORD_FILE",
    "REGISTRY__SSL_CAFILE",
    "REGISTRY__TIMEOUT_S",
    "HTTP",
    "HTTPS__SSL_CERTFILE",
    "HTTPS__SSL_KEYFILE",
    "HTTPS__SSL_PASSWORD_FILE",
    "HTTPS__SSL_CAFILE",
    "HTTPS__SSL_RELOAD_S",
    "HTTPS__CLIENT_CERTFILE",
    "OPERATOR__TOKEN_FILE",
    "OPERATOR__PER_MINUTE",
    "TRACES",
    "TRACES__MODE",
    "TRACES__ENDPOINT",
    "TRACES__SAMPLE_RATIO",
    "TRACES__RECORD_SPANS",
    "PROGRESS_TIMEOUT_S",
    "DRAIN_TIMEOUT_S",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "ENV_FILE",
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("HOMEOSTAT_") and name not in RESERVED:
            monkeypatch.delenv(name)


def problems(monkeypatch: pytest.MonkeyPatch, **values: str) -> list[str]:
    for name, value in values.items():
        monkeypatch.setenv("HOMEOSTAT_" + name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return caught.value.problems


def test_the_environment_variables_are_these_and_each_is_listed_once() -> None:
    listed = [variable.name for variable in variables()]
    limits = ("HOMEOSTAT_REGULATOR__", "HOMEOSTAT_GUARD__")
    assert len(listed) == len(set(listed))
    assert {name for name in listed if not name.startswith(limits)} == {f"HOMEOSTAT_{name}" for name in NAMES}
    assert all(any(name.startswith(limit) for name in listed) for limit in limits)


def test_every_variable_has_a_help_text_and_a_kind() -> None:
    assert [variable.name for variable in variables() if not variable.help or not variable.kind] == []


def test_with_no_variable_set_the_listed_defaults_are_in_force() -> None:
    listed = {variable.name: variable.default for variable in variables()}
    for name, value in effective(load_settings()):
        assert value == listed[name], name


def test_an_unknown_variable_is_refused_once_by_name_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = problems(monkeypatch, BATCH_ROW="4", SLOW__STEP="3")
    assert lines == [
        "HOMEOSTAT_BATCH_ROW=4: no such variable; did you mean HOMEOSTAT_BATCH_ROWS?",
        "HOMEOSTAT_SLOW__STEP=3: no such variable; did you mean HOMEOSTAT_SLOW__STEPS?",
    ]


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("BATCH_ROWS", "many", "default 512"),
        ("BATCH_ROWS", "0", "default 512"),
        ("CODEC", "xml", "json|raw|msgpack"),
        ("SLOW__STEPS", "-1", "default 100"),
        ("CHECKPOINT__KEEP", "1", "default 3"),
        ("KAFKA__START", "middle", "earliest|latest"),
        ("TWIN_SHARE", "0", "default 1.0"),
        ("REGULATOR__PATIENCE_ROWS", "lots", "default 200"),
    ],
)
def test_a_wrong_value_gives_one_line_with_variable_value_and_what_is_right(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, right: str
) -> None:
    lines = problems(monkeypatch, **{name: value})
    assert len(lines) == 1
    assert lines[0].startswith(f"HOMEOSTAT_{name}={value}: ") and right in lines[0] and "\n" not in lines[0]


def test_all_problems_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(problems(monkeypatch, BATCH_ROWS="x", CODEC="xml", NOPE="1")) == 3


def test_the_short_forms_name_a_method_and_leave_room_for_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "FAST": "tent",
        "FAST__LR": "0.01",
        "DETECT": "adwin",
        "DETECT__ARL0": "500",
        "SLOW": "head",
        "SLOW__STEPS": "7",
        "CHECKPOINT": "off",
    }.items():
        monkeypatch.setenv("HOMEOSTAT_" + name, value)
    found = load_settings()
    assert found.fast.name == "tent" and found.fast.options() == {"lr": "0.01"}
    assert (found.detect.name, found.detect.arl0) == ("adwin", 500)
    assert (found.slow.name, found.slow.steps) == ("head", 7)
    assert str(found.checkpoint.dir) == "off"


def test_a_password_is_masked_among_the_effective_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEOSTAT_KAFKA__PASSWORD", "hunter2")
    assert dict(effective(load_settings()))["HOMEOSTAT_KAFKA__PASSWORD"] == "***"


@pytest.mark.parametrize("name", ["KAFKA__PASSWRD", "KAFKA_PASSWORD", "PASSWORD", "KAFKA__PASSWORD__X", "KAFKA"])
def test_a_misspelt_password_is_not_printed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value = '{"password": "hunter2", "x": 1}' if name == "KAFKA" else "hunter2"
    assert "hunter2" not in "\n".join(problems(monkeypatch, **{name: value}))
