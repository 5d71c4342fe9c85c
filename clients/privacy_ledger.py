"""A client's account of its differential privacy, on disk before anything leaves the client.

A SuperNode's own state is in memory only, so it would forget at a restart what it has spent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from clients.accounting import Accountant, AccountingError, epsilon_of
from fl_privacy.privacy_spent import FILE, NoisySteps, PrivacySpent, read_spent
from fl_privacy.recording_store import write_atomically

LOCK_SECONDS = 10.0


class BudgetError(AccountingError):
    """One more participation would exceed the client's budget."""


def charge(
    folder: Path,
    more: NoisySteps,
    *,
    delta: float,
    accountant: Accountant = "prv",
    budget: float | None = None,
) -> PrivacySpent:
    """Add one participation to the account in ``folder``; on disk when this returns.

    Call it before the training whose result leaves: a kill in between counts a participation
    that never left, and never leaves one uncounted. One process at a time; others wait.

    Raises:
        BudgetError: epsilon at ``delta`` would exceed ``budget``; nothing is charged.
        AccountingError: the folder cannot be written, or another process holds it too long.
        SpentError: the account is there and cannot be read.
    """
    with _locked(folder):
        before = read_spent(folder / FILE)
        steps = before.plus(more)
        epsilon = epsilon_of(steps, delta, accountant)
        if budget is not None and epsilon > budget:
            raise BudgetError(_over_budget(before, epsilon, delta, budget))
        after = PrivacySpent(
            participations=before.participations + 1,
            steps=steps,
            epsilon=epsilon if epsilon < float("inf") else None,
            delta=delta,
        )
        try:
            write_atomically([(folder / FILE, after.model_dump_json(indent=2).encode())])
        except OSError as error:
            raise _unwritable(folder, error) from None
    return after


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / f"{FILE}.lock", mode=0o600)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise AccountingError(
            f"{folder}: another process has been charging this client's account for "
            f"{LOCK_SECONDS:.0f} s; give every client a folder of its own (client-state-dir)"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError) -> AccountingError:
    return AccountingError(
        f"{folder}: cannot keep this client's account of privacy ({error.strerror}), so it does "
        f"not train; set client-state-dir to a folder that is writable, has room and is kept"
    )


def _over_budget(before: PrivacySpent, epsilon: float, delta: float, budget: float) -> str:
    return (
        f"this client's privacy budget does not allow another participation: epsilon would be "
        f"{epsilon:.3f} at delta {delta:g}, its budget is {budget:g}, and {before.participations} "
        f"participations are counted already; it takes part no more unless its owner raises "
        f"epsilon or, for data that is new, starts with a new client-state-dir"
    )
