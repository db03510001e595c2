"""Writing measured tables into pages of docs/, each between its own marks."""

import pathlib
import platform
import re

import jax
import jaxlib

from tlm_jax import output
from tlm_jax.analysis import sweep_report

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SPEED = DOCS / "speed.md"
SPEED_DATA, SPEED_TITANS = DOCS / "speed-data.md", DOCS / "speed-titans.md"


def machine() -> str:
    """One line on what the numbers were measured with."""
    devices = f"{len(jax.devices())} {jax.devices()[0].platform} device(s)"
    return software().replace(", Python", f", {devices}, Python")


def software() -> str:
    """The same without the number of devices, for arms that have different ones."""
    device = jax.devices()[0]
    return (
        f"{device.device_kind if device.platform != 'cpu' else cpu_name()}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    )


def cpu_name() -> str:
    """The processor's name and number of cores."""
    import os

    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        found = re.search(r"model name\s*: (.*)", text)
        name = found[1] if found else platform.machine()
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


table = output.markdown_table


def publish(name: str, text: str, page: pathlib.Path = SPEED) -> None:
    """Prints `text` and puts it between the marks `<!-- name -->` of a page."""
    print(text)
    page.write_text(sweep_report.replace(page.read_text(), name, text))
