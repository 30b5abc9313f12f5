"""Energy of generation: read from counters where the machine has some, else codecarbon's estimate under a name of its own, else not at all.

Counted is what the whole processor (and graphics card) takes meanwhile, its idle power included, so this is meant for a machine that does
nothing else. Counters: RAPL of Intel and AMD processors (/sys/class/powercap, which most systems let only root read), and NVML of an
NVIDIA card that the model runs on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compression.context import Context
from compression.errors import EdgepressError
from compression.evaluation.findings import Findings
from compression.evaluation.generation import generate
from compression.evaluation.runtime import Runtime

if TYPE_CHECKING:
    from codecarbon import OfflineEmissionsTracker

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
NAMES = ("energy_joules", "energy_joules_per_token")


class Counter(Protocol):
    """Something that counts energy upwards."""

    @property
    def name(self) -> str: ...

    def joules(self, since: int) -> float:
        """Energy since a reading."""
        ...

    def read(self) -> int: ...


@dataclass(frozen=True)
class RaplCounter:
    """A zone of RAPL, in microjoules; it starts again from 0 after `range`."""

    name: str
    file: Path
    range: int

    def read(self) -> int:
        return int(self.file.read_text())

    def joules(self, since: int) -> float:
        """Right while the counter turned over once at most, which takes a processor minutes."""
        return (self.read() - since) % (self.range + 1) / 1e6


@dataclass(frozen=True)
class NvmlCounter:
    """An NVIDIA card, in millijoules since its driver was loaded."""

    uuid: str

    @property
    def name(self) -> str:
        return f"NVML {self.uuid}"

    def read(self) -> int:
        import pynvml

        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(self.uuid)))

    def joules(self, since: int) -> float:
        return (self.read() - since) / 1e3


def rapl_counters(powercap: Path = POWERCAP) -> list[RaplCounter]:
    """Every processor package and its memory, where this process may read them: all of them or none.

    A package's zone is `intel-rapl:0`, also on AMD; of what lies within, cores and graphics are part of it, and `dram` comes on top.
    """
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if not name.startswith("package") and name != "dram":
            continue
        try:
            counter = RaplCounter(f"RAPL {name}", zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()))
            counter.read()
        except PermissionError:
            return []
        found.append(counter)
    return found


def nvml_counters(device: str) -> list[NvmlCounter]:
    """The card that a torch device of this process means; none for the CPU, without the package nvidia-ml-py, and of cards before Volta, which do not count."""
    if not device.startswith("cuda"):
        return []
    try:
        import pynvml
    except ImportError:
        return []
    import torch

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    counter = NvmlCounter(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    try:
        pynvml.nvmlInit()
        counter.read()
    except pynvml.NVMLError:
        return []
    return [counter]


def readable() -> list[str]:
    """The counters that this machine may have, told without asking a card: what costs no time while planning."""
    cards = Path("/dev/nvidiactl").exists() and find_spec("pynvml") is not None
    return [counter.name for counter in rapl_counters()] + (["NVML"] if cards else [])


def counters(device: str) -> list[Counter]:
    """What this machine can tell about a torch device: of the CPU its processors, of a card the card, and the processors where they can be read."""
    if device.startswith("cuda"):
        cards = nvml_counters(device)
        return [*cards, *rapl_counters()] if cards else []
    return list(rapl_counters())


def measure_energy(
    open_runtime: Callable[[], Runtime], prompt: list[int], *, new_tokens: int, device: str, estimate: bool, context: Context,
    seconds: float = 3.0, found: Sequence[Counter] | None = None,
) -> Findings:  # fmt: skip
    """Generate greedily, again and again for `seconds` or more after a warm-up, and divide what was taken by the generations.

    prompt    token ids; what does not fit into the runtime's context with new_tokens loses its beginning
    estimate  ask codecarbon where there are no counters
    found     the counters; default: those of this machine

    Returns energy_joules (a prompt read and new_tokens generated) and energy_joules_per_token (that divided by new_tokens); with _estimated at the
    end of both names where codecarbon estimated them; and nothing where nobody can tell, or for a runtime that is not `timed`. In `details` energy:
    who told.
    Raises EdgepressError for less than one new token.
    """
    if new_tokens < 1 or not prompt:
        raise EdgepressError("energy needs a prompt and a new token or more", key="new_tokens")
    meters = counters(device) if found is None else list(found)
    if not meters and not estimate:
        return Findings({})
    runtime = open_runtime()
    try:
        if not runtime.timed:
            return Findings({})
        prompt = prompt[-(runtime.max_length - new_tokens) :]
        generate(runtime, prompt, new_tokens)

        def work() -> int:
            begin, rounds = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                generate(runtime, prompt, new_tokens)
                rounds += 1
            return rounds

        if meters:
            joules, rounds = _counted(work, meters)
            suffix, source = "", ", ".join(meter.name for meter in meters)
        else:
            joules, rounds = _estimated(work, device)
            suffix, source = "_estimated", f"codecarbon {version('codecarbon')}, an estimate"
    finally:
        runtime.close()
    if joules <= 0:
        context.warn("energy is left out: what was read did not grow while the model generated")
        return Findings({})
    figures = {f"{NAMES[0]}{suffix}": joules / rounds, f"{NAMES[1]}{suffix}": joules / rounds / new_tokens}
    return Findings(figures, details={"energy": source})


def _counted(work: Callable[[], int], meters: Sequence[Counter]) -> tuple[float, int]:
    before = [meter.read() for meter in meters]
    rounds = work()
    return sum(meter.joules(since) for meter, since in zip(meters, before, strict=True)), rounds


def _estimated(work: Callable[[], int], device: str) -> tuple[float, int]:
    """codecarbon's estimate: the processor's load times its rated power, a rule of thumb for memory, and cards where the model runs on one.

    Nothing is sent, nothing is written.
    """
    with _codecarbon() as tracker:
        rounds = work()
    data = tracker.final_emissions_data
    cards = data.gpu_energy if device.startswith("cuda") else 0.0  # codecarbon reads every card of the machine
    return (data.cpu_energy + data.ram_energy + cards) * JOULES_PER_KWH, rounds


@contextmanager
def _codecarbon() -> Iterator["OfflineEmissionsTracker"]:
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        output_methods=[],
        emissions_endpoint=None,
        country_iso_code="USA",  # decides the carbon, which nobody asks for:
        force_carbon_intensity_g_co2e_kwh=0.0,  # so that no web service is asked either
        measure_power_secs=1,
        tracking_mode="machine",
        allow_multiple_runs=True,  # else a lock file in the temporary directory
        log_level="error",
    )
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.stop()
