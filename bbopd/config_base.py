"""What the sections of a configuration have in common: how they are read, and the kinds of numbers that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from bbopd.errors import ConfigError
from bbopd.plugins import GROUPS, GroupName, find

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Similarity = Annotated[float, Field(ge=0.3, le=1.0)]  # Jaccard index
StepsOrFraction = Annotated[int, Field(ge=0)] | Fraction  # an int is a number of steps, a float a share of the run


Options = Mapping[str, Any]  # of a plug-in, which knows what they mean


def known_in(group: GroupName) -> AfterValidator:
    """Holds a name to the library's own, or to a plug-in that is installed, which is not imported yet."""

    def check(name: str) -> str:
        if name not in GROUPS[group].built_in:
            try:
                find(group, name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """Values that do not change; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
