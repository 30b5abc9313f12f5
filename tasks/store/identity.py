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
    """sha256 of a JSON document in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Machine:
    """Where stages run, as far as it decides bytes: device type and the fixed number of threads of a stage."""

    device: str = "cpu"
    threads: int = 1


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; "absent" for an optional distribution that is not here."""
    return {name: _library_version(name) for name in names}


@cache
def _library_version(name: str) -> str:
    """Looked up once: it takes 10 ms, and a sweep asks for each of its stages."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def identity_document(stage: Stage, inputs: Mapping[str, str], data: str | None, seed: int, machine: Machine) -> dict[str, Any]:
    """The document that is digested, kept in the store beside the content so that a person can compare two identities.

    inputs  identity by role: {"parent": ..., "teacher": ...}
    data    fingerprint of the part of the recipe's data that the stage reads; None where it reads none
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
    """What decides bytes among a stage's parameters, under the names that they first had: a new name leaves stored results valid.

    Roles hold names of stages and places of models, so they are left out: `inputs` has their identities.
    """
    first_names = {today: former for former, today in stage.former_names.items()}
    values = stage.model_dump(mode="json", exclude={*stage.other_inputs(), *stage.outside_inputs()})
    return {first_names.get(name, name): value for name, value in values.items()}


def seed_of(identity: str) -> int:
    """The 31-bit seed of a stage's random draws."""
    return int(identity[:8], 16) & 0x7FFFFFFF
