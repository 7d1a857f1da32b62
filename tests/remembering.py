"""`python -m pipeline`, which remembers what its test run computed of the bundled sample, and takes its time for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    from sample_runs import remembered_models

    from pipeline.__main__ import main

    with remembered_models(pause_s=0.2):
        main()
