"""What is trained on, calibrated with and measured on. Imports no torch.

`spec` describes it, `sources` reads and fingerprints it, `rows` turns it into tokens.
"""

from compression.data.rows import calibration_windows, encode_choices, evaluation_windows, prompt, question_rows, training_rows
from compression.data.sources import check_data, documents, fingerprint, pinned, questions
from compression.data.spec import DataSpec, QuestionSource, TextSource

__all__ = [
    "DataSpec", "QuestionSource", "TextSource", "calibration_windows", "check_data", "documents", "encode_choices",
    "evaluation_windows", "fingerprint", "pinned", "prompt", "question_rows", "questions", "training_rows",
]  # fmt: skip
