"""Turn a GGUF model into F32, in the environment of llama-cpp-python.

python to_f32.py model.gguf f32.gguf
"""

import ctypes
import sys

import llama_cpp

source, target = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
sys.exit(failed)
