"""Conformance checks for plug-ins: call them from your own tests.

Each check makes its own small recording or data, runs the component as fl-privacy
would, and raises `AssertionError` with what was expected, what was found and why it
matters. ::

    from fl_privacy.testing import check_adversary

    def test_my_adversary_conforms():
        check_adversary(MyAdversary(iterations=5))
"""

from fl_privacy.testing.checks import (
    check_adversary,
    check_defense,
    check_layer_metric,
    check_metric,
)
from fl_privacy.testing.toys import toy_model, toy_observations, toy_samples, toy_step

__all__ = [
    "check_adversary",
    "check_defense",
    "check_layer_metric",
    "check_metric",
    "toy_model",
    "toy_observations",
    "toy_samples",
    "toy_step",
]
