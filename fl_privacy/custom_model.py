"""A network that a user names on the command line, and whether it fits the task."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fl_privacy.types import ModelFactory, Task

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What code of others raises when it is wrong."""

DEBUG = "fl-privacy --debug ... shows where"


class ModelError(ValueError):
    """A network that cannot be had, or does not do what the task says."""


def custom_model(path: str) -> ModelFactory:
    """The factory at ``package.module:factory``, a function or class that needs no arguments.

    Modules are looked for in the current folder too, after all others.

    Raises:
        ModelError: it cannot be imported or called, or does not return a finished module.
    """
    factory: ModelFactory = imported(path)
    if not callable(factory):
        raise ModelError(
            f"--model {path}: expected a function or class that makes the network, got "
            f"{type(factory).__name__}"
        )
    _check_no_arguments(path, factory)
    try:
        model = factory()
    except FAILURES as error:
        raise ModelError(f"--model {path} failed with {_told(error)}; {DEBUG}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"--model {path}: expected a torch.nn.Module when called, got {type(model).__name__}"
        )
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ModelError(
            f"--model {path}: {lazy[0]} has no shape yet; run the network once before the "
            f"factory returns it"
        )
    return factory


def imported(path: str) -> Any:
    """What ``package.module:name`` names.

    Raises:
        ModelError: not of that form, not found, or the module fails.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ModelError(
            f"--model expects package.module:factory, such as my_app.net:build, got {path!r}"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = import_module(module)
    except FAILURES as error:
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")
        remedy = "run from its folder, or name that in PYTHONPATH" if missing else DEBUG
        raise ModelError(f"--model {path}: cannot import {module}: {error}; {remedy}") from error
    if not hasattr(found, name):
        own = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == module]
        raise ModelError(
            f"--model {path}: {module} has no {name!r}; it defines {', '.join(own) or 'nothing'}"
        )
    return getattr(found, name)


def check_runs(model: nn.Module, task: Task) -> None:
    """Send one input of the task through the network.

    Raises:
        ModelError: it does not run, or does not give one number a class.
    """
    model = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *task.input_shape))
    except FAILURES as error:
        raise ModelError(
            f"the network does not run on one input of shape {task.input_shape}: {_told(error)}; "
            f"expected a network for float inputs of the task's input_shape (token ids are out "
            f"of scope)"
        ) from error
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, task.classes):
        got = (
            f"shape {tuple(outputs.shape)}"
            if isinstance(outputs, torch.Tensor)
            else type(outputs).__name__
        )
        raise ModelError(
            f"the network gives {got} for one input: expected one logit for each of the "
            f"{task.classes} classes of the task, shape (1, {task.classes})"
        )


def _check_no_arguments(path: str, factory: Callable[..., Any]) -> None:
    try:
        needed = [
            p.name
            for p in signature(factory).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except ValueError:  # written in C: it will say itself what it needs
        return
    if needed:
        raise ModelError(
            f"--model {path} needs {', '.join(needed)}: expected a factory without arguments; "
            f"write a function that fills them in"
        )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
