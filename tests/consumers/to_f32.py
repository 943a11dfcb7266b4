"""Turn a GGUF model into F32, in the environment of llama-cpp-python.

python to_f32.py model.gguf f32.gguf
"""

import ctypes
import sys

import llama_cpp


def to_f32(source, target):
    """Write the model of the file `source` to `target`, in F32."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    names = str(source).encode(), str(target).encode()
    failed = llama_cpp.llama_model_quantize(*names, ctypes.byref(params))
    assert not failed, f"llama_model_quantize: {failed}"


if __name__ == "__main__":
    to_f32(*sys.argv[1:])
