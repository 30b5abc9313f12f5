"""Whether a student can learn from a teacher, and which of their blocks to compare. Imports no torch: recipes are validated with it."""

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from compression.checkpoints.checkpoint import Checkpoint
from compression.distillation.settings import FeatureLayers
from compression.errors import EdgepressError, Incompatible


def check_vocabularies(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise Incompatible, naming the first difference, unless a token id means the same to both models.

    Compared are vocabulary, merges and added tokens of both tokenizer.json. Embeddings may be padded to different sizes.
    """
    ours, theirs = (json.loads((checkpoint.path / "tokenizer.json").read_text()) for checkpoint in (student, teacher))
    difference = _difference(ours, theirs)
    if difference:
        raise Incompatible(
            f"student {student.path} and teacher {teacher.path} do not share a vocabulary: {difference}. "
            "Distillation compares logits token by token; take a teacher with the student's tokenizer",
            key="teacher",
        )
    largest = max((index for _, index in _tokens(ours)), default=0)
    for role, checkpoint in (("student", student), ("teacher", teacher)):
        if largest >= checkpoint.vocab_size:
            raise Incompatible(
                f"the tokenizer has a token {largest}, the {role} {checkpoint.path} embeds {checkpoint.vocab_size}", key="teacher"
            )


def check_length(teacher: Checkpoint, length: int) -> None:
    """Raise Incompatible when rows are longer than the teacher reads."""
    if length > teacher.max_length:
        raise Incompatible(f"rows are {length} tokens long, the teacher {teacher.path} reads {teacher.max_length} at most", key="teacher")


def pair_layers(
    spec: FeatureLayers, student_layers: int, teacher_layers: int, origins: Sequence[int] | None = None
) -> dict[int, int]:  # fmt: skip
    """Return the pairs student block -> teacher block (from 0) whose outputs are compared.

    Args:
        spec: last: the last blocks (their output after the final norm).
            middle: the blocks in the middle, number 6 of 12, counted from 1.
            uniform: every student block with the teacher block in `origins`; without these, with the block that is as deep in the
            teacher (Jiao et al., "TinyBERT", 2020).
            A mapping is returned unchanged.
        student_layers: Number of blocks of the student.
        teacher_layers: Number of blocks of the teacher.
        origins: For a student that lost blocks, the teacher block that each of its blocks was.

    Raises:
        EdgepressError: A block does not exist.
    """
    if spec == "last":
        return {student_layers - 1: teacher_layers - 1}
    if spec == "middle":
        return {(student_layers - 1) // 2: (teacher_layers - 1) // 2}
    if spec == "uniform" and origins is not None:
        return dict(enumerate(origins))
    if spec == "uniform":
        return {layer: math.ceil((layer + 1) * teacher_layers / student_layers) - 1 for layer in range(student_layers)}
    if isinstance(spec, str) or not spec:
        raise EdgepressError(
            f"feature_layers is {spec!r}; last, middle, uniform or a mapping student block: teacher block is needed", key="feature_layers"
        )
    for layer, count, role in [(s, student_layers, "student") for s in spec] + [(t, teacher_layers, "teacher") for t in spec.values()]:
        if not 0 <= layer < count:
            raise EdgepressError(
                f"feature_layers names block {layer} of the {role}, which has blocks 0 to {count - 1}", key="feature_layers"
            )
    return dict(spec)


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    kinds = ours["model"].get("type"), theirs["model"].get("type")
    if kinds[0] != kinds[1]:
        return f"the student's tokenizer is {kinds[0]}, the teacher's is {kinds[1]}"
    for what, items in (("token", _tokens), ("merge", _merges), ("added token", _added)):
        for index, (mine, other) in enumerate(zip_longest(items(ours), items(theirs))):
            if mine != other:
                return f"{what} {index} is {_show(mine)} for the student and {_show(other)} for the teacher"
    return None


def _tokens(tokenizer: dict[str, Any]) -> list[tuple[str, int]]:
    vocabulary = tokenizer["model"].get("vocab", {})
    # Unigram models list [piece, score] in the order of ids
    if isinstance(vocabulary, list):
        return [(piece, index) for index, (piece, _) in enumerate(vocabulary)]
    return sorted(vocabulary.items(), key=lambda pair: pair[1])


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, ...]]:
    # older files write a merge as "a b", newer ones as ["a", "b"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in tokenizer["model"].get("merges", [])]


def _added(tokenizer: dict[str, Any]) -> list[tuple[int, str, bool]]:
    return sorted((token["id"], token["content"], token["special"]) for token in tokenizer.get("added_tokens", []))


def _show(item: object) -> str:
    return "missing" if item is None else repr(item)
