"""Encodes the texts of files into files of vectors: in bounded memory, and so that a killed run goes on.

gte_deploy.bulk.encode_files("docs.parquet", "vectors.parquet", model="my-bundle")

See docs/bulk.md. Importing this package loads neither numpy nor pyarrow.
"""

from typing import TYPE_CHECKING, Any

from gte_deploy.bulk.options import BulkOptions

if TYPE_CHECKING:
    from gte_deploy.bulk.run import BulkSummary, encode_files

__all__ = ["BulkOptions", "BulkSummary", "encode_files"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gte_deploy.bulk import run

    return getattr(run, name)
