"""The README's picture of the statuses, made from the one table of allowed changes.

`python -m tests.support.pictures` writes it into the README.
"""

from __future__ import annotations

import re
from pathlib import Path

from mover.core.states import LIVE, STATUS_NEXT, Status

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- states: begin.*?-->\n).*?(<!-- states: end -->)", re.DOTALL)


def states() -> str:
    """STATUS_NEXT as a Mermaid diagram."""
    lines = [f"    [*] --> {Status.QUEUED}"]
    for status, following in STATUS_NEXT.items():
        lines += [f"    {status} --> {after}" for after in Status if after in following]
    lines += [f"    {status} --> [*]" for status in Status if status not in LIVE]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```", ""])


def with_states(readme: str) -> str:
    return _BLOCK.sub(lambda block: f"{block[1]}{states()}{block[2]}", readme)


if __name__ == "__main__":
    README.write_text(with_states(README.read_text()))
