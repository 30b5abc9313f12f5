"""llama.cpp's quantizer with a float16 embedding and head: `run_quantizer.py SOURCE TARGET FILE_TYPE THREADS`. FILE_TYPE is GGUF's number."""

import ctypes
import sys

import llama_cpp

F16 = 1  # GGML_TYPE_F16

source, target, file_type, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.nthread, parameters.ftype = threads, file_type
parameters.token_embedding_type = parameters.output_tensor_type = F16
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
