"""Time, memory and starts of Java for scoring many ScanQA answers; not a test.

    python tests/eval/score_many_rows.py --rows 10000 --protocols official leo

Prints one JSON object per protocol, all scored by one process.
"""

import argparse
import json
import random
import resource
import subprocess
import threading
import time
from pathlib import Path

from vidllm.eval.metrics.scanqa.scores import PROTOCOLS, scanqa_scores


NOUNS = (
    "chair",
    "table",
    "bed",
    "couch",
    "desk",
    "door",
    "window",
    "shelf",
    "lamp",
    "curtain",
    "trash can",
    "nightstand",
)
COLOURS = ("red", "blue", "green", "brown", "white", "black", "gray", "light blue", "dark brown", "wooden")
PLACES = ("next to", "left of", "under", "in front of", "behind", "on top of", "between the wall and")


def made_up_rows(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Answers and accepted answers, half of the former right, one or two of the latter, as in ScanQA."""
    rng = random.Random(seed)

    def answer():
        noun, colour, place = rng.choice(NOUNS), rng.choice(COLOURS), rng.choice(PLACES)
        return rng.choice([colour, noun, f"{colour} {noun}", f"{place} the {colour} {noun}", str(rng.randint(1, 12))])

    accepted = [[answer() for _ in range(rng.randint(1, 2))] for _ in range(count)]
    return [rng.choice(known) if rng.random() < 0.5 else answer() for known in accepted], accepted


class StartsOfJava:
    """Counts the Java programs that are started, and samples their memory."""

    def __init__(self):
        self.programs, self.peak_kib = [], 0
        self._start, self._done = subprocess.Popen.__init__, threading.Event()
        counted = self

        def start(process, command, *args, **kwargs):
            counted._start(process, command, *args, **kwargs)
            if isinstance(command, list) and Path(command[0]).name == "java":
                counted.programs.append((process, next((Path(part).name for part in command if part.endswith(".jar")), "java")))  # fmt: skip

        subprocess.Popen.__init__ = start
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        """The sum of what the programs that run hold, every 50 ms."""
        while not self._done.wait(0.05):
            held = 0
            for process, _ in list(self.programs):
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                held += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
            self.peak_kib = max(self.peak_kib, held)

    def stop(self):
        self._done.set()
        subprocess.Popen.__init__ = self._start


def main() -> None:
    """Score, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--protocols", nargs="+", default=["official"], choices=PROTOCOLS)
    options = parser.parse_args()
    said, accepted = made_up_rows(options.rows, options.seed)
    java = StartsOfJava()
    try:
        for protocol in options.protocols:
            before, start = len(java.programs), time.perf_counter()
            scores = scanqa_scores(said, accepted, protocol=protocol, text=True)
            report = {
                "protocol": protocol,
                "rows": options.rows,
                "seconds": round(time.perf_counter() - start, 1),
                "peak_python_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "peak_java_mib": java.peak_kib // 1024,
                "java_started": [name for _, name in java.programs[before:]],
                "scores": {name: round(value, 4) for name, value in scores.items()},
            }
            print(json.dumps(report), flush=True)
    finally:
        java.stop()


if __name__ == "__main__":
    main()
