"""`python -m pipeline`, which remembers what its test run computed of the bundled sample, and takes its time for it.

As `remembering.py forks` it makes a run of each line, a list of words, in a fork of a process that has imported all;
it prints the number of each process, and its exit code when it has ended.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def fork() -> None:
    """Return in one fork after the other, each with the words of its line."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(2, 1)  # what it prints is none of ours
            sys.argv[1:] = json.loads(line)
            return
        os.write(1, b"%d\n" % child)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit()


if __name__ == "__main__":
    from sample_runs import remembered_models

    from pipeline.__main__ import main
    from stages import STAGES

    with remembered_models(pause_s=0.2):
        if sys.argv[1:] == ["forks"]:
            for step in STAGES.values():
                step.stage()
            for late in ("scipy.spatial", "stages.fetch.native"):  # what a run imports as it goes on
                import_module(late)
            fork()
        main()
