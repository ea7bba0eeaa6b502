"""Objects of a request body that say in `type` what they are."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from services.gateway.body import Body
from winnow.errors import UnsupportedParameter


def one_of(*types: str | None) -> Any:  # noqa: ANN401 - a field's, as pydantic types them
    """The field `type` of a `Typed`; None among the types: it may be absent."""
    return Field(None if None in types else ..., json_schema_extra={"enum": list(types)})


class Typed(Body):
    """An object whose `type` is `one_of` some.

    Of an object of any other type only that is kept, so that the error can name it.
    """

    type: str | None

    _why: ClassVar[str] = ""  # others are not supported

    @classmethod
    def _supported(cls) -> list[str | None]:
        told: Any = cls.model_fields["type"].json_schema_extra
        return list(told["enum"])

    @model_validator(mode="before")
    @classmethod
    def _other_type_alone(cls, body: object) -> object:
        if not isinstance(body, Mapping) or "type" not in body or body["type"] in cls._supported():
            return body
        return {"type": body["type"]}

    def require_supported(self, name: str, param: str) -> None:
        """Raises UnsupportedParameter for an object of another type.  name: what it is called."""
        if self.type not in self._supported():
            raise UnsupportedParameter(
                f"{name} is of type {self.type!r}, which is not supported by Winnow{self._why}",
                param=param,
            )


class Piece(Typed):
    """A piece of a message's content."""

    _why = ": the model takes text alone"


def kind_of(*others: str) -> Callable[[Any], str]:
    """For a union of one class for each of the types `others`, and a `Typed` for the rest."""

    def tag(value: object) -> str:
        kind = value.get("type") if isinstance(value, Mapping) else None
        return kind_tag(kind if kind in others else "")

    return tag


def kind_tag(kind: str = "") -> str:
    """The tag of the class for `kind`: no name of a field, because errors' paths have both."""
    return f"kind:{kind}"
