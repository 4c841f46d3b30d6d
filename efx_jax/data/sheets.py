"""Rows of an Excel workbook."""

import contextlib
import pathlib
from typing import Any

from efx_jax.errors import InputError


def read_sheet(path: pathlib.Path, sheet: str, columns: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Reads named columns of one sheet, whose first row is the header; rows without any value are left out.

    Args:
        path: an .xlsx file.
        sheet: the sheet's name; "" takes the first.
        columns: the header's names, contiguous from the first column; nothing to the right of them is read (some
            official sheets have hundreds of empty columns).

    Returns:
        ("file row N", values by column) for every row, N as Excel counts.

    Raises:
        InputError: openpyxl is missing, the file is not a workbook, it has no such sheet, or the header differs.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise InputError(f'{path}: Excel files need openpyxl; run: pip install "efx_jax[hf]"') from error
    try:
        with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            if sheet and sheet not in book.sheetnames:
                raise InputError(
                    f"{path}: no sheet {sheet!r}; found {', '.join(book.sheetnames)}; is it the official file?"
                )
            table = book[sheet or book.sheetnames[0]]
            rows = [tuple(row) for row in table.iter_rows(max_col=len(columns), values_only=True)]
    except InputError:
        raise
    except Exception as error:  # what zip, zlib and XML raise on damaged files, and openpyxl's own
        raise InputError(
            f"{path}: not a readable Excel file ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "fetch it again"
        ) from error
    header = tuple(str(name).strip() for name in rows[0]) if rows else ()
    if header != columns:
        raise InputError(
            f"{path} row 1: expected the columns {', '.join(columns)}, found {', '.join(header) or 'none'}; is it the "
            "official file?"
        )
    return [
        (f"{path} row {number}", dict(zip(columns, row, strict=True)))
        for number, row in enumerate(rows[1:], start=2)
        if any(value is not None for value in row)
    ]
