"""What a job asks of a device, and the compiler that turns devices into eligibility masks.

A requirement is a set of lower bounds on named attributes. Jobs with the same requirement form one
resource-homogeneous group (paper, section 4.1); the group is one bit of a device's mask. Masks are
Python integers, so that any number of groups fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raysys.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """Names and order of the attribute columns of a check-in.

    Args:
        version: changes whenever the names or their order change; peers must agree on it.
        attributes: column names, without repeats.
    """

    version: int = 1
    attributes: tuple[str, ...] = ("cpu", "mem", "os")

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ConfigError("schema.version", self.version, "an integer >= 1")
        if not self.attributes or len(set(self.attributes)) != len(self.attributes):
            raise ConfigError("schema.attributes", self.attributes, "distinct names, at least one")


@dataclass(frozen=True, slots=True)
class Requirement:
    """Lower bounds by attribute: ``Requirement.of(cpu=7, mem=1000)``. Equal ones compare equal."""

    bounds: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, **bounds: float) -> Requirement:
        return cls.from_mapping(bounds)

    @classmethod
    def from_mapping(cls, bounds: Mapping[str, float]) -> Requirement:
        """Build a requirement; attributes are sorted so that order never splits a group.

        Raises:
            ConfigError: a bound is NaN or infinite.
        """
        for name, value in bounds.items():
            if not math.isfinite(value):
                raise ConfigError(f"requirement.{name}", value, "a finite number")
        return cls(tuple(sorted((name, float(value)) for name, value in bounds.items())))


@dataclass(slots=True)
class RequirementCompiler:
    """Give every distinct requirement a bit and compute device masks from attribute columns.

    Per attribute the thresholds are sorted once; a device's place among them is one
    ``searchsorted``, and the joint place (its *cell*) fixes the mask. The mask of a cell is worked
    out the first time a device falls into it.
    """

    schema: Schema
    _bits: dict[Requirement, int] = field(default_factory=dict)
    _thresholds: list[FloatArray] = field(default_factory=list)
    _allowed: list[list[int]] = field(default_factory=list)
    _masks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._compile()

    @property
    def groups(self) -> int:
        """Number of distinct requirements seen so far."""
        return len(self._bits)

    def requirements(self) -> tuple[Requirement, ...]:
        """Distinct requirements in bit order."""
        return tuple(self._bits)

    def add(self, requirement: Requirement) -> int:
        """Return the group (bit) of a requirement, adding it when it is new.

        Raises:
            ConfigError: the requirement names an attribute that the schema lacks.
        """
        known = self._bits.get(requirement)
        if known is not None:
            return known
        for name, value in requirement.bounds:
            if name not in self.schema.attributes:
                expected = "one of " + ", ".join(self.schema.attributes)
                raise ConfigError(f"requirement.{name}", value, expected, "Check the schema")
        self._bits[requirement] = len(self._bits)
        self._compile()
        return self._bits[requirement]

    def masks(self, columns: Sequence[npt.ArrayLike]) -> tuple[list[int], IntArray]:
        """Masks of many devices.

        Args:
            columns: one array of length N per attribute of the schema, in its order.

        Returns:
            The distinct masks, and for each device (int64, length N) the index of its mask.

        Raises:
            ConfigError: wrong number of columns, unequal lengths, NaN or infinite values.
        """
        cells = self._cells(checked_columns(self.schema, columns))
        distinct, inverse = np.unique(cells, return_inverse=True)
        masks = [self._mask_of_cell(int(cell)) for cell in distinct]
        return masks, inverse.astype(np.int64)

    def _compile(self) -> None:
        self._thresholds, self._allowed, self._masks = [], [], {}
        for name in self.schema.attributes:
            bounds = [dict(item.bounds).get(name, -math.inf) for item in self._bits]
            levels = sorted(set(bounds))
            by_level = dict.fromkeys(levels, 0)
            for bit, bound in enumerate(bounds):
                by_level[bound] |= 1 << bit
            allowed = [0]
            for level in levels:
                allowed.append(allowed[-1] | by_level[level])
            self._thresholds.append(np.asarray(levels, dtype=np.float64))
            self._allowed.append(allowed)

    def _cells(self, columns: list[FloatArray]) -> IntArray:
        cells = np.zeros(len(columns[0]), dtype=np.int64)
        for column, levels in zip(columns, self._thresholds):
            cells *= len(levels) + 1
            cells += np.searchsorted(levels, column, side="right")
        return cells

    def _mask_of_cell(self, cell: int) -> int:
        mask = self._masks.get(cell)
        if mask is None:
            mask, rest = -1, cell
            for allowed in reversed(self._allowed):
                rest, place = divmod(rest, len(allowed))
                mask &= allowed[place]
            self._masks[cell] = mask
        return mask


def checked_columns(schema: Schema, columns: Sequence[npt.ArrayLike]) -> list[FloatArray]:
    """Return the attribute columns as finite float64 arrays of equal length.

    Raises:
        ConfigError: names the offending attribute.
    """
    if len(columns) != len(schema.attributes):
        expected = f"{len(schema.attributes)} attribute columns"
        raise ConfigError("columns", len(columns), expected, "Send every attribute of the schema")
    arrays = [np.asarray(column, dtype=np.float64).reshape(-1) for column in columns]
    for name, array in zip(schema.attributes, arrays):
        if len(array) != len(arrays[0]):
            raise ConfigError(f"columns.{name}", len(array), f"{len(arrays[0])} values")
        finite = np.isfinite(array)
        if not finite.all():
            raise ConfigError(f"columns.{name}", float(array[~finite][0]), "finite values")
    return arrays
