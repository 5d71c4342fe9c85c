"""What a run says of its own clients, for a membership audit of them and for telling them apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fl_privacy.component import canonical
from fl_privacy.membership_result import MembershipError, MembershipResult
from fl_privacy.recording import Manifest, Recording
from fl_privacy.run_folder import RunFolder
from fl_privacy.truth import TruthVault


@dataclass(frozen=True)
class Clients:
    """A run's clients: each defense with the sample counts of those that have it.

    ``defenses`` is empty where no audit wrote it down, a defense is empty for none;
    ``rounds``: those of the run.
    """

    manifest: Manifest
    defenses: dict[str, frozenset[int]]
    rounds: int

    def defense(self) -> str:
        """The one defense of those clients that defend themselves; empty where none does.

        Raises:
            MembershipError: it is unknown, or there are several.
        """
        found = sorted(set(self.defenses) - {""})
        if not self.defenses:
            raise MembershipError(
                "the run does not tell the clients' defense, as no audit wrote it down: name it, "
                "such as --defense 'dp_sgd(noise_multiplier=1.0)', or --defense '' for none"
            )
        if len(found) > 1:
            raise MembershipError(
                f"the run's clients differ in defense: name one with --defense, of "
                f"{'; '.join(found)}"
            )
        return found[0] if found else ""

    def samples(self, defense: str) -> int | None:
        """The fewest samples of a client with ``defense``: it has the largest sample rate."""
        wanted = canonical("defenses", defense)
        return min(
            (
                n
                for d, own in self.defenses.items()
                if canonical("defenses", d) == wanted
                for n in own
            ),
            default=None,
        )

    def differences(self, result: MembershipResult) -> list[str]:
        """In what ``result`` is about another client than the run's, in words; empty if not."""
        found = []
        known = {canonical("defenses", defense): own for defense, own in self.defenses.items()}
        own = known.get(canonical("defenses", result.defense))
        if known and own is None:
            theirs = "; ".join(defense or "none" for defense in sorted(self.defenses))
            found.append(f"defense {result.defense or 'none'} (the run's: {theirs})")
        if result.rounds != self.rounds:
            noun = "round" if result.rounds == 1 else "rounds"
            found.append(f"{result.rounds} {noun} (the run's: {self.rounds})")
        if own and result.samples not in own:
            theirs = ", ".join(map(str, sorted(own)))
            found.append(f"{result.samples} samples (the run's: {theirs})")
        for name, tested, ran in (
            ("model", result.model, self.manifest.model),
            ("dataset", result.dataset, self.manifest.dataset),
            ("local training", result.training, self.manifest.local_training),
        ):
            if ran and tested != ran:
                found.append(f"another {name}")
        return found


def clients_of(run: Path) -> Clients:
    """What the folder of a run says of its clients.

    Raises:
        RecordingError, TruthError: it holds no recording, or something in it is damaged.
    """
    recording = Recording(RunFolder(run).recording)
    told: dict[str, set[int]] = {}
    for defense, stats in TruthVault(RunFolder(run).truth).defenses():
        own = told.setdefault(defense, set())
        own |= {int(stats["samples"])} if "samples" in stats else set()
    planned = recording.manifest.run_config.get("num-server-rounds")
    recorded = len({entry.round for entry in recording.entries()})
    return Clients(
        recording.manifest,
        {defense: frozenset(own) for defense, own in told.items()},
        planned if isinstance(planned, int) else max(recorded, 1),
    )
