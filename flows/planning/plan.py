"""From a recipe to a plan: every stage checked against the configs that will reach it, its identity, its estimated size. Imports no torch."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from compression.checkpoints.checkpoint import Checkpoint
from compression.checkpoints.quantization_config import linear_bits
from compression.data import check_data, fingerprint, pinned
from compression.data.fill import check_evaluation as check_evaluation_rows
from compression.data.templates import check_template
from compression.errors import EdgepressError, Incompatible
from compression.evaluation.checks import check_evaluation, extras
from export.proof import KL_TO_PARENT
from flows.planning.gate_checks import check_gates, metrics_of
from flows.planning.graph import BASE, Node
from flows.planning.recipe import ParsedRecipe, Recipe, split_revision
from flows.planning.registration import registered
from flows.planning.source_map import nearest, shortened
from flows.planning.study import StudyError, check_metrics
from tasks.base import Base, open_base
from tasks.extras import require
from tasks.kinds._training import TrainingStage
from tasks.measurement.gates import Bound
from tasks.measurement.kinds import MEASUREMENTS
from tasks.measurement.measurement import MeasurementRequest
from tasks.planned_stage import PlannedStage
from tasks.runners.machine import default_device, why_no_cuda
from tasks.stage import Artifact, Corpus, Planned, Reads, check_accepts
from tasks.store.identity import Machine, digest, identity_document, seed_of
from tasks.store.store import Store

_CANNOT = (EdgepressError, OSError)  # a mistake, or a file that cannot be read: both are told with the line that names it
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Plan:
    """A recipe that can run: the base model and its stages in topological order, the base first.

    measured_with  by measurement the digest of what decides its figures besides the model: the data by content, the settings; not of those
                   that are taken alone, whose figures the machine decides
    ancestors      of every stage of the recipe, also of those that the plan was cut down by
    """

    parsed: ParsedRecipe
    base: Base
    machine: Machine
    stages: tuple[PlannedStage, ...]
    measured_with: Mapping[str, str]
    ancestors: Mapping[str, tuple[str, ...]]
    only: tuple[str, ...] = ()  # what it was cut down to, as it was asked
    left_out: int = 0  # results of the sweep that it was cut down by
    remeasure: bool = False  # take timings again even if the store has them

    @cached_property
    def by_name(self) -> Mapping[str, PlannedStage]:
        return {stage.name: stage for stage in self.stages}


@dataclass(frozen=True)
class Estimate:
    """What a stage will take, in bytes: its content, and at its peak in memory and on disk while it runs. Rough, from shapes alone."""

    size: int
    memory: int
    disk: int


def make_plan(parsed: ParsedRecipe, store: Store, *, elsewhere: bool = False) -> Plan:
    """Check everything that can be checked before work starts. `elsewhere`: it will run on a machine whose GPUs are not known here.

    Raises EdgepressError with file, line and key: a device that is not there, model, data, a stage that cannot work on what reaches it, a
    gate on nothing.
    """
    recipe = parsed.recipe
    machine = Machine(default_device() if recipe.device == "auto" else recipe.device, recipe.threads)
    if recipe.device == "cuda" and not elsewhere and (reason := why_no_cuda()):
        raise parsed.error(("device",), f"cuda cannot be used here: {reason}; `device: auto` takes what there is")
    try:
        base = open_base(recipe.model.path, recipe.model.revision, recipe.model.license, store.root)
        _ = base.checkpoint.linear_widths()  # an architecture that no stage and no estimate knows
    except _CANNOT as error:
        raise parsed.error(("model",), _words(error)) from None
    try:
        recipe = recipe.model_copy(update={"data": pinned(recipe.data)})
        check_data(recipe.data)
        data_digest = fingerprint(recipe.data)
    except _CANNOT as error:
        key = getattr(error, "key", None)
        raise parsed.error(("data", key) if key else ("data",), _words(error)) from None
    parsed = parsed.model_copy(update={"recipe": recipe})
    if recipe.data.length > base.checkpoint.max_length:
        raise parsed.error(
            ("data", "length"), f"{recipe.data.length} tokens are more than the model's {base.checkpoint.max_length} positions"
        )
    _check_evaluation(parsed, base)
    _check_text(parsed, base)
    first = PlannedStage(
        BASE, 0, None, base.identity, {"base": base.source, "revision": base.revision, "content": base.content, "data": data_digest}, {}, (),
        base.checkpoint, gates=recipe.gates.get(BASE, {}),
    )  # fmt: skip
    fingerprints: dict[Reads, str | None] = {"nothing": None}
    done = {BASE: first}
    cells = _cells(parsed)
    for index, node in enumerate(parsed.nodes, 1):
        part = node.stage.data_read()
        if part != "nothing" and part not in fingerprints:
            fingerprints[part] = fingerprint(recipe.data, part)  # of files: once, not for each stage of a sweep
        stage = _assign(parsed, node, index, done, fingerprints[part], machine, store)
        try:
            node.stage.check_text(check_accepts(node.stage, done[node.parent].product), recipe.data, seed_of(stage.identity))
        except EdgepressError as error:
            if error.key in type(node.stage).model_fields:
                raise parsed.stage_error(node, (error.key,), str(error)) from None
            raise _data_error(parsed, error, f"{node.name}: {error}") from None
        done[node.name] = replace(stage, cell=cells.get(node.name, ""))
    check_gates(parsed, done, recipe.evaluation)
    _check_study(parsed, done)
    ancestors = {name: stage.ancestors for name, stage in done.items()}
    plan = Plan(parsed, base, machine, tuple(done.values()), _measured_with(recipe, done.values()), ancestors)
    models = registered(parsed, plan.stages)
    stages = [replace(stage, memory=estimate(stage, plan).memory, registered=models.get(stage.name, "")) for stage in plan.stages]
    return replace(plan, stages=tuple(stages))


def _check_study(parsed: ParsedRecipe, stages: Mapping[str, PlannedStage]) -> None:
    """Raises EdgepressError for a metric that the study shows or judges by, and that no result of the sweep will have."""
    recipe = parsed.recipe
    if recipe.study is None:
        return
    results = dict.fromkeys(branch.stages[leaf] for branch in parsed.branches for leaf in branch.leaves)
    measured = dict.fromkeys(metric for name in results for metric in metrics_of(stages[name], recipe.data, recipe.evaluation))
    try:
        check_metrics(recipe.study, measured)
    except StudyError as mistake:
        raise parsed.error(mistake.path, str(mistake)) from None


def _check_evaluation(parsed: ParsedRecipe, base: Base) -> None:
    """Raises EdgepressError for packages, files and stages of `evaluation` that are missing, or of another shape."""
    spec, key = parsed.recipe.evaluation, ""
    try:
        for extra, key in extras(spec).items():
            require(extra, f"evaluation.{key}")
        check_evaluation(spec, base.checkpoint.path, base.checkpoint.max_length)
    except _CANNOT as error:
        key = getattr(error, "key", None) or key
        raise parsed.error(("evaluation", key) if key else ("evaluation",), _words(error)) from None


def _check_text(parsed: ParsedRecipe, base: Base) -> None:
    """Raises EdgepressError where the chat template refuses a question, or the test data cannot be measured with."""
    recipe, path = parsed.recipe, base.checkpoint.path
    try:
        if recipe.data.questions is not None or recipe.evaluation.chats:
            check_template(path, recipe.data.system)
        check_evaluation_rows(recipe.data, path, base.checkpoint.vocab_size)
    except EdgepressError as error:
        raise _data_error(parsed, error, str(error)) from None


def _data_error(parsed: ParsedRecipe, error: EdgepressError, message: str) -> EdgepressError:
    """At the key of `data:` that is at fault, or at the model."""
    return parsed.error(("model",) if error.key == "model" else ("data", error.key) if error.key else ("data",), message)


def _measured_with(recipe: Recipe, stages: Iterable[PlannedStage]) -> dict[str, str]:
    """By measurement, or part of one, that is made of a stage or of the base, the digest of its version, data and settings."""
    found: dict[str, str] = {}
    for stage in stages:
        if isinstance(stage.product, Corpus):
            continue
        request = MeasurementRequest(stage.product, stage.roles, recipe.data, recipe.evaluation)
        for one in MEASUREMENTS:
            parts = {} if one.exclusive else one.parts(request)
            for name in parts.keys() - found.keys():
                found[name] = digest({"version": one.version, **one.document(parts[name])})[:12]
    return found


def _assign(
    parsed: ParsedRecipe, node: Node, index: int, done: Mapping[str, PlannedStage], data: str | None, machine: Machine, store: Store
) -> PlannedStage:  # fmt: skip
    recipe, stage = parsed.recipe, node.stage
    outside = {role: _open_outside(parsed, node, role, source, store) for role, source in stage.outside_inputs().items()}
    try:
        parent = check_accepts(stage, done[node.parent].product)
        others = {role: done[name].product for role, name in stage.other_inputs().items()}
        others |= {role: model.checkpoint for role, model in outside.items()}
        planned = stage.plan(parent, others, recipe.data)
        if stage.extra:
            require(stage.extra, f"the stage {node.name} ({stage.uses})")
    except _CANNOT as error:
        key = getattr(error, "key", None)
        key = "uses" if key == "model" else key  # the kind does not take this model
        raise parsed.stage_error(node, (key,) if key else (), _words(error)) from None
    bounds: dict[str, Bound] = dict(node.execution.bounds)
    if isinstance(planned, Artifact):
        bounds = {"kl_to_parent": Bound(max=KL_TO_PARENT[planned.change], strict=True), **bounds}
    ancestors = dict.fromkeys(name for input_name in node.inputs.values() for name in (*done[input_name].ancestors, input_name))
    identities = {role: done[name].identity for role, name in node.inputs.items()}
    identities |= {role: model.identity for role, model in outside.items()}
    document = identity_document(stage, identities, data, node.seed, machine)
    if isinstance(planned, Artifact) and recipe.model.license:
        document["license"] = recipe.model.license  # which artifacts state; a card's is part of the base's content
    return PlannedStage(
        node.name, index, stage, digest(document), document, node.inputs, tuple(ancestors), planned, outside=outside, bounds=bounds,
        gates=node.gates, retries=node.execution.retries, timeout=node.execution.timeout, job_variables=node.execution.job_variables,
    )  # fmt: skip


def _open_outside(parsed: ParsedRecipe, node: Node, role: str, source: str, store: Store) -> Base:
    path, revision = split_revision(source)
    try:
        return open_base(path, revision, None, store.root)
    except _CANNOT as error:
        raise parsed.stage_error(node, (role,), _words(error)) from None


def _words(error: Exception) -> str:
    """What is wrong; of a file that the system does not give, its name and the system's word for it."""
    return f"{shortened(str(error.filename))}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _cells(parsed: ParsedRecipe) -> dict[str, str]:
    """By stage the cell that alone needs it, where one does."""
    users: dict[str, list[str]] = {}
    for branch in parsed.branches:
        for name in branch.stages.values():
            users.setdefault(name, []).append(branch.name)
    swept = {node.name for node in parsed.nodes if node.moved}
    return {name: cells[0] for name, cells in users.items() if len(cells) == 1 and name in swept}


def estimate(stage: PlannedStage, plan: Plan) -> Estimate:
    """Rough sizes from shapes: training holds weights, gradients and two moments in float32, and keeps two of its checkpoints on disk."""
    size = content_bytes(stage.product)
    parent = plan.by_name[stage.inputs["parent"]].product if stage.definition is not None else stage.product
    weights = 4 * (parent.num_parameters if isinstance(parent, Checkpoint) else 0)
    if isinstance(stage.definition, TrainingStage):
        outside = sum(4 * model.checkpoint.num_parameters for model in stage.outside.values())
        teacher = weights if "teacher" in stage.inputs else outside
        copies = stage.definition.distributed.processes if stage.definition.distributed else 1
        best = weights if stage.definition.evaluate_every else 0  # the best weights so far
        return Estimate(size, copies * (4 * weights + teacher + best), size + 2 * 3 * weights)
    return Estimate(size, weights + size, size if stage.definition is not None else 0)


def content_bytes(planned: Planned) -> int:
    if not isinstance(planned, Checkpoint):
        return planned.size_bytes
    dense = _DTYPE_BYTES.get(planned.dtype, 4)
    linear = planned.num_layers * sum(out * width for out, width in planned.linear_widths().values())
    rest = (planned.num_parameters - linear) * dense
    if planned.layout in ("dense", "w8a8", "fp8"):
        return int(rest + linear * (dense if planned.layout == "dense" else 1))
    return int(rest + linear_bits(planned, float_bits=8 * dense) / 8)


def select(plan: Plan, *, only: Sequence[str] = (), first: Sequence[str] = (), force: Sequence[str] = ()) -> Plan:
    """The part of a plan that is to run, with what of it is to be computed whatever the store has.

    only   these stages and their ancestors; empty: all
    first  these, and what descends from them, are computed again (`--from`)
    force  these are computed again
    Each word is the name of a stage in the recipe, which means all its copies, or that of a copy; or several with commas between them.
    Raises EdgepressError for a name that is none, and for a stage to compute again that `only` leaves out.
    """
    wanted = _named(plan, "--only", only)
    kept = plan.by_name.keys() if not only else {name for stage in wanted for name in (stage, *plan.by_name[stage].ancestors)}
    roots = _named(plan, "--from", first)
    forced = _named(plan, "--force", force)
    for option, names in (("--from", roots), ("--force", forced)):
        if outside := [name for name in names if name not in kept]:
            raise EdgepressError(
                f"{option}: {', '.join(outside)} is not among what --only leaves: {', '.join(n for n in kept if n != BASE)}"
            )
    again = {
        stage.name for stage in plan.stages if stage.name in forced or stage.name in roots or not set(roots).isdisjoint(stage.ancestors)
    }
    branches = [
        branch.model_copy(update={"leaves": leaves})
        for branch in plan.parsed.branches
        if (leaves := tuple(leaf for leaf in branch.leaves if branch.stages[leaf] in kept))
    ]
    nodes = tuple(node for node in plan.parsed.nodes if node.name in kept)
    parsed = plan.parsed.model_copy(update={"nodes": nodes, "branches": tuple(branches)})
    stages = tuple(replace(stage, recompute=stage.name in again) for stage in plan.stages if stage.name in kept)
    left_out = sum(len(branch.leaves) for branch in plan.parsed.branches) - sum(len(branch.leaves) for branch in branches)
    return replace(plan, parsed=parsed, stages=stages, only=tuple(only), left_out=left_out)


def _named(plan: Plan, option: str, words: Sequence[str]) -> list[str]:
    """The names in the graph that words of the command line mean. A copy's name may have commas of its own: the longest name that fits is meant."""
    known: dict[str, list[str]] = {}
    for node in plan.parsed.nodes:
        known.setdefault(node.origin, []).append(node.name)
    known |= {node.name: [node.name] for node in plan.parsed.nodes}
    found: list[str] = []
    for word in words:
        parts = [part.strip() for part in word.split(",")]
        while parts:
            length = next((n for n in range(len(parts), 0, -1) if ",".join(parts[:n]) in known), 0)
            if not length:
                unknown = ",".join(parts) if "@" in parts[0] else parts[0]
                stages = ", ".join(dict.fromkeys(node.origin for node in plan.parsed.nodes))
                raise EdgepressError(f"{option}: there is no stage {unknown!r}{nearest(unknown, list(known))}; stages: {stages}")
            found += known[",".join(parts[:length])]
            parts = parts[length:]
    return found


def check_disk(plan: Plan, store: Store) -> None:
    """Raises EdgepressError when the disk of the store cannot hold what is still to be made."""
    todo = [
        estimate(stage, plan)
        for stage in plan.stages
        if stage.definition is not None and (stage.recompute or not store.has(stage.identity))
    ]
    needed = sum(e.size for e in todo) + max((e.disk for e in todo), default=0)
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise Incompatible(
            f"the disk of {store.root} has {free / 1e9:.1f} GB free, and this plan needs about {needed / 1e9:.1f} GB; free some, or use another --store"
        )
