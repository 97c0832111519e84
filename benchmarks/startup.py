"""How long the command line takes to answer if there is nothing to compute.

    python -m benchmarks.startup [--rounds 10] [--json FILE]

Every command runs in a separate process, in turn; the smallest time is least disturbed by other work on the machine.
"""

import statistics
import subprocess
import sys
import time

from benchmarks.common import parser, report

COMMANDS = {
    "python": ["-c", "pass"],
    "hfedmoe --help": ["-m", "hfedmoe", "--help"],
    "hfedmoe run --help": ["-m", "hfedmoe", "run", "--help"],
    "hfedmoe --version": ["-m", "hfedmoe", "--version"],
    "hfedmoe run --show-config": ["-m", "hfedmoe", "run", "--show-config"],
    "a config with an unknown key": ["-m", "hfedmoe", "run", "--set", "train.learning_rate=1"],
}
LIMIT_S = 0.5


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=10, help="how often every command is run")
    options = arguments.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start)
    rows = [
        {"command": name, "s min": min(times), "s median": statistics.median(times)} for name, times in seconds.items()
    ]
    best = min(seconds["hfedmoe --help"])
    report(rows, {"help_s": best, "help_under_limit": best < LIMIT_S, "limit_s": LIMIT_S}, options.json)


if __name__ == "__main__":
    main()
