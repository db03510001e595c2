"""The look of all pictures."""

import contextlib
import io
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tlm_jax import files, storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Path = str | pathlib.Path

DPI = 160
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
WIDE, NARROW, TRAIN, EVAL = "#0b5c8a", "#8fd0e8", "#9fb8cc", "#c2410c"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
}


@contextlib.contextmanager
def house_figure(path: Path, figsize: tuple[float, float]) -> Iterator["Figure"]:
    """A figure in the package's style, saved to `path` on leaving.

    It is made without pyplot, so nothing asks for a window system or keeps state.

    Raises:
      OSError: it cannot be written, or a file that tlm did not write is there.
    """
    path = storage.path(path)
    files.refuse_foreign(path)
    import matplotlib as mpl  # slow to import, and few commands draw
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=figsize, dpi=DPI, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        target = io.BytesIO() if storage.in_bucket(path) else path
        with files.named(path):
            figure.savefig(
                target, facecolor="white", format="png", metadata={"Software": files.MARK}
            )
        if isinstance(target, io.BytesIO):
            path.write_bytes(target.getvalue())
