"""Array types of the block manager: its whole state is flat numpy arrays, no object a block or a sequence."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

I32: TypeAlias = npt.NDArray[np.int32]
I64: TypeAlias = npt.NDArray[np.int64]
U32: TypeAlias = npt.NDArray[np.uint32]
U64: TypeAlias = npt.NDArray[np.uint64]
Bool: TypeAlias = npt.NDArray[np.bool_]

EMPTY = np.empty(0, np.int32)  # no block
