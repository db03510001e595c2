"""Matrix products of a program, counted from its HLO text."""

import functools
import math
import re

import numpy as np

from tlm_jax.distributed.hlo import ARRAY, walk

_DEFINED = re.compile(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*)")
_PRODUCT = re.compile(r" (dot|convolution)\((?:\S+ )?%?([\w.\-]+), (?:\S+ )?%?([\w.\-]+)\)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GROUPS = re.compile(r"batch_group_count=(\d+)")


def product_flops(hlo: str) -> int:
    """FLOPs of a program's matrix products, 2 m n k each, those in loops as often as they run.

    As XLA's cost analysis counts them, which counts a loop once; TPU programs hold products as
    convolutions. Kernels that a program calls by name (Pallas, cuBLAS) count nothing.

    Args:
      hlo: `Compiled.as_text()`: of one device; or `Lowered.as_text("hlo")`: of all together.
    """
    return sum(times * _products(tuple(lines)) for lines, times in walk(hlo))


@functools.lru_cache(maxsize=1024)
def _products(lines: tuple[str, ...]) -> int:
    shapes: dict[str, list[int]] = {}
    total = 0
    for line in lines:
        defined = _DEFINED.match(line)
        array = ARRAY.search(defined[2]) if defined else None
        if defined is None or array is None:
            continue
        result = shapes[defined[1]] = [int(n) for n in array[2].split(",") if n]
        if product := _PRODUCT.search(defined[2]):
            kind, lhs, rhs = product[1], shapes[product[2]], shapes[product[3]]
            if kind == "dot":
                contracted = _CONTRACTED.search(line)
                assert contracted is not None
                inner = math.prod(lhs[int(n)] for n in contracted[1].split(",") if n)
                total += 2 * math.prod(result) * inner
            else:
                total += 2 * _convolution(line, lhs, rhs, result)
    return total


def _convolution(line: str, lhs: list[int], rhs: list[int], result: list[int]) -> int:
    """Multiplications of a convolution; where it reads padding or holes there are none."""
    labels = _LABELS.search(line)
    assert labels is not None
    inputs, kernel, output = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (lhs, rhs, result), strict=True)
    )
    window = _WINDOW.search(line)
    fields = dict(word.split("=") for word in window[1].split()) if window else {}
    groups = _GROUPS.search(line)
    total = inputs["b"] * kernel["i"] * kernel["o"] // (int(groups[1]) if groups else 1)
    for place, name in enumerate(sorted(n for n in inputs if n.isdigit())):

        def field(key: str, default: str, place: int = place) -> str:
            return fields[key].split("x")[place] if key in fields else default

        total *= _places(
            inputs[name],
            int(field("size", "1")),
            output[name],
            stride=int(field("stride", "1")),
            before=int(field("pad", "0_0").split("_")[0]),
            holes=int(field("lhs_dilate", "1")),
            steps=int(field("rhs_dilate", "1")),
        )
    return total


@functools.lru_cache(maxsize=1024)
def _places(
    inputs: int, kernel: int, outputs: int, *, stride: int, before: int, holes: int, steps: int
) -> int:
    """Pairs of an output and a kernel element along one dim that read an input element."""
    starts = stride * np.arange(outputs) - before
    end = (inputs - 1) * holes + 1
    total = 0
    for index in range(kernel):
        read = starts + steps * index
        total += int(np.sum((read >= 0) & (read < end) & (read % holes == 0)))
    return total
