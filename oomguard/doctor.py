"""What oomguard finds on this machine: versions, devices, rungs, allocator settings."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from oomguard.memory.size import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console, ConsoleOptions, RenderResult

    from oomguard.doctor_trial import RungTrial
    from oomguard.memory.device import Device

SCHEMA = "oomguard.doctor/1"
# The first that is set counts.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Package:
    """A package that oomguard needs.

    Attributes:
        name: Its name.
        installed: The installed version, or `None`.
        supported: The supported versions, as the package metadata has them.
        ok: Whether the one is among the others.
    """

    name: str
    installed: str | None
    supported: str
    ok: bool


@dataclass(frozen=True)
class Allocator:
    """Settings of PyTorch's CUDA allocator in the environment.

    Attributes:
        variable: The variable that counts, or `None` where none is set.
        settings: What it says.
        expandable_segments: Whether they are switched on there.
        wrong: What contradicts itself.
        advice: What would help.
    """

    variable: str | None
    settings: str
    expandable_segments: bool
    wrong: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """All that `oomguard doctor` says; `rich` prints it.

    Attributes:
        packages: Python and the packages.
        devices: The devices that training can use; without one it runs on the CPU.
        eight_bit: Why a step of bitsandbytes' 8-bit optimizer failed; `None` where it did not.
        rungs: What each rung of the default ladder did in a trial.
        allocator: Settings of the allocator.
        broken: Why oomguard itself does not work here; `None` where it does.
    """

    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    eight_bit: str | None
    rungs: tuple[RungTrial, ...]
    allocator: Allocator
    broken: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing is out of range, contradicts itself or failed where it should work."""
        return (
            self.broken is None
            and all(package.ok for package in self.packages)
            and not any(rung.failed for rung in self.rungs)
            and not self.allocator.wrong
        )

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON types."""
        return {"schema": SCHEMA, "healthy": self.healthy, **asdict(self)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Tables of versions and rungs, and lines for the rest."""
        yield self._versions()
        yield ""
        if self.broken is not None:
            yield Text(f"oomguard does not work here: {self.broken}", style="red")
            return
        for one in self.devices:
            memory = f"{format_bytes(one.free_bytes)} of {format_bytes(one.total_bytes)} free"
            driver = f", driver {one.driver}" if one.driver else ""
            yield Text(f"device: {one.name}, {memory}, capability {one.capability}{driver}")
        if not self.devices:
            yield Text("device: no CUDA device is visible; training runs on the CPU")
        yield Text(f"8-bit optimizer (bitsandbytes): {self.eight_bit or 'works'}")
        allocator = self.allocator
        said = f"{allocator.variable}={allocator.settings}" if allocator.variable else "not set"
        state = "on" if allocator.expandable_segments else "off"
        yield Text(f"allocator settings: {said}; expandable_segments {state}")
        yield from (Text(f"  wrong: {text}", style="red") for text in allocator.wrong)
        yield from (Text(f"  advice: {text}") for text in allocator.advice)
        yield ""
        yield self._rungs()

    def _versions(self) -> Table:
        table = Table("package", "installed", "supported", "", box=box.SIMPLE_HEAD, show_edge=False)
        for package in self.packages:
            verdict = "ok" if package.ok else "[red]install a supported version[/]"
            table.add_row(package.name, package.installed or "-", package.supported, verdict)
        return table

    def _rungs(self) -> Table:
        table = Table("rung", "fidelity", "here", "what it does", box=box.SIMPLE_HEAD)
        table.show_edge = False
        for rung in self.rungs:
            here = f"works: {rung.change}" if rung.change else rung.why_not
            style = "[red]failed:[/] " if rung.failed else ""
            table.add_row(rung.name, rung.fidelity, style + escape(here), escape(rung.does))
        return table


def examine() -> Findings:
    """Look at this machine; takes some seconds, since every rung is tried in a tiny training."""
    devices: tuple[Device, ...] = ()
    rungs: tuple[RungTrial, ...] = ()
    eight_bit = broken = None
    try:
        # A version out of range may fail here, and that is what the command is asked about.
        from oomguard import doctor_trial
        from oomguard.ladder import Ladder
        from oomguard.memory import device

        devices = tuple(device.devices())
        eight_bit = doctor_trial.try_8bit_optimizer()
        rungs = tuple(doctor_trial.try_rung(rung) for rung in Ladder.of("default"))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        broken = f"{type(error).__name__}: {error}"
    return Findings(
        packages=tuple(packages()),
        devices=devices,
        eight_bit=eight_bit,
        rungs=rungs,
        allocator=allocator(os.environ, cuda=bool(devices)),
        broken=broken,
    )


def packages() -> list[Package]:
    """Python and every package that oomguard needs, against the range in its own metadata."""
    own = metadata("oomguard")
    found = [_package("python", own["Requires-Python"], platform.python_version())]
    for text in own.get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        # Extras have a marker that is false here, as has a package without wheels for this system.
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            installed: str | None
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                installed = None
            found.append(_package(requirement.name, str(requirement.specifier), installed))
    return found


def _package(name: str, supported: str, installed: str | None) -> Package:
    ok = installed is not None and SpecifierSet(supported).contains(installed, prereleases=True)
    return Package(name, installed, supported, ok)


def allocator(environment: Mapping[str, str], *, cuda: bool) -> Allocator:
    """What the environment says to PyTorch's CUDA allocator."""
    variables = [name for name in _ALLOCATOR_VARIABLES if environment.get(name)]
    settings = environment[variables[0]] if variables else ""
    pairs = {
        part.partition(":")[0].strip(): part.partition(":")[2].strip()
        for part in settings.split(",")
    }
    expandable = pairs.get("expandable_segments", "").lower() in {"true", "1"}
    wrong, advice = [], []
    if expandable and "max_split_size_mb" in pairs:
        wrong.append(
            f"max_split_size_mb:{pairs['max_split_size_mb']} and expandable_segments:True work "
            "against each other; keep one, expandable_segments where it is supported"
        )
    if len(variables) > 1:
        wrong.append(f"{variables[0]} and {variables[1]} are both set; keep {variables[0]}")
    if cuda and not expandable and platform.system() == "Linux":
        advice.append(
            f"{_ALLOCATOR_VARIABLES[0]}=expandable_segments:True loses less memory to "
            "fragmentation; set it before the training starts"
        )
    return Allocator(
        variable=variables[0] if variables else None,
        settings=settings,
        expandable_segments=expandable,
        wrong=tuple(wrong),
        advice=tuple(advice),
    )
