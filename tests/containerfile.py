"""deploy/Containerfile read: its stages, their instructions, and what the tests ask of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CONTAINERFILE = ROOT / "deploy" / "Containerfile"


class Instruction(NamedTuple):
    """``RUN`` and what follows it, continued lines joined."""

    word: str
    rest: str


def stages() -> list[list[Instruction]]:
    """The instructions of each stage; what stands before the first ``FROM`` is number 0."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = [[]]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                found.append([])
            found[-1].append(Instruction(word, " ".join(rest.split())))
    return found


def of(word: str, stage: list[Instruction]) -> list[str]:
    """What follows ``word``, for each such instruction."""
    return [instruction.rest for instruction in stage if instruction.word == word]


def arguments(stage: list[Instruction]) -> dict[str, str]:
    """Build arguments and their defaults."""
    return dict(text.split("=", 1) for text in of("ARG", stage))


def environment(stage: list[Instruction]) -> dict[str, str]:
    """The variables that the image sets."""
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(of("ENV", stage))))


def health_command() -> list[str]:
    """What the health check runs."""
    (text,) = of("HEALTHCHECK", stages()[-1])
    command: list[str] = json.loads(text.partition("CMD ")[2])
    return command
