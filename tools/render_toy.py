"""Render the toy videos, which the stages otherwise do on first use.

python -m tools.render_toy toy_videos          # one shape per video, for all stages but detect_ava.py
python -m tools.render_toy toy_ava --ava       # several shapes per video, annotated as AVA is, for detect_ava.py
"""

import argparse
from pathlib import Path

from support import toy, toy_ava
from support.processes import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ava", action="store_true", help="those for action detection")
    arguments = parser.parse_args()
    render = toy_ava.render if arguments.ava else toy.render
    print(render(arguments.folder))


if __name__ == "__main__":
    launch(main)
