"""Call a library on made-up CUDA tensors; run under the fake driver. Prints what came of every step as JSON.

``python serve.py LIBRARY < steps``, where each step is [what, arguments].
"""

from __future__ import annotations

import ctypes
import json
import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi imports it where it can, which takes seconds

import tvm_ffi  # noqa: E402

from pagedgen.errors import PagedgenError  # noqa: E402
from pagedgen.runtime.library import Library  # noqa: E402

CODES = {"float": 2, "bfloat": 4, "int": 0, "uint": 1, "e4m3": 10}
KEEP: list[object] = []


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Made:
    """A tensor at an address that nothing lies at, on a GPU that does not exist."""

    def __init__(self, address, kind, bits, shape, strides, device):
        ints = ctypes.c_int64 * len(shape)
        sizes, steps = ints(*shape), ints(*strides)
        tensor = DLTensor(address, 2, device, len(shape), CODES[kind], bits, 1, sizes, steps, 0)
        self.managed = DLManagedTensor(tensor, None, None)
        self.device = (2, device)
        KEEP.extend((self, sizes, steps))

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.byref(self.managed), b"dltensor", None)


def argument(value):
    return tvm_ffi.from_dlpack(Made(**value)) if isinstance(value, dict) else value


def main() -> None:
    library = Library(sys.argv[1])
    results = []
    for what, arguments in json.load(sys.stdin):
        try:
            result = getattr(library, what)(*[argument(value) for value in arguments])
            results.append({"result": result})
        except PagedgenError as error:
            results.append({"error": type(error).__name__, "text": str(error)})
    print(json.dumps(results))


main()
