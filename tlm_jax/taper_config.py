"""A taper as part of a config."""

import dataclasses
from typing import Annotated

from tlm_jax import taper as taper_lib
from tlm_jax.validation import Checked, Count, Range

_Ratio = Annotated[float, Range(above=0, most=1e6)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaperConfig(Checked):
    """How a width is spread over depth (arXiv 2606.23670, section 3)."""

    schedule: taper_lib.Schedule = "cosine"
    """Curve from first to last layer; uniform turns tapering off.

    From openelm on: shapes of related work, which take no start and end."""
    start: _Ratio = 1.5
    """Width of the first layer relative to the mean (groups: of the heavy third)."""
    end: _Ratio = 0.5
    """Width of the last layer relative to the mean (groups: not used)."""
    steepness: _Ratio = 10.0
    """Steepness k of the sigmoid schedule; 10 is the paper's (eq. 6)."""
    heavy: taper_lib.Third = "early"
    """Which third of the depth is wide in the groups schedule."""
    widths: tuple[Count, ...] = ()
    """The widths themselves, one per layer, for schedule=explicit."""
    multiple_of: Count = 16
    """Widths are multiples of this: 16 as in the paper, 128 for TPU lanes."""
    num_segments: Count | None = None
    """Approximate the curve by at most this many stairs, to shorten compile time; None is exact."""

    def apply(
        self, num_layers: int, base_width: int, /, *, where: str = "", **names: str
    ) -> tuple[int, ...]:
        """The width of each layer; see `taper.layer_widths`.

        Args:
          num_layers: depth.
          base_width: mean width.
          where: what the message of an error begins with.
          names: what it calls `num_layers` and `base_width`.

        Raises:
          ValueError: there are no such widths.
        """
        try:
            return taper_lib.layer_widths(
                num_layers,
                base_width,
                self.schedule,
                self.start,
                self.end,
                steepness=self.steepness,
                heavy=self.heavy,
                widths=self.widths,
                multiple_of=self.multiple_of,
                num_segments=self.num_segments,
            )
        except taper_lib.TaperError as error:
            text = str(error)
            for name, called in names.items():
                text = text.replace(name, called)
            raise ValueError(where + text) from None


NO_TAPER = TaperConfig(schedule="uniform", multiple_of=1)
"""Of a part that is the same in every layer."""
