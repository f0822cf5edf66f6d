"""What the sections of a configuration have in common: how they are read, and the kinds of numbers that they hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Similarity = Annotated[float, Field(ge=0.3, le=1.0)]  # Jaccard index
StepsOrFraction = Annotated[int, Field(ge=0)] | Fraction  # an int is a number of steps, a float a share of the run


class Section(BaseModel):
    """Values that do not change; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
