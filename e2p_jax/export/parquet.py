"""A prefix table as Parquet, one row a user, for the bulk loaders of feature stores and key-value databases."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from e2p_jax.export.prefix_reader import PrefixTable
from e2p_jax.files import explain_full_disk, replace_file


def write_parquet(table: PrefixTable, path: Path) -> None:
    """Columns `id` (text), `version` (text, the table's) and `prefix`, a fixed-size list of K*D numbers, row by row of
    [K, D], in float16 or float32: bfloat16, which Arrow has not, becomes float32 without loss. A shard is held at once.

    The schema's metadata say `num_tokens` (K), `width` (D) and `backbone` (its fingerprint).

    Raises:
      UserError: a damaged table, or a full disk.
    """
    (k, d), stored = table.shape, table.manifest["dtype"]
    dtype = np.float16 if stored == "float16" else np.float32
    said = {"num_tokens": str(k), "width": str(d), "backbone": table.manifest["backbone"]["fingerprint"]}
    prefix = pa.list_(pa.from_numpy_dtype(dtype), k * d)
    schema = pa.schema({"id": pa.string(), "version": pa.string(), "prefix": prefix}, said)

    def batches() -> Iterator[pa.RecordBatch]:
        for ids, rows in table.shards():
            numbers = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(dtype).ravel()), k * d)
            columns = [pa.array(ids, pa.string()), pa.array([table.version] * len(ids)), numbers]
            yield pa.record_batch(columns, schema)

    with explain_full_disk(path), replace_file(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for batch in batches():
            writer.write_batch(batch)
