"""The command line: homeostat run, check, pack, inspect, broker, simulate, and what lies in folders of its own.

Nothing heavy is imported before a command needs it: help, and a wrong setting, answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import daemon
from daemon import simulate_command
from daemon.dead_letters import command as replay_command
from daemon.errors import HomeostatError, SettingsError
from daemon.evaluation import command as evaluate_command
from daemon.operating import command as ctl_command
from daemon.recorded import command as detect_command
from daemon.versioning import command as versions_command

EXIT_CODES = """\
exit codes:
  0    done: drained, flushed and checkpointed
  1    unexpected error
  2    refused at the start: a setting, the bundle, a stream or a checkpoint is wrong; or a stream that can't go on
  3    answers could not be delivered before the drain's end; nothing is committed past them
  130  forced by a second signal; the newest records are answered again after a restart
"""


def _own_package() -> None:
    """Refuse to run with somebody else's top-level package of the same name."""
    if getattr(daemon, "PRODUCT", None) != "homeostat":
        sys.exit(
            f"homeostat: the package 'daemon' at {getattr(daemon, '__file__', '?')} is not homeostat's; "
            "another distribution (python-daemon?) is installed beside it. Give homeostat an environment of its own."
        )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)


def _variables_text(only: Sequence[str] = ()) -> str:
    from daemon.config import variables

    lines = ["environment variables (default) and what they do:"]
    for variable in variables():
        if only and variable.name not in only:
            continue
        default = f" ({variable.default})" if variable.default else ""
        lines.append(f"  {variable.name}{default}")
        lines.append(f"      {variable.help}")
    return "\n".join(lines)


class _Lazy(argparse.ArgumentParser):
    """Its epilog is made only when the help is asked for."""

    def __init__(self, *args: Any, variables: Sequence[str] | None = None, tail: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "formatter_class": _Formatter})
        self._variables, self._tail = variables, tail

    def format_help(self) -> str:
        """Help, the variables that the command reads, exit codes."""
        parts = [_variables_text(self._variables)] if self._variables is not None else []
        self.epilog = "\n\n".join([*parts, self._tail]).strip() or None
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _Lazy(
        prog="homeostat",
        description="Keeps a trained torch model in its working range on a stream that drifts. Configured by\n"
        "environment variables alone; with none set, `homeostat run` adapts a small model to a simulated\n"
        "array of ageing gas sensors.",
        variables=(),
        tail=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"homeostat {daemon.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Lazy)

    run = commands.add_parser("run", help="run the daemon", description="Run it.", variables=(), tail=EXIT_CODES)
    run.add_argument("--max-records", type=_positive, metavar="N", help="end after N records")
    run.add_argument("--report", type=Path, metavar="FILE", help="write the closing numbers as JSON")

    commands.add_parser(
        "check",
        help="validate settings, bundle, broker and topics; run one batch",
        description="Validate the settings, open the bundle, reach the broker and its topics, run one warm-up batch,\n"
        "and print the effective settings with secrets masked. Exits with 0, or with 2 and one line per problem.",
        variables=(),
    )

    pack = commands.add_parser(
        "pack",
        help="make a bundle from a factory, weights and source data",
        description="Make a bundle: weights, reference statistics and calibrated detectors from labelled source data.",
        variables=("HOMEOSTAT_FACTORY", "HOMEOSTAT_APP_DIR", "HOMEOSTAT_DETECT__ARL0"),
    )
    pack.add_argument("--factory", metavar="MODULE:FUNCTION", help="builds the untrained module (HOMEOSTAT_FACTORY)")
    pack.add_argument("--weights", type=Path, required=True, metavar="FILE", help="safetensors of the trained weights")
    pack.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="source rows: npz (x, y) or CSV with a y column"
    )
    pack.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="rows not used in training; without it the last quarter of --data",
    )
    pack.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the bundle to write")
    pack.add_argument("--task", choices=("classification", "regression"), default="classification")
    pack.add_argument("--head", metavar="NAME", help="name of the last linear layer; found when not given")
    pack.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (0)")
    pack.add_argument(
        "--fast",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        default=[],
        metavar="NAMES",
        help="fast methods that prepare from the source rows, comma-separated, for example rna,drm",
    )

    inspect = commands.add_parser(
        "inspect", help="show what a bundle, a checkpoint or a folder of versions holds", description="Show it."
    )
    inspect.add_argument("path", type=Path, help="bundle, checkpoint file, folder of checkpoints, STATE_DIR/versions")
    inspect.add_argument("--json", action="store_true", help="as JSON, with a digest of every part of the state")

    broker = commands.add_parser(
        "broker",
        help="run a real Apache Kafka for a trial (extra `broker`)",
        description="Run a real Apache Kafka on this machine, for trials: no container, no installed Java.",
    )
    broker.add_argument("--port", type=int, default=9092, metavar="N", help="port to listen on (9092)")
    broker.add_argument("--folder", type=Path, default=Path(".homeostat/broker"), metavar="FOLDER", help="data and log")

    simulate_command.add(commands, _positive)
    detect_command.add(commands)
    evaluate_command.add(commands)
    replay_command.add(commands)
    versions_command.add(commands)
    ctl_command.add(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _own_package()
    arguments = _parser().parse_args(argv)
    try:
        return int(_COMMANDS[arguments.command](arguments))
    except SettingsError as error:
        for problem in error.problems:
            print(f"homeostat: {problem}", file=sys.stderr)
        return error.exit_code
    except HomeostatError as error:
        print(f"homeostat: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from daemon.config import load_settings

    settings = load_settings()
    if arguments.report is not None and not arguments.report.parent.is_dir():
        raise SettingsError([f"--report={arguments.report}: no such folder"])
    from daemon.running import run

    try:
        code = run(settings, max_records=arguments.max_records, report=arguments.report)
    except SystemExit as forced:
        code = int(forced.code or 0)
    _leave_if_learning(code)
    return code


def _leave_if_learning(code: int) -> None:
    """End the process now if a thread of the learner still runs: all that has to be kept is on disk.

    Nothing can stop an import of torch's compiler half way, and an interpreter that shuts down under it aborts.
    """
    import os
    import threading

    if any(thread.name.startswith(("learner", "versions")) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _check(arguments: argparse.Namespace) -> int:
    from daemon.config import load_settings

    settings = load_settings()
    from daemon.checking import check

    return check(settings)


def _pack(arguments: argparse.Namespace) -> int:
    from daemon.config import load_settings

    settings = load_settings()
    factory = arguments.factory or settings.factory
    if not factory:
        raise SettingsError(
            ["--factory (or HOMEOSTAT_FACTORY) is needed: module:function, for example my_models:build"]
        )
    from daemon import bundle, packing
    from daemon.settings import ARL0
    from daemon.source_data import read_rows

    def progress(text: str) -> None:
        print(f"pack: {text}", file=sys.stderr, flush=True)

    progress(f"building {factory}")
    model = bundle.build_model(factory, settings.app_dir, variable="--factory")
    bundle.load_weights(model, bundle.read_tensors(arguments.weights), arguments.weights)
    x, y = read_rows(arguments.data)
    held = read_rows(arguments.calibration) if arguments.calibration else None
    manifest = packing.pack(
        arguments.out,
        model=model,
        factory=factory,
        x=x,
        y=y,
        calibration=held,
        task=arguments.task,
        head=arguments.head,
        arl0=settings.detect.arl0 or ARL0,
        watch=tuple(dict.fromkeys((*packing.DETECTORS, settings.detect.name))),
        watch_features=settings.detect.features,
        seed=arguments.seed,
        prepare=arguments.fast,
        progress=progress,
    )
    print(
        f"{arguments.out}: {manifest.task}, input {manifest.input_shape}, {manifest.outputs} outputs, "
        f"{manifest.reference_rows} reference and {manifest.calibration_rows} calibration rows"
        + (f", prepared for {', '.join(manifest.prepared)}" if manifest.prepared else "")
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from daemon.inspecting import inspect

    return inspect(arguments.path, as_json=arguments.json)


def _broker(arguments: argparse.Namespace) -> int:
    from daemon.broker import command

    return command(arguments.folder, arguments.port)


_COMMANDS = {
    "run": _run,
    "check": _check,
    "pack": _pack,
    "inspect": _inspect,
    "broker": _broker,
    "simulate": simulate_command.run,
    "detect": detect_command.run,
    "evaluate": evaluate_command.run,
    "replay-dlq": replay_command.run,
    "versions": versions_command.run,
    "ctl": ctl_command.run,
}

if __name__ == "__main__":
    sys.exit(main())
