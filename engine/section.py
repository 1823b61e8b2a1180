"""What every part of the recipe is: immutable, strict, and documented field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator, model_validator


class Section(BaseModel):
    """A part of the recipe: immutable, and a key that it doesn't know is an error."""

    # No inf or nan: no setting means anything there, and YAML's .inf is easy to reach for as "off".
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values):
        # A section of a YAML file whose keys are all commented out reads as null.
        return {} if values is None else values

    @field_validator("*", mode="before")
    @classmethod
    def _words_are_no_numbers(cls, value, info):
        # YAML reads yes, no, on and off as booleans, and pydantic would go on to read those as 1 and 0.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"takes no boolean, got {value}; YAML reads yes, no, on and off as one: quote a word")
        return value
