"""Where an MQTT stream is, and which topics a filter takes in. Nothing here needs an MQTT client."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from daemon.errors import StreamError

PORTS = {"mqtt": 1883, "mqtts": 8883}
_MAX_BYTES = 65_535
"""Of a string on MQTT's wire."""


@dataclass(frozen=True)
class MqttAddress:
    """``mqtt://host[:port]/topic``, or ``mqtts://`` for TLS; where records are read, a filter with + and # at its end.

    Everything after the first slash is the topic: ``mqtt://host//a`` is the topic ``/a``. Percent signs escape.
    """

    host: str
    port: int
    tls: bool
    topic: str
    url: str
    variable: str

    @classmethod
    def parse(cls, url: str, variable: str, *, wildcards: bool = False, tls: bool = False) -> MqttAddress:
        """Read an address. Never by ``urlsplit``: to that, a ``#`` ends the path.

        Args:
            url: as in the settings.
            variable: the setting that holds it, for the messages.
            wildcards: whether the topic may be a filter.
            tls: whether TLS is spoken to ``mqtt://`` too.

        Raises:
            StreamError: the URL names no broker or no topic, or holds a login.
        """
        scheme, _, rest = url.partition("://")
        netloc, slash, path = rest.partition("/")
        if "@" in netloc:
            shown = f"{scheme}://***@{netloc.rpartition('@')[2]}{slash}{path}"
            problem = "no login belongs here; set HOMEOSTAT_MQTT__USERNAME and HOMEOSTAT_MQTT__PASSWORD_FILE"
            raise StreamError(f"{variable}={shown}: {problem}")
        example = f"{scheme}://127.0.0.1:{PORTS.get(scheme, 1883)}/plant/" + ("+/readings" if wildcards else "answers")
        wrong = StreamError(f"{variable}={url}: not a topic's address; right would be {example}")
        try:
            place = urlsplit(f"//{netloc}")
            host, port, topic = place.hostname or "", place.port, unquote(path, errors="strict")
        except ValueError:
            raise wrong from None
        if scheme not in PORTS or not host or port == 0 or not topic:
            raise wrong
        if refusal := (_filter_problem(topic) if wildcards else _topic_problem(topic)):
            raise StreamError(f"{variable}={url}: {refusal}")
        secure = tls or scheme == "mqtts"
        return cls(host, port or PORTS["mqtts" if secure else "mqtt"], secure, topic, url, variable)

    @property
    def broker(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"

    @property
    def partition(self) -> str:
        """How this stream is called in positions."""
        return f"mqtt:{self.topic}"

    def error(self, text: str) -> StreamError:
        """An error that names the variable and its value."""
        return StreamError(f"{self.variable}={self.url}: {text}")

    def takes(self, topic: str) -> bool:
        """Whether a message of ``topic`` belongs to this filter."""
        return matches(_unshared(self.topic), topic)


def matches(filter_: str, topic: str) -> bool:
    """Whether ``filter_`` takes in ``topic``, by MQTT 5.0's rules (section 4.7)."""
    wanted, given = filter_.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False  # the broker's own topics are asked for by name
    for level, part in enumerate(wanted):
        if part == "#":
            return True  # of the parent level, too: a/# takes in a
        if level >= len(given) or part not in ("+", given[level]):
            return False
    return len(wanted) == len(given)


def check_no_circle(source: str, outputs: dict[str, str]) -> None:
    """Refuse outputs that the source would read again, for ever.

    Args:
        source: URL of the records.
        outputs: URLs by their variables.

    Raises:
        StreamError: naming the variable.
    """
    if source.partition("://")[0] not in PORTS:
        return
    read = MqttAddress.parse(source, "HOMEOSTAT_SOURCE", wildcards=True)
    for variable, url in outputs.items():
        if url.partition("://")[0] in PORTS:
            written = MqttAddress.parse(url, variable)
            if written.host == read.host and read.takes(written.topic):
                raise written.error(f"HOMEOSTAT_SOURCE={source} would read it again; write to a topic outside of it")


def _unshared(filter_: str) -> str:
    """The filter in ``$share/NAME/FILTER``."""
    return filter_.split("/", 2)[2] if filter_.startswith("$share/") else filter_


def _text_problem(topic: str) -> str | None:
    if any(letter < " " or "\x7f" <= letter <= "\x9f" for letter in topic):
        return "the topic holds a control character"
    size = len(topic.encode("utf-8", "surrogatepass"))
    return f"the topic has {size} bytes; at most {_MAX_BYTES} go" if size > _MAX_BYTES else None


def _topic_problem(topic: str) -> str | None:
    if "+" in topic or "#" in topic:
        return "+ and # stand for many topics; what is written needs one"
    if topic.startswith("$"):
        return "topics that begin with $ are the broker's own; choose another"
    return _text_problem(topic)


def _filter_problem(filter_: str) -> str | None:
    if filter_.startswith("$share/"):
        parts = filter_.split("/", 2)
        if len(parts) < 3 or not parts[1] or not parts[2] or "+" in parts[1] or "#" in parts[1]:
            return "a shared subscription is $share/NAME/FILTER"
        filter_ = parts[2]
    levels = filter_.split("/")
    for at, level in enumerate(levels):
        if ("+" in level or "#" in level) and len(level) > 1:
            return f"{level!r}: + and # stand for a whole level"
        if level == "#" and at < len(levels) - 1:
            return "# stands at the end alone"
    return _text_problem(filter_)
