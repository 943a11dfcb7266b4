"""Steer a model with a control vector file in llama.cpp, at its layer and at the two beside it.

python run_llama_cpp.py model.gguf vector.gguf ids.npy out.npz

The model is turned into F32 first, since quantized activations would blur the comparison. The file
is read by llama.cpp's own GGUF parser, with the checks of its common_control_vector_load. ids.npy:
(1, T). out.npz: layer, and logits (T, V) as plain, below, at, above.
"""

import ctypes
import re
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from to_f32 import to_f32


class GgufParams(ctypes.Structure):
    """struct gguf_init_params of ggml/include/gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def read_direction(path):
    """(layer, fp32 vector (n,)) of a control vector file with one direction."""
    (library,) = Path(llama_cpp.__file__).parent.joinpath("lib").glob("libggml-base.so")
    ggml = ctypes.CDLL(str(library))

    def call(name, kind, *arguments):
        getattr(ggml, name).restype = kind
        return getattr(ggml, name)(*arguments)

    params = GgufParams(no_alloc=True, ctx=None)
    file = ctypes.c_void_p(call("gguf_init_from_file", ctypes.c_void_p, str(path).encode(), params))
    assert file, f"llama.cpp does not read {path}"
    assert call("gguf_get_n_tensors", ctypes.c_int64, file) == 1
    index = ctypes.c_int64(0)
    name = call("gguf_get_tensor_name", ctypes.c_char_p, file, index).decode()
    assert call("gguf_get_tensor_type", ctypes.c_int, file, index) == 0, "not F32"
    start = call("gguf_get_data_offset", ctypes.c_size_t, file)
    start += call("gguf_get_tensor_offset", ctypes.c_size_t, file, index)
    size = call("gguf_get_tensor_size", ctypes.c_size_t, file, index)
    vector = np.frombuffer(Path(path).read_bytes()[start : start + size], dtype="<f4")
    return int(re.fullmatch(r"direction\.(\d+)", name)[1]), vector


def logits_of(model, ids):
    """Logits (T, V) of every token."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], dtype=np.float32)


def main():
    model_file, vector_file, ids_file, out = sys.argv[1:]
    ids = np.load(ids_file)[0].tolist()
    layer, vector = read_direction(vector_file)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "f32.gguf"))
        to_f32(model_file, path)
        model = llama_cpp.Llama(
            path, n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        )  # fmt: skip
    results = {"layer": layer, "plain": logits_of(model, ids)}
    for name, k in (("below", layer - 1), ("at", layer), ("above", layer + 1)):
        data = np.zeros((k, len(vector)), dtype=np.float32)
        data[k - 1] = vector  # of layers 1..k
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        failed = llama_cpp.llama_set_adapter_cvec(model.ctx, pointer, data.size, len(vector), k, k)
        assert not failed, f"llama_set_adapter_cvec: {failed}"
        results[name] = logits_of(model, ids)
    np.savez(out, **results)


if __name__ == "__main__":
    main()
