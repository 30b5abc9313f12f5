"""Plan a recipe: check every stage against the configs that will reach it, give it an identity, estimate its size. Imports no torch."""

import shutil
from collections.abc import Iterable, Mapping
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
from flows.planning.nodes import BASE, Node
from flows.planning.recipe import ParsedRecipe, Recipe, split_revision
from flows.planning.registration import registered_models
from flows.planning.source_map import shortened
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

_USER_ERRORS = (EdgepressError, OSError)  # a mistake, or a file that cannot be read: both are reported with the line that names it
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Plan:
    """A recipe that can run: the base model and its stages in topological order, the base first.

    measured_with  by measurement the digest of what decides its figures besides the model: the data by content, the settings; without exclusive
                   measurements, whose figures the machine decides
    ancestors      of every stage of the recipe, also of those that `only` excludes
    only           the selection as the user gave it
    left_out       number of the sweep's results that `only` leaves out
    remeasure      take timings again even if the store has them
    """

    parsed: ParsedRecipe
    base: Base
    machine: Machine
    stages: tuple[PlannedStage, ...]
    measured_with: Mapping[str, str]
    ancestors: Mapping[str, tuple[str, ...]]
    only: tuple[str, ...] = ()
    left_out: int = 0
    remeasure: bool = False

    @cached_property
    def by_name(self) -> Mapping[str, PlannedStage]:
        return {stage.name: stage for stage in self.stages}


@dataclass(frozen=True)
class Estimate:
    """Rough needs of a stage in bytes, from shapes alone: its content, and its peaks of memory and disk while it runs."""

    size: int
    memory: int
    disk: int


def make_plan(parsed: ParsedRecipe, store: Store, *, elsewhere: bool = False) -> Plan:
    """Check everything that can be checked before work starts, and plan every stage.

    Args:
        parsed: The recipe.
        store: Results are looked up here, and a model of the hub is kept here.
        elsewhere: The plan will run on another machine, whose GPUs are not known here.

    Raises:
        EdgepressError: With file, line and key: the device is missing, the model or the data are unusable, a stage cannot work on its input,
            or a gate could never be judged.
    """
    machine = _choose_machine(parsed, elsewhere)
    base = _open_model(parsed, store)
    parsed, data_digest = _pin_data(parsed)
    recipe = parsed.recipe
    if recipe.data.length > base.checkpoint.max_length:
        raise parsed.error(
            ("data", "length"), f"{recipe.data.length} tokens are more than the model's {base.checkpoint.max_length} positions"
        )
    _check_evaluation(parsed, base)
    _check_text(parsed, base)
    base_document = {"base": base.source, "revision": base.revision, "content": base.content, "data": data_digest}
    base_stage = PlannedStage(
        BASE, 0, None, base.identity, base_document, {}, (), base.checkpoint, gates=recipe.gates.get(BASE, {})
    )  # fmt: skip
    fingerprints: dict[Reads, str | None] = {"nothing": None}
    planned = {BASE: base_stage}
    cells = _cell_by_stage(parsed)
    for index, node in enumerate(parsed.nodes, 1):
        part = node.stage.data_read()
        if part != "nothing" and part not in fingerprints:
            fingerprints[part] = fingerprint(recipe.data, part)  # reads files: once, not for each stage of a sweep
        stage = _plan_stage(parsed, node, index, planned, fingerprints[part], machine, store)
        try:
            node.stage.check_text(check_accepts(node.stage, planned[node.parent].product), recipe.data, seed_of(stage.identity))
        except EdgepressError as error:
            if error.key in type(node.stage).model_fields:
                raise parsed.stage_error(node, (error.key,), str(error)) from None
            raise _data_error(parsed, error, f"{node.name}: {error}") from None
        planned[node.name] = replace(stage, cell=cells.get(node.name, ""))
    check_gates(parsed, planned, recipe.evaluation)
    _check_study(parsed, planned)
    ancestors = {name: stage.ancestors for name, stage in planned.items()}
    plan = Plan(parsed, base, machine, tuple(planned.values()), _measured_with(recipe, planned.values()), ancestors)
    models = registered_models(parsed, plan.stages)
    stages = [replace(stage, memory=estimate(stage, plan).memory, registered=models.get(stage.name, "")) for stage in plan.stages]
    return replace(plan, stages=tuple(stages))


def _choose_machine(parsed: ParsedRecipe, elsewhere: bool) -> Machine:
    recipe = parsed.recipe
    if recipe.device == "cuda" and not elsewhere and (reason := why_no_cuda()):
        raise parsed.error(("device",), f"cuda cannot be used here: {reason}; `device: auto` takes what there is")
    return Machine(default_device() if recipe.device == "auto" else recipe.device, recipe.threads)


def _open_model(parsed: ParsedRecipe, store: Store) -> Base:
    model = parsed.recipe.model
    try:
        base = open_base(model.path, model.revision, model.license, store.root)
        _ = base.checkpoint.linear_widths()  # raises for an architecture that no stage and no estimate knows
    except _USER_ERRORS as error:
        raise parsed.error(("model",), _reason(error)) from None
    return base


def _pin_data(parsed: ParsedRecipe) -> tuple[ParsedRecipe, str]:
    """Check the data and pin its revisions; return the recipe with them, and the data's digest."""
    try:
        data = pinned(parsed.recipe.data)
        check_data(data)
        digest_of_data = fingerprint(data)
    except _USER_ERRORS as error:
        key = getattr(error, "key", None)
        raise parsed.error(("data", key) if key else ("data",), _reason(error)) from None
    return parsed.model_copy(update={"recipe": parsed.recipe.model_copy(update={"data": data})}), digest_of_data


def _check_study(parsed: ParsedRecipe, stages: Mapping[str, PlannedStage]) -> None:
    """Refuse a metric that the study shows or judges by and no result of the sweep will have."""
    recipe = parsed.recipe
    if recipe.study is None:
        return
    results = dict.fromkeys(branch.stages[leaf] for branch in parsed.branches for leaf in branch.leaves)
    measured = dict.fromkeys(metric for name in results for metric in metrics_of(stages[name], recipe.data, recipe.evaluation))
    try:
        check_metrics(recipe.study, measured)
    except StudyError as error:
        raise parsed.error(error.path, str(error)) from None


def _check_evaluation(parsed: ParsedRecipe, base: Base) -> None:
    """Refuse packages and files of `evaluation` that are missing or of another shape."""
    spec, key = parsed.recipe.evaluation, ""
    try:
        for extra, key in extras(spec).items():
            require(extra, f"evaluation.{key}")
        check_evaluation(spec, base.checkpoint.path, base.checkpoint.max_length)
    except _USER_ERRORS as error:
        key = getattr(error, "key", None) or key
        raise parsed.error(("evaluation", key) if key else ("evaluation",), _reason(error)) from None


def _check_text(parsed: ParsedRecipe, base: Base) -> None:
    """Refuse a chat template that takes no question, and test data that cannot measure the model."""
    recipe, path = parsed.recipe, base.checkpoint.path
    try:
        if recipe.data.questions is not None or recipe.evaluation.chats:
            check_template(path, recipe.data.system)
        check_evaluation_rows(recipe.data, path, base.checkpoint.vocab_size)
    except EdgepressError as error:
        raise _data_error(parsed, error, str(error)) from None


def _data_error(parsed: ParsedRecipe, error: EdgepressError, message: str) -> EdgepressError:
    """The error at the key of `data:` that is at fault, or at the model."""
    return parsed.error(("model",) if error.key == "model" else ("data", error.key) if error.key else ("data",), message)


def _measured_with(recipe: Recipe, stages: Iterable[PlannedStage]) -> dict[str, str]:
    """By measurement, or part of one, of the plan's stages: the digest of its version, data and settings."""
    digests: dict[str, str] = {}
    for stage in stages:
        if isinstance(stage.product, Corpus):
            continue
        request = MeasurementRequest(stage.product, stage.roles, recipe.data, recipe.evaluation)
        for measurement in MEASUREMENTS:
            parts = {} if measurement.exclusive else measurement.parts(request)
            for name in parts.keys() - digests.keys():
                digests[name] = digest({"version": measurement.version, **measurement.document(parts[name])})[:12]
    return digests


def _plan_stage(
    parsed: ParsedRecipe,
    node: Node,
    index: int,
    planned: Mapping[str, PlannedStage],
    data_digest: str | None,
    machine: Machine,
    store: Store,
) -> PlannedStage:
    recipe, stage = parsed.recipe, node.stage
    outside = {role: _open_outside(parsed, node, role, source, store) for role, source in stage.outside_inputs().items()}
    try:
        parent = check_accepts(stage, planned[node.parent].product)
        others = {role: planned[name].product for role, name in stage.other_inputs().items()}
        others |= {role: model.checkpoint for role, model in outside.items()}
        product = stage.plan(parent, others, recipe.data)
        if stage.extra:
            require(stage.extra, f"the stage {node.name} ({stage.uses})")
    except _USER_ERRORS as error:
        key = getattr(error, "key", None)
        key = "uses" if key == "model" else key  # the kind does not take this model
        raise parsed.stage_error(node, (key,) if key else (), _reason(error)) from None
    bounds: dict[str, Bound] = dict(node.execution.bounds)
    if isinstance(product, Artifact):
        bounds = {"kl_to_parent": Bound(max=KL_TO_PARENT[product.change], strict=True), **bounds}
    ancestors = dict.fromkeys(name for input_name in node.inputs.values() for name in (*planned[input_name].ancestors, input_name))
    identities = {role: planned[name].identity for role, name in node.inputs.items()}
    identities |= {role: model.identity for role, model in outside.items()}
    document = identity_document(stage, identities, data_digest, node.seed, machine)
    if isinstance(product, Artifact) and recipe.model.license:
        document["license"] = recipe.model.license  # artifacts state it; a model card's is part of the base's content
    return PlannedStage(
        node.name, index, stage, digest(document), document, node.inputs, tuple(ancestors), product, outside=outside, bounds=bounds,
        gates=node.gates, retries=node.execution.retries, timeout=node.execution.timeout, job_variables=node.execution.job_variables,
    )  # fmt: skip


def _open_outside(parsed: ParsedRecipe, node: Node, role: str, source: str, store: Store) -> Base:
    path, revision = split_revision(source)
    try:
        return open_base(path, revision, None, store.root)
    except _USER_ERRORS as error:
        raise parsed.stage_error(node, (role,), _reason(error)) from None


def _reason(error: Exception) -> str:
    """The error's message; for a file that the system refuses, its name and the system's reason."""
    return f"{shortened(str(error.filename))}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _cell_by_stage(parsed: ParsedRecipe) -> dict[str, str]:
    """The cell of each stage that only one cell needs."""
    users: dict[str, list[str]] = {}
    for branch in parsed.branches:
        for name in branch.stages.values():
            users.setdefault(name, []).append(branch.name)
    swept = {node.name for node in parsed.nodes if node.redirects}
    return {name: cells[0] for name, cells in users.items() if len(cells) == 1 and name in swept}


def estimate(stage: PlannedStage, plan: Plan) -> Estimate:
    """Estimate a stage's needs from shapes: training holds weights, gradients and two moments in float32, and keeps two checkpoints on disk."""
    size = _content_bytes(stage.product)
    parent = plan.by_name[stage.inputs["parent"]].product if stage.definition is not None else stage.product
    weights = 4 * (parent.num_parameters if isinstance(parent, Checkpoint) else 0)
    if isinstance(stage.definition, TrainingStage):
        outside = sum(4 * model.checkpoint.num_parameters for model in stage.outside.values())
        teacher = weights if "teacher" in stage.inputs else outside
        copies = stage.definition.distributed.processes if stage.definition.distributed else 1
        best = weights if stage.definition.evaluate_every else 0  # training keeps the best weights so far
        return Estimate(size, copies * (4 * weights + teacher + best), size + 2 * 3 * weights)
    return Estimate(size, weights + size, size if stage.definition is not None else 0)


def _content_bytes(product: Planned) -> int:
    if not isinstance(product, Checkpoint):
        return product.size_bytes
    dense = _DTYPE_BYTES.get(product.dtype, 4)
    linear = product.num_layers * sum(out * width for out, width in product.linear_widths().values())
    rest = (product.num_parameters - linear) * dense
    if product.layout in ("dense", "w8a8", "fp8"):
        return int(rest + linear * (dense if product.layout == "dense" else 1))
    return int(rest + linear_bits(product, float_bits=8 * dense) / 8)


def check_disk(plan: Plan, store: Store) -> None:
    """Raise Incompatible where the store's disk cannot hold the results that the plan will add."""
    estimates = [
        estimate(stage, plan)
        for stage in plan.stages
        if stage.definition is not None and (stage.recompute or not store.has(stage.identity))
    ]
    needed = sum(e.size for e in estimates) + max((e.disk for e in estimates), default=0)
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise Incompatible(
            f"the disk of {store.root} has {free / 1e9:.1f} GB free, and this plan needs about {needed / 1e9:.1f} GB; free some, or use another --store"
        )
