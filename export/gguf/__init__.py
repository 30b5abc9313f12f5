"""GGUF files: tensors, tokenizer, metadata, and llama.cpp as quantizer."""
