"""A Ray of one's own: apart from all others, one thread a process, and an end in every case."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from fl_privacy.processes import MEMORY_SHARES, end
from fl_privacy.simulation import RAY_TIMEOUT, RayTimeoutError
from fl_privacy.superlink import short_folder, signals_ignored, signals_raise

_MARK = "FL_PRIVACY_WORKERS"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_STORE_BYTES = 80 * 2**20
"""Nearly the least that Ray takes; what passes through it is a few words."""


@contextmanager
def private_ray(cpus: int, gpus: int = 0) -> Iterator[None]:
    """A Ray of this process's own, whatever others there are; nothing of it outlives the block.

    Raises:
        RayTimeoutError: it did not start in time, twice.
    """
    mark = secrets.token_hex(16)
    with short_folder() as home, signals_raise():
        try:
            shares = str(-(-cpus // max(1, gpus)))  # of a GPU's memory, or of the machine's
            with _environment({**_ENVIRONMENT, _MARK: mark, MEMORY_SHARES: shares}):
                try:
                    _start(cpus, gpus, str(home))
                except RayTimeoutError:  # which another attempt may survive
                    end(f"{_MARK}={mark}")
                    _start(cpus, gpus, str(home))
            with signals_raise():  # Ray has put its own in their place
                yield
        finally:
            with signals_ignored():
                ray.shutdown()
                end(f"{_MARK}={mark}")


def _start(cpus: int, gpus: int, home: str) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=home,
        )
    except Exception as error:  # Ray has no type for it
        if "timed out during startup" not in str(error):
            raise
        raise RayTimeoutError(RAY_TIMEOUT) from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what is started in the block, and passed on by it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
