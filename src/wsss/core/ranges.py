"""Types of numbers with a range, checked wherever a configuration or a constructor takes them."""

from typing import Annotated, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AllowInfNan

T = TypeVar("T")
Finite = Annotated[float, AllowInfNan(False)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Fraction = Annotated[float, Ge(0), Le(1)]  # both ends included
BelowOne = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Le(1)]  # of something, more than nothing
Part = Annotated[float, Gt(0), Lt(1)]  # of something, neither nothing nor all
Count = Annotated[int, Ge(1)]
Number = Annotated[int, Ge(0)]
GreyLevel = Annotated[int, Ge(0), Le(254)]  # a threshold below which 255 never lies
Some = Annotated[tuple[T, ...], MinLen(1)]  # one at least, in any number
