"""One of our exports, as a process: `run_edgepress.py gguf|genai CHECKPOINT OUT '{"type": ...}'`."""

import json
import sys
from pathlib import Path

from compression.context import Context

what, checkpoint, out, options = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
if what == "gguf":
    from export.gguf import GgufSettings, export_gguf

    threads = options.pop("threads")
    export_gguf(checkpoint, out, GgufSettings(**options), threads=threads, context=Context())
else:
    from export.genai import GenaiSettings, export_genai

    export_genai(checkpoint, out, GenaiSettings(**options), context=Context())
