"""Reads array sizes off a compiled program."""

import math
import re


def largest_array(compiled) -> int:
    """Elements of the largest array anywhere in the program, fused computations included."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
