"""Every recorded case with ten seeds: how often the search ends within 1% of the exhaustive best.

    python tests/autotune/replay_all.py [NOISE]

NOISE is the relative standard deviation of a timing; with it, the best of the eight finalists counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from recorded import Replay
from test_replay import CASES, regret_of_finalists, run


def main(noise: float = 0.0) -> None:
    within = 0
    for case in CASES:
        ends = []
        for seed in range(10):
            found = run(case, Replay(case, noise, seed), seed)
            assert found.best is not None
            ends.append(regret_of_finalists(case, found) if noise else case.regret(found.best.schedule))
        good = sum(end <= 0.01 for end in ends)
        within += good
        print(f"{good:2d} of 10, worst {max(ends):.1%}: {case.name}")
    print(f"{within} of {10 * len(CASES)} within 1%")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
