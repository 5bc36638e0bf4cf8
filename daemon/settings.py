"""Every ``HOMEOSTAT_*`` variable, as one frozen tree. Nothing else in the program reads the environment.

Nested names use ``__``: ``HOMEOSTAT_SLOW__STEPS=120``. A method's name and its options share one prefix:
``HOMEOSTAT_FAST=tent`` and ``HOMEOSTAT_FAST__LR=0.001``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from daemon.front.settings import Https
from daemon.guard_limits import GuardLimits
from daemon.operating.operator_settings import OperatorActions
from daemon.overload import OverloadLimits
from daemon.regulator_types import RegulatorLimits
from daemon.section import Section, without_empty_paths
from daemon.stream_settings import KafkaClient, Mqtt, SchemaRegistry
from daemon.tracing.trace_settings import Traces

PREFIX = "HOMEOSTAT_"
ARL0 = 200_000
"""Mean rows between false alarms that a bundle is packed for where nobody asks for another number."""


class Method(Section):
    """A method by name; every further variable under the same prefix is an option of that method."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str

    def options(self) -> dict[str, Any]:
        """The method's own options, as given (the method validates them)."""
        return dict(self.__pydantic_extra__ or {})


class Detection(Section):
    """What raises an alarm, and how often it may be wrong."""

    name: str = "cusum"
    """Detector of each signal: cusum, e_detector, adwin, page_hinkley, kswin and others (`homeostat detect --help`).
    HOMEOSTAT_DETECT=adwin is the short form. A bundle knows cusum, adwin, and what was set when it was packed."""
    features: str | None = None
    """Detector of the model's features as a whole: mmd, ks or mahalanobis. None: the signals are watched alone."""
    arl0: float | None = Field(None, ge=100)
    """Mean rows between false alarms of all watched signals together. Unset: as the bundle was packed; `homeostat pack`
    takes 200000."""


class Slow(Section):
    """The slow loop: learning from late labels in the background."""

    enabled: bool = True
    """Whether the slow loop may learn. Without labels it never starts."""
    name: str = "norm_affine_head"
    """What may move; fisher+, interpolate+, lae+ before it say how it is kept. Short form: HOMEOSTAT_SLOW=head."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options as a JSON object, for example {"rank": 4}."""
    exact: str = "lda_head"
    """Exact head offered before any burst, classification only: lda_head, prototype_head; empty: none."""
    exact_rows: PositiveInt = 500
    """Memory of that head, in labelled rows."""
    eager: bool = True
    """Whether it looks for a better version as labels come, and not only when the controller asks."""
    steps: PositiveInt = 100
    """Gradient steps of one burst."""
    batch_rows: PositiveInt = 64
    """Rows of one gradient step."""
    optimizer: str = "prodigy"
    """prodigy, momo, hypergradient, trial_step, sgd, adam, adamw, or any name of pytorch_optimizer."""
    lr: PositiveFloat | None = None
    """Learning rate; unset: the optimiser's own, which is learning-rate-free for the default."""
    min_labels: PositiveInt = 100
    """Labelled rows that must be in memory, and new ones since the last look, before the next one."""
    price: float = Field(1e-4, ge=0)
    """Error that one more forward pass for each served row has to win back, or no burst is started; 0: always."""
    seconds: PositiveFloat = 120.0
    """Seconds of work after which a burst ends."""
    duty: float = Field(0.5, gt=0, le=1)
    """Share of the time that a burst works; it rests for the others, so that serving is not in its way."""
    burst_bytes: PositiveInt | None = None
    """Memory that a burst's steps may take on the device; unset: what there is."""
    memory_rows: PositiveInt = 2_000
    """Labelled rows kept to learn from."""
    memory_bytes: PositiveInt = 268_435_456
    """Most memory that those rows take, and the most that the known regimes take."""
    recency: float = Field(0.5, ge=0, le=1)
    """Share of each gradient step's rows drawn from the newest half of the memory."""
    balance: float = Field(0.5, ge=0, le=1)
    """From 0, every row kept is drawn as often, to 1, every class is."""
    holdout_rows: PositiveInt = 160
    """Newest labelled rows that are held back to judge a candidate."""
    max_queries: PositiveInt = 8
    """Looks at the same held-back rows after which they are stale."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Level of the gate's test: the chance to promote a candidate that is no better."""
    run_rows: int = Field(12, ge=0)
    """Rows of one class that count as one where runs of classes are too long for a proof; 0: no promotion there."""
    reference_share: float = Field(0.25, ge=0, le=1)
    """Share of each gradient step's rows drawn from the protected reference exemplars."""
    reference_margin: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None
    """Error a candidate may lose on the reference exemplars; auto: where labels don't contradict them; unset: any."""
    regimes: int = Field(4, ge=0)
    """Promoted versions kept with their regime, to be offered again when it comes back; 0: none."""
    pseudo_labels: bool = False
    """Learn without any label too, from what the frozen model and a slow teacher agree on."""
    inline: bool = False
    """Learn in the loop instead of beside it: the stream waits, and a replay gives the same versions every time."""


class LabelBudget(Section):
    """How many records the daemon asks labels for."""

    share: float = Field(0.01, gt=0, le=1)
    """Share of the records without a label that labels are asked for."""
    window_rows: int = Field(200, ge=10, le=10_000)
    """Records among which those are chosen; a question comes at most this many records after its own."""


class Checkpoints(Section):
    """Atomic snapshots of state and offsets."""

    dir: Path | None = None
    """Folder of the snapshots; off: none; unset: STATE_DIR/checkpoints, and none for the simulator."""
    every_s: PositiveFloat = 10.0
    """Seconds between snapshots while records arrive."""
    every_batches: PositiveInt | None = None
    """Also after this many batches; unset: by time alone."""
    keep: int = Field(3, ge=2)
    """Snapshots kept; older ones are removed."""


_WORDS = {"checkpoint": "dir", "traces": "mode"}

ENVIRON: ContextVar[Mapping[str, str]] = ContextVar("ENVIRON", default=os.environ)
"""Where settings are read from; `daemon.config` adds a file's variables."""


class _Environment(EnvSettingsSource):
    """Reads ``NAME=word`` of a nested section as that section's ``name``, or what stands for it in _WORDS."""

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        try:
            decoded = json.loads(value)
        except ValueError:
            decoded = value
        if isinstance(decoded, dict):
            return decoded
        return {_WORDS.get(field_name, "name"): value}


class Settings(BaseSettings):
    """The effective settings of one process."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        nested_model_default_partial_update=True,
    )

    source: str = "sim://ageing"
    """Where records come from: kafka://host:port/topic, mqtt://host/topic, file://path, -, sim://ageing?rate=1000."""
    sink: str = "null:"
    """Where answers go: kafka://host:port/topic, mqtt://host/topic, file://path, -, null:."""
    labels: str = ""
    """Where late labels come from: kafka://host:port/topic, file://path; empty: none (the simulator brings its own)."""
    dead_letters: str = ""
    """Where unanswerable records go; empty: kafka://.../SOURCE-TOPIC.dead-letters, else a file in STATE_DIR."""
    label_queries: str = ""
    """Where it is said which few records should be labelled: kafka://host:port/topic, file://path; empty: nowhere."""
    label_budget: LabelBudget = LabelBudget()
    """How many records it names."""
    codec: Literal["json", "raw", "msgpack", "avro", "json-schema"] = "json"
    """Wire format of the records: json, raw (little-endian float32), msgpack; avro and json-schema ask a registry."""
    bundle: Path | None = None
    """Folder made by `homeostat pack`; needed for every source but the simulator."""
    bundle_rows: PositiveInt = 2_000
    """Rows, 64 of a batch at most, on which a new bundle is compared before it takes over from the one that runs."""
    factory: str = ""
    """module:function that builds the bundle's model; a bundle can't choose what is imported, you do."""
    app_dir: Path = Path(".")
    """Folder from which the factory's module may be imported, searched last."""
    state_dir: Path = Path(".homeostat")
    """Folder for what the daemon itself keeps: checkpoints, dead letters of files, the simulator's bundle."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N."""
    autocast: bool = False
    """Run the model in bfloat16 where that is safe."""
    threads: PositiveInt = 1
    """CPU threads of torch; more than one gets slow when the learner is busy too."""
    batch_rows: int = Field(512, ge=1, le=65_536)
    """Most rows of one batch."""
    linger_ms: NonNegativeFloat = 5.0
    """Longest wait for a fuller batch, where what has come can't fill it."""
    probabilities: bool = False
    """Put every class's probability into each answer."""
    fast: Method = Method(name="auto")
    """Fast method by name (see adapters/fast/README.md; woc+eata is one around another); options: FAST__LR=0.001."""
    slots: Literal["shared", "key"] = "shared"
    """What a record adapts: one shared state, or that of its record key, so that each sensor has its own."""
    detect: Detection = Detection()
    """Drift detection."""
    twin_share: float = Field(1.0, gt=0, le=1)
    """Share of rows on which the frozen model runs too, once the served one differs from it."""
    label_window: int = Field(10_000, ge=1)
    """Newest rows whose labels may still come; later labels are counted as late."""
    label_window_bytes: int = Field(256 << 20, ge=1 << 20)
    """Most memory for those rows' inputs; the window shrinks to fit."""
    regulator: RegulatorLimits = RegulatorLimits()
    """The fast/slow controller's limits."""
    guard: GuardLimits = GuardLimits()
    """The no-harm test's limits."""
    slow: Slow = Slow()
    """The slow loop."""
    versions: int = Field(3, ge=1)
    """Promoted versions kept for a rollback."""
    checkpoint: Checkpoints = Checkpoints()
    """Snapshots."""
    delivery: Literal["at-least-once", "exactly-once"] = "at-least-once"
    """What is promised of answers on Kafka; exactly-once writes answers and offsets in one transaction."""
    overload: OverloadLimits = OverloadLimits()
    """What gives way when records come faster than they are answered."""
    shed: PositiveFloat | None = None
    """Seconds of lag beyond which the oldest records are skipped and counted; unset: no record is ever skipped."""
    kafka: KafkaClient = KafkaClient()
    """Kafka clients."""
    mqtt: Mqtt = Mqtt()
    """MQTT clients."""
    registry: SchemaRegistry = SchemaRegistry()
    """Schema registry of the codecs avro and json-schema."""
    http: str = "127.0.0.1:9464"
    """Address of the page, /metrics, /healthz and /readyz; port 0: any free one; off: none."""
    https: Https = Https()
    """TLS at that address."""
    operator: OperatorActions = OperatorActions()
    """Who may act on the running daemon."""
    traces: Traces = Traces()
    """Traces and the trace context of records: off, pass, on."""
    progress_timeout_s: PositiveFloat = 60.0
    """Liveness fails when the loop made no progress for this long although there was work."""
    drain_timeout_s: PositiveFloat = 20.0
    """Time to finish, flush and checkpoint after SIGTERM or Ctrl-C."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe line that is logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """auto: text on a terminal, JSON elsewhere."""
    env_file: Path | None = None
    """File of further variables, NAME=value a line; the environment holds before it. SIGHUP reads it again."""

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, given: Any) -> Any:
        return without_empty_paths(given, cls.model_fields)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Constructor arguments, then the environment; no dotenv file, no secrets folder."""
        environment = _Environment(settings_cls)
        environment.env_vars = {name.lower(): value for name, value in ENVIRON.get().items()}
        return (init_settings, environment)
