"""Killing a run again and again until it is done all the same, and the report of it."""

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.drill.place import Place, inspect, megabytes, words_of
from tests.drill.sight import Moment, Sight, Where, Whom

STRATA: tuple[tuple[Where, Whom], ...] = (
    ("training", "command"), ("measuring", "child"), ("committing", "command"), ("starting", "command"), ("calibration", "child"),
    ("between", "command"), ("training", "child"), ("measuring", "command"), ("committing", "child"), ("calibration", "command"),
    ("between", "child"), ("starting", "child"),
)  # fmt: skip
TRAINING = ("distill", "finetune", "prune.rigl", "prune.lottery")
CALIBRATION = ("quantize.gptq", "quantize.awq", "quantize.smoothquant", "prune.unstructured")
PATIENCE = 900.0  # seconds within which a command ends or is struck
LATE = 5  # further runs at most, once all is done, for moments that were missed


@dataclass
class Report:
    """What a drill did, and what is wrong after it: nothing, if all is well."""

    undisturbed_seconds: float
    kills: list[tuple[Moment, str]] = field(default_factory=list)  # with the process that was struck
    stray: int = 0  # blows that fell beside their moment
    late: int = 0  # runs of what was done already, for moments that were missed
    commands: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    largest_scratch: float = 0.0  # MB
    faults: list[str] = field(default_factory=list)
    checks: list[tuple[str, str]] = field(default_factory=list)


class Drill:
    """Kills a run of `place` at moments drawn by a seed until none is left and the run is done."""

    def __init__(self, place: Place, undisturbed: dict[str, Any], report: Report, *, kills: int, seed: int, say: Callable[[str], None]):
        self.place, self.report, self.say = place, report, say
        self.rows: dict[str, dict[str, Any]] = {row["stage"]: row for row in undisturbed["rows"] if row["uses"] != "base"}
        self.random = random.Random(seed)
        strata = (STRATA[number % len(STRATA)] for number in range(kills))
        self.left: list[Moment] = []
        for where, whom in strata:
            self.left.append(Moment(where, whom, self._stage(where), self.random.random()))

    def _stage(self, where: Where, past: Callable[[str], bool] = lambda _: False) -> str:
        """A stage for such a moment; one that takes longer is likelier to be met."""
        kinds = {"training": TRAINING, "calibration": CALIBRATION}.get(where)
        names = [name for name, row in self.rows.items() if (kinds is None or row["uses"] in kinds) and not past(name)]
        if where == "committing":  # there is one commit of a stage
            names = [name for name in names if not any(m.where == where and m.stage == name for m in self.left)] or names
        if not names:
            raise LookupError(f"no stage is left for a kill in {where}")
        return self.random.choices(names, [self.rows[name]["seconds"] if kinds else 1.0 for name in names])[0]

    def run(self) -> None:
        begun = time.monotonic()
        arguments = self.place.arguments
        while True:
            self.report.commands[arguments[0]] += 1
            struck = len(self.report.kills) + self.report.stray
            command = self.place.start(arguments)
            try:
                code = self._watch(Sight(self.place, self.rows, command), command)
            finally:
                command.kill()
                command.wait()
            disturbed = len(self.report.kills) + self.report.stray > struck
            if code not in (0, 1, 2, -signal.SIGKILL) or (code and not disturbed):  # 2: its Prefect server was struck
                self.report.faults.append(
                    f"a command that was {'' if disturbed else 'not '}disturbed ended with {code}:\n{self.place.log()}"
                )
                break
            if code == 0:
                if not self.left or self.report.late == LATE:
                    break
                self._strike_what_is_done()
            arguments = self.random.choice([["resume"], self.place.arguments]) if self._has_journal() else self.place.arguments
        self.report.seconds = time.monotonic() - begun
        self.report.faults += [f"no kill landed {moment}" for moment in self.left]

    def _strike_what_is_done(self) -> None:
        """Moments whose stages all went by: strike while a run finds everything done."""
        self.report.late += 1
        for moment in self.left:
            moment.where, moment.share = "starting", moment.share / 2

    def _has_journal(self) -> bool:
        return any((self.place.folder / ".edgepress" / "runs").glob("[!.]*.json"))

    def _watch(self, sight: Sight, command: subprocess.Popen[bytes]) -> int:
        """Follow a command to its end, and strike when a moment has come. Returns its exit status."""
        deadline = time.monotonic() + PATIENCE
        next_look = 0.0
        while (code := command.poll()) is None:
            moment = next((moment for moment in self.left if sight.has_come(moment)), None)
            if moment is not None and self._strike(moment, sight):
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > next_look:
                next_look = time.monotonic() + 1
                self._look_around(sight)
            if time.monotonic() > deadline:
                self.report.faults.append(f"a command hung for {PATIENCE:g} s:\n{self.place.log()}")
                return 124
            time.sleep(0.001)
        return code

    def _strike(self, moment: Moment, sight: Sight) -> bool:
        """Kill, if the moment lasts still; returns whether it did."""
        try:
            victim = sight.victim(moment)
            kin = victim.children(recursive=True) if victim and moment.whom == "command" else []
            if victim is None or not sight.is_there(moment):
                return False
            name = " ".join(words_of(victim))[-60:]
            victim.kill()
            landed = sight.is_there(moment)
        except psutil.NoSuchProcess:  # it ended this instant
            return False
        finally:
            sight.let_go()
        if moment.whom == "command":
            sight.command.wait()
            self.report.faults += [f"outlived the killed command: {' '.join(words_of(p))}" for p in psutil.wait_procs(kin, timeout=60)[1]]
        if landed:
            self.left.remove(moment)
            self.report.kills.append((moment, name))
        else:
            self.report.stray += 1
        self.say(f"{'killed' if landed else 'struck beside'} {moment}; {len(self.left)} to go")
        return True

    def _look_around(self, sight: Sight) -> None:
        """Draw another stage for moments that went by, and take the size of the scratch."""
        for moment in self.left:
            if sight.is_past(moment):
                with suppress(LookupError):  # then no kill lands there, which is told at the end
                    moment.stage = self._stage(moment.where, partial(_is_past, sight, moment))
        self.report.largest_scratch = max(self.report.largest_scratch, megabytes(self.place.work))


def _is_past(sight: Sight, moment: Moment, stage: str) -> bool:
    return sight.is_past(replace(moment, stage=stage))


def drill(recipe: str, overrides: Sequence[str], folder: Path, *, kills: int, seed: int, say: Callable[[str], None]) -> Report:
    """Run the recipe undisturbed, then killed `kills` times, and compare. Raises RuntimeError where the undisturbed run fails."""
    calm, hurt = Place(folder / "undisturbed", recipe, overrides), Place(folder / "killed", recipe, overrides)
    begun = time.monotonic()
    if calm.start(calm.arguments).wait():
        raise RuntimeError(f"the undisturbed run failed:\n{calm.log()}")
    report = Report(time.monotonic() - begun)
    say(f"undisturbed: {report.undisturbed_seconds:.0f} s")
    Drill(hurt, calm.summary(), report, kills=kills, seed=seed, say=say).run()
    for what, found, wrong in inspect(calm, hurt):
        report.checks.append((what, found))
        report.faults += [f"{what}: {fault}" for fault in wrong]
    return report
