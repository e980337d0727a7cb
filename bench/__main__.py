"""The command line: which scenario, how long, where to."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from bench import capture

SCENARIOS = {"capture": capture.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="one round instead of five, and shorter")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures go")
    options = parser.parse_args()
    report = asyncio.run(SCENARIOS[options.scenario](quick=options.quick))
    text = json.dumps(report.as_json(), indent=2)
    options.json.write_text(text + "\n")
    print(text)


main()
