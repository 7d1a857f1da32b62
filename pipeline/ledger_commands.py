"""`python -m pipeline replay | quality`: what measurements of a finished dataset say."""

from typing import Annotated

import typer

from pipeline.options import ConfigFile, Folder, Sets, console


def replay(folder: Folder = "out", config: ConfigFile = None, sets: Sets = None) -> None:
    """Judge the ledgers of DIR by other thresholds (--set filter.…), without an image; nothing is written."""
    from pipeline.dataset.finished import replay as finished
    from pipeline.shared.files import to_path

    for line in finished.lines(to_path(folder), config, sets or []):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def quality(
    folder: Folder = "out",
    similarity: Annotated[float, typer.Option(min=-1, max=1, help="From which cosine on a pair is one person.")] = 0.48,
) -> None:
    """Tell which measure of quality earns its place, where persons are known (`group`); nothing is written.

    The worst photos by each measure are discarded, and errors of recognition counted in the rest.
    """
    from pipeline.dataset.finished import quality as finished
    from pipeline.shared.files import to_path

    for line in finished.lines(to_path(folder), similarity):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
