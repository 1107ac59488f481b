"""Errors of LTE; each is also one of the house's classes, so exit codes and remedies are the same.

LTEConfigError      an option, shape or architecture is wrong            (ConfigError)
LTECheckpointError  a checkpoint's content does not hold together        (DataError)
LTEDataError        text, labels or numbers cannot be trained on         (DataError)
"""

from __future__ import annotations

from raysys.errors import ConfigError, DataError


class LTEConfigError(ConfigError):
    """An LTE option, or the model that it is applied to, is wrong."""


class LTECheckpointError(DataError):
    """An LTE checkpoint is damaged, of another version, or at another stage than needed."""


class LTEDataError(DataError):
    """What a model is trained or evaluated on is empty, too short, or not finite."""
