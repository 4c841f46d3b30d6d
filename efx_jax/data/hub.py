"""Rows of a data set on the Hugging Face Hub, as plain dictionaries; no script of a data set is ever run."""

import dataclasses
import itertools
from typing import Any

from efx_jax.errors import MissingInputError

PARQUET_BRANCH = "refs/convert/parquet"
"""Plain data that the Hub generates from every data set, even those whose loaders are scripts; each configuration has a
folder in it, with a folder per split."""


@dataclasses.dataclass(frozen=True)
class HubTable:
    """One split of a data set on the Hub.

    `revision` is a branch, tag or commit, "" for the main branch. `file` names the files to read if the data set
    defines no configuration for them; with the name "json" it is the address of JSON lines anywhere on the Hub.
    `first`: rows read from the beginning; 0 reads all. `streams`: whether to read without fetching the rest and without
    caching anything on disk.
    """

    name: str
    config: str = ""
    split: str = "train"
    revision: str = ""
    file: str = ""
    first: int = 0
    streams: bool = False


def read_hub(table: HubTable, names_labels: bool = False) -> list[dict[str, Any]]:
    """Reads every row of a split, or its first ones.

    Args:
        table: the split to read.
        names_labels: whether to replace the class numbers of a label column with the class names.

    Raises:
        MissingInputError: `datasets` is missing, or the data set cannot be read.
    """
    title = table.file if table.name == "json" else table.name
    try:
        import datasets
    except ImportError as error:
        raise MissingInputError(
            f"{title}: no such file, and reading a Hub data set needs `datasets`; run: pip install datasets"
        ) from error
    # On that branch a data set without configurations has one called "default".
    file = f"{table.config or 'default'}/{table.split}/*.parquet" if table.revision == PARQUET_BRANCH else table.file
    try:
        rows = datasets.load_dataset(
            table.name,
            None if file else table.config or None,
            data_files=file or None,
            split="train" if file else table.split,  # files named directly all form one split, "train"
            revision=table.revision or None,
            streaming=table.streams,
        )
        found: list[dict[str, Any]] = list(itertools.islice(rows, table.first or None))
        features = (getattr(rows, "features", None) or {}) if names_labels else {}
        labels = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
        if not labels:
            return found
        # -1 stands for a row without a label.
        return [
            row | {name: kind.int2str(row[name]) for name, kind in labels.items() if row[name] not in (None, -1)}
            for row in found
        ]
    except Exception as error:  # the Hub clients raise from a dozen unrelated classes
        raise MissingInputError(
            f"{title}: no such file, and the Hub data set cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check the name and the network, or download a JSONL, CSV or "
            "Parquet file"
        ) from error
