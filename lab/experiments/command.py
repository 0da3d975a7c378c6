"""The command of a study on trained cells: measure them, or print and plot earlier results again."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.experiments import measures
from lab.experiments.cells import Cell

# The keys that identify a row of a study.
IDENTITY = ("cell", "task", "encoder", "recipe", "folds", "embeddings")


def command(
    name: str,
    measure: Callable[[Sequence[Cell], Path, Path], Any],
    tables: Callable[[Any], str],
    plot: Callable[[Any, Path], None] | None = None,
) -> Callable[..., None]:
    """The main function of a study, for Typer.

    Args:
        name: name of the study's files in lab/docs/experiments, NAME.json and NAME.png.
        measure: returns the results of cells, given the folders of the data sets and of the trained models.
        tables: formats the results as text.
        plot: plots the results to a file.
    """

    def main(
        root: Annotated[Path | None, typer.Argument(help="Folder of the data sets.")] = None,
        runs: Annotated[Path | None, typer.Argument(help="Folder of the trained models.")] = None,
        names: Annotated[list[str] | None, typer.Argument(help="Cells, such as mrpc-minilm-D-0.")] = None,
        add: Annotated[bool, typer.Option("--add", help="Keep the earlier results of other models.")] = False,
        redraw: Annotated[
            bool, typer.Option("--redraw", help="Only print and plot the results again.")
        ] = False,
    ) -> None:
        if not redraw:
            if root is None or runs is None or not names:
                raise typer.BadParameter("give DATA, RUNS and cells, or --redraw")
            found = measure([Cell.parse(each) for each in names], root, runs)
            measures.save(name, added(measures.load(name), found) if add else found)
        results = measures.load(name)
        print(tables(results))
        if plot is not None:
            plot(results, measures.RESULTS / f"{name}.png")

    main.__doc__ = (sys.modules[measure.__module__].__doc__ or "").partition("\n")[0]
    return main


def added(earlier: Any, found: Any) -> Any:
    """Earlier results, with those of the same models replaced and new ones appended."""
    if isinstance(earlier, dict):
        return earlier | found
    rows = {tuple(row.get(key) for key in IDENTITY): row for row in [*earlier, *found]}
    return list(rows.values())
