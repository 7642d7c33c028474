"""Reads parts of the tensors of a safetensors file by system calls.

The library maps files into memory instead. A process may have some 65,000 maps, and for a page of a map that is not in
memory Linux reads as far ahead as the disk is set to: with 8 MB, a sample of 0.7 MB takes 40 MB. The format:
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
import weakref
from operator import index
from pathlib import Path

import numpy as np

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}  # those that a cache might have


class TensorFile:
    """An open file, closed when the object is garbage-collected. tensors: name -> dtype and shape."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises OSError if the file cannot be opened, ValueError if it is truncated or invalid."""
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        start = 8 + int.from_bytes(os.pread(self._file, 8, 0), "little")
        if start > size:
            raise ValueError("it is truncated")
        self.tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._begins: dict[str, int] = {}
        try:
            header = json.loads(os.pread(self._file, start - 8, 8))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                dtype, shape = DTYPES[entry["dtype"]], tuple(map(index, entry["shape"]))
                begin, end = (start + index(offset) for offset in entry["data_offsets"])
                fits = end - begin == math.prod(shape) * dtype.itemsize and all(length >= 0 for length in shape)
                if not (fits and start <= begin <= end <= size):
                    raise ValueError(f"tensor {name[:40]} is not within the file")
                self.tensors[name], self._begins[name] = (dtype, shape), begin
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("its header is invalid") from error

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows [start, stop) of a tensor, 0 <= start <= stop <= its length.

        Raises OSError if this fails, ValueError if the file has become shorter.
        """
        dtype, (_, *shape) = self.tensors[name]
        rows = np.empty((stop - start, *shape), dtype)
        offset = self._begins[name] + start * math.prod(shape) * dtype.itemsize
        if rows.size and os.preadv(self._file, [rows.data], offset) < rows.nbytes:
            raise ValueError("it is truncated")
        return rows
