"""llama.cpp's converter: `run_converter.py CONVERTER CHECKPOINT FILE PRE`.

The converter knows byte-level vocabularies by a hash of token ids and refuses any other. It is told the name here, so that there is
something to compare with.
"""

import sys

folder, checkpoint, file, pre = sys.argv[1:]
sys.path[:0] = [folder, f"{folder}/gguf-py", f"{folder}/packages"]

import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", "f16", "--outfile", file]
convert_hf_to_gguf.main()
