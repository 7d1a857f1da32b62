"""Checks of tables against the columns that `schemas.columns` defines."""

import pyarrow as pa

from schemas.columns import COLUMNS, has_sizes
from schemas.errors import ContractError

SCHEMA_VERSION = 1
"""Raised when a reader of older shards would misread newer ones."""


def check(table: pa.Table, names: tuple[str, ...], owner: str) -> None:
    """Check that a table has exactly these columns, of their types; a ContractError names `owner` and what differs."""
    if set(table.column_names) != set(names):
        missing, extra = sorted(set(names) - set(table.column_names)), sorted(set(table.column_names) - set(names))
        raise ContractError(f"{owner}: missing columns {missing}, undeclared columns {extra}")
    for name in names:
        if table.schema.field(name).type != COLUMNS[name].type:
            raise ContractError(f"{owner}: column {name} is {table.schema.field(name).type}, not {COLUMNS[name].type}")
        if not has_sizes(name, table[name]):
            raise ContractError(f"{owner}: column {name} holds lists of other sizes than it is of")


def check_filled(table: pa.Table, names: tuple[str, ...], owner: str) -> None:
    """A ContractError names `owner` and the first required column that holds a null in a table of living rows."""
    for name in names:
        if not COLUMNS[name].optional and table.column(name).null_count:
            raise ContractError(f"{owner}: column {name} is null for a row that was not dropped")
