"""Identity: the digest of everything that decides a stage's bytes, and of nothing else. Imports no torch.

The seed of every random draw of a stage derives from this digest, never from the stage's name.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tasks.stage import Stage


def digest(document: Any) -> str:
    """Return the sha256 of a JSON document in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Machine:
    """The machine of a stage as far as it decides bytes: the device, and the fixed number of threads of a stage."""

    device: str = "cpu"
    threads: int = 1


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions by distribution; "absent" for one that is not installed."""
    return {name: _library_version(name) for name in names}


@cache
def _library_version(name: str) -> str:
    """Look up one version, once a process: it takes 10 ms, and a sweep needs it for each of its stages."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def identity_document(stage: Stage, inputs: Mapping[str, str], data: str | None, seed: int, machine: Machine) -> dict[str, Any]:
    """Return the document whose digest is the identity; the store keeps it beside the content, so that a person can compare two identities.

    Args:
        stage: The kind with its parameters.
        inputs: Identity by role: {"parent": ..., "teacher": ...}.
        data: Fingerprint of the part of the recipe's data that the stage reads; None where it reads none.
        seed: The recipe's seed.
        machine: Where the stage runs.
    """
    return {
        "uses": stage.uses,
        "version": stage.version,
        "parameters": _parameters(stage),
        "inputs": dict(inputs),
        "data": data,
        "seed": seed,
        "device": machine.device.split(":")[0],
        "threads": machine.threads,
        "libraries": library_versions(stage.deciding_libraries()),
    }


def _parameters(stage: Stage) -> dict[str, Any]:
    """Return the parameters that decide bytes, under their first names: a renamed parameter leaves stored results valid.

    Parameters that name other inputs are left out: `inputs` has the identities of what they name. So are `added_parameters` at their
    defaults, with which a stage does what it did before they were added.
    """
    first_names = {current: former for former, current in stage.former_names.items()}
    unset = {name for name in stage.added_parameters if getattr(stage, name) == type(stage).model_fields[name].default}
    values = stage.model_dump(mode="json", exclude={*stage.other_inputs(), *stage.outside_inputs(), *unset})
    return {first_names.get(name, name): value for name, value in values.items()}


def seed_of(identity: str) -> int:
    """Return the 31-bit seed of a stage's random draws."""
    return int(identity[:8], 16) & 0x7FFFFFFF
