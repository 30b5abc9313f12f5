"""From a recipe to a plan: every stage checked against the configs that will reach it, its identity, its estimated size. Imports no torch."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compression.checkpoint import Checkpoint
from compression.data import check_data, fingerprint
from compression.errors import EdgepressError, Incompatible
from compression.quantization.settings import linear_bits
from export.proof import KL_TO_PARENT
from flows.recipe import BASE, Node, ParsedRecipe
from flows.yaml_lines import KeyPath
from tasks.base import Base, open_base
from tasks.extras import require
from tasks.gates import Bound
from tasks.identity import Machine, digest, identity_document
from tasks.kinds._training import TrainingStage
from tasks.perform import Assignment
from tasks.stage import Artifact, Planned, check_accepts
from tasks.store import Store

_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Plan:
    """A recipe that can run: the base model and its stages in topological order, the base first."""

    parsed: ParsedRecipe
    base: Base
    machine: Machine
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True)
class Estimate:
    """What a stage will take, in bytes: its content, and at its peak in memory and on disk while it runs. Rough, from shapes alone."""

    size: int
    memory: int
    disk: int


def make_plan(parsed: ParsedRecipe, store: Store) -> Plan:
    """Check everything that can be checked before work starts.

    Raises EdgepressError with file, line and key: model, data, a stage that cannot work on what reaches it, a gate on nothing.
    """
    recipe = parsed.recipe
    machine = Machine(_device(recipe.device), recipe.threads)
    try:
        base = open_base(recipe.model.path, recipe.model.revision, recipe.model.license, store.root)
        _ = base.checkpoint.linear_widths()  # an architecture that no stage and no estimate knows
    except EdgepressError as error:
        raise parsed.error(("model",), str(error)) from None
    try:
        check_data(recipe.data)
        data_digest = fingerprint(recipe.data)
    except EdgepressError as error:
        raise parsed.error(("data", error.key) if error.key else ("data",), str(error)) from None
    if recipe.data.length > base.checkpoint.max_length:
        raise parsed.error(
            ("data", "length"), f"{recipe.data.length} tokens are more than the model's {base.checkpoint.max_length} positions"
        )
    _check_gates(parsed)
    first = Assignment(
        BASE, 0, None, base.identity, {"base": base.source, "revision": base.revision, "content": base.content, "data": data_digest}, {}, (),
        base.checkpoint, gates=recipe.gates.get(BASE, {}),
    )  # fmt: skip
    done = {BASE: first}
    for index, node in enumerate(parsed.nodes, 1):
        done[node.name] = _assign(parsed, node, index, done, machine, store)
    return Plan(parsed, base, machine, tuple(done.values()))


def _assign(
    parsed: ParsedRecipe, node: Node, index: int, done: Mapping[str, Assignment], machine: Machine, store: Store
) -> Assignment:  # fmt: skip
    recipe, stage = parsed.recipe, node.stage
    outside = {role: _open_outside(parsed, node, role, source, store) for role, source in stage.outside_inputs().items()}
    try:
        parent = check_accepts(stage, done[node.parent].planned)
        others = {role: done[name].planned for role, name in stage.other_inputs().items()}
        others |= {role: model.checkpoint for role, model in outside.items()}
        planned = stage.plan(parent, others, recipe.data)
        if stage.extra:
            require(stage.extra, f"the stage {node.name} ({stage.uses})")
    except EdgepressError as error:
        key = "uses" if error.key == "model" else error.key  # the kind does not take this model
        path: KeyPath = ("stages", node.name, key) if key else ("stages", node.name)
        raise parsed.error(path, str(error)) from None
    bounds: dict[str, Bound] = dict(node.execution.bounds)
    if isinstance(planned, Artifact):
        bounds = {"kl_to_parent": Bound(max=KL_TO_PARENT[planned.change]), **bounds}
    ancestors = dict.fromkeys(name for input_name in node.inputs.values() for name in (*done[input_name].ancestors, input_name))
    identities = {role: done[name].identity for role, name in node.inputs.items()}
    identities |= {role: model.identity for role, model in outside.items()}
    document = identity_document(stage, identities, recipe.data, recipe.seed, machine)
    return Assignment(
        node.name, index, stage, digest(document), document, node.inputs, tuple(ancestors), planned, outside=outside, bounds=bounds,
        gates=recipe.gates.get(node.name, {}), retries=node.execution.retries, timeout=node.execution.timeout,
    )  # fmt: skip


def _open_outside(parsed: ParsedRecipe, node: Node, role: str, source: str, store: Store) -> Base:
    path, _, revision = source.partition("@")
    try:
        return open_base(path, revision or None, None, store.root)
    except EdgepressError as error:
        raise parsed.error(("stages", node.name, role), str(error)) from None


def _check_gates(parsed: ParsedRecipe) -> None:
    order = [BASE, *(node.name for node in parsed.nodes)]
    parents = {node.name: node.parent for node in parsed.nodes}
    for stage in parsed.recipe.gates:
        if stage not in order:
            raise parsed.error(("gates", stage), f"there is no stage {stage!r}; stages: {', '.join(order)}")
    bounds: list[tuple[KeyPath, str, Mapping[str, Bound]]] = [
        (("stages", node.name, "bounds"), node.name, node.execution.bounds) for node in parsed.nodes
    ]
    bounds += [(("gates", stage), stage, gates) for stage, gates in parsed.recipe.gates.items()]
    for path, stage, by_metric in bounds:
        for metric, bound in by_metric.items():
            reference = parents.get(stage, BASE) if bound.relative_to == "parent" else bound.relative_to
            above = _above(parsed, stage) | {BASE}
            if reference not in above:
                raise parsed.error(
                    (*path, metric), f"relative_to {bound.relative_to!r} is none of the stages before {stage}: {', '.join(sorted(above))}"
                )


def _above(parsed: ParsedRecipe, stage: str) -> set[str]:
    inputs = {node.name: set(node.inputs.values()) for node in parsed.nodes}
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        for name in inputs.get(waiting.pop(), set()) - found:
            found.add(name)
            waiting.append(name)
    return found


def _device(wanted: str) -> str:
    """`auto` is cuda where the driver's device files are, else cpu: asked without torch, so that planning stays fast."""
    if wanted != "auto":
        return wanted
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def estimate(task: Assignment, plan: Plan) -> Estimate:
    """Rough sizes from shapes: training holds weights, gradients and two moments in float32, and keeps two of its checkpoints on disk."""
    size = content_bytes(task.planned)
    parent = next((a.planned for a in plan.assignments if a.name == task.inputs.get("parent")), task.planned)
    weights = 4 * (parent.num_parameters if isinstance(parent, Checkpoint) else 0)
    if isinstance(task.stage, TrainingStage):
        outside = sum(4 * model.checkpoint.num_parameters for model in task.outside.values())
        teacher = weights if "teacher" in task.inputs else outside
        copies = task.stage.distributed.processes if task.stage.distributed else 1
        best = weights if task.stage.evaluate_every else 0  # the best weights so far
        return Estimate(size, copies * (4 * weights + teacher + best), size + 2 * 3 * weights)
    return Estimate(size, weights + size, size if task.stage is not None else 0)


def content_bytes(planned: Planned) -> int:
    if not isinstance(planned, Checkpoint):
        return planned.size_bytes
    dense = _DTYPE_BYTES.get(planned.dtype, 4)
    linear = planned.num_layers * sum(out * width for out, width in planned.linear_widths().values())
    rest = (planned.num_parameters - linear) * dense
    if planned.layout in ("dense", "w8a8", "fp8"):
        return int(rest + linear * (dense if planned.layout == "dense" else 1))
    return int(rest + linear_bits(planned, float_bits=8 * dense) / 8)


def check_disk(plan: Plan, store: Store) -> None:
    """Raises EdgepressError when the disk of the store cannot hold what is still to be made."""
    todo = [estimate(task, plan) for task in plan.assignments if task.stage is not None and not store.has(task.identity)]
    needed = sum(e.size for e in todo) + max((e.disk for e in todo), default=0)
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise Incompatible(
            f"the disk of {store.root} has {free / 1e9:.1f} GB free, and this plan needs about {needed / 1e9:.1f} GB; free some, or use another --store"
        )
