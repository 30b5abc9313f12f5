"""llama.cpp's own tokenizer, out of the GGUF file: a copied model.gguf needs nothing beside it."""

import ctypes
from functools import cached_property

from compression.data.templates import conversation
from compression.errors import Incompatible
from export.runtimes.llamacpp import LlamaCppRuntime


class LlamaCppText:
    """Implements compression.evaluation.text.Text with the vocabulary of an open model, and lives as long as that is open."""

    def __init__(self, runtime: LlamaCppRuntime):
        self._llama, self._model = runtime.llama, runtime.model
        self._vocabulary = runtime.llama.llama_model_get_vocab(runtime.model)

    @cached_property
    def ends(self) -> frozenset[int]:
        tokens = range(self._llama.llama_vocab_n_tokens(self._vocabulary))
        return frozenset(token for token in tokens if self._llama.llama_vocab_is_eog(self._vocabulary, token))

    @property
    def templated(self) -> bool:
        return bool(self._llama.llama_model_chat_template(self._model, None))

    def encode(self, text: str) -> list[int]:
        tokens = self._encode(text)
        front = [self._llama.llama_vocab_bos(self._vocabulary)] if self._llama.llama_vocab_get_add_bos(self._vocabulary) else []
        return tokens if tokens[: len(front)] == front else front + tokens

    def encode_chat(self, message: str, system: str | None = None) -> list[int]:
        from export.runtimes.texts import render_chat

        template = self._llama.llama_model_chat_template(self._model, None)
        special = {"bos_token": self._llama.llama_vocab_bos, "eos_token": self._llama.llama_vocab_eos}
        texts = {name: self._spelling(which(self._vocabulary)) for name, which in special.items()}
        return self._encode(render_chat(template.decode() if template else None, conversation(message, system), texts))

    def decode(self, tokens: list[int]) -> str:
        ids, room = (self._llama.llama_token * len(tokens))(*tokens), 16 * len(tokens) + 16
        while True:
            text = ctypes.create_string_buffer(room)
            length = self._llama.llama_detokenize(self._vocabulary, ids, len(tokens), text, room, False, False)
            if length >= 0:
                return text.raw[:length].decode(errors="replace")
            room = -length

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text alone, special ones in it recognized."""
        raw = text.encode()
        room = len(raw) + 16  # a token is at least a byte; a space in front comes on top
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, False, True)
        if count < 0:
            raise Incompatible(f"llama.cpp cannot tokenize this text of {len(raw)} bytes", key="prompt")
        return list(ids[:count])

    def _spelling(self, token: int) -> str:
        return self._llama.llama_vocab_get_text(self._vocabulary, token).decode() if token >= 0 else ""
