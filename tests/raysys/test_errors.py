"""Errors survive a process border and say what to do."""

from __future__ import annotations

import pickle

import pytest

from raysys import errors

SAMPLES = [
    errors.ConfigError("trainer.lr", -1, "a number > 0", "Use 0.1"),
    errors.CapabilityError("vLLM", "not installed", "Run make setup"),
    errors.InfeasibleError("a budget of 3 bytes", "the index alone takes 8", "Raise it"),
    errors.RemoteError("127.0.0.1:1", "refused"),
    errors.StorageError("/a", "full", "Free space"),
    errors.DataError("/a", "damaged"),
    errors.InterruptedRunError("SIGINT"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_pickling_keeps_type_and_text(error: errors.RaysysError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args


def test_every_branch_has_its_own_exit_code() -> None:
    # Those of the tree itself: other modules may be loaded that derive errors of their own.
    direct = [
        branch
        for branch in errors.RaysysError.__subclasses__()
        if branch.__module__ == errors.__name__
    ]
    codes = [branch.exit_code for branch in direct]
    assert len(set(codes)) == len(codes) == 6
    assert 0 not in codes


def test_message_names_field_value_range_and_remedy() -> None:
    assert str(SAMPLES[0]) == "trainer.lr: expected a number > 0, got -1. Use 0.1"


def test_long_values_are_cut() -> None:
    assert len(errors.shorten("x" * 10_000)) <= 80
