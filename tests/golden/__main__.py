"""``python -m tests.golden FOLDER``: replay every golden case of the methods there are; exit 1 when one differs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.golden.cases import cases, not_covered, run


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.golden FOLDER", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # as recorded
    try:
        found = cases(Path(arguments[0]))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    results = []
    for case in found:
        if case.covered:
            results.append(run(case))
            print(results[-1].line(), flush=True)
    differing = sum(bool(result.problems) for result in results)
    print(f"{len(results)} of {len(found)} cases run: {len(results) - differing} equal, {differing} differing")
    print(f"not yet covered: {', '.join(not_covered(found)) or 'none'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
