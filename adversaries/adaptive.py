"""How an adversary that knows the defense changes its attack.

A defense is to be judged by an adversary that knows it (Kerckhoffs): each adaptation is an
ordinary adversary with the budget of the one that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adversaries.adaptive_moves import (
    SCORED,
    Known,
    Move,
    is_noise,
    moves_against,
    name_of,
    spec_name,
    together,
)
from adversaries.situation import Situation
from fl_privacy import component
from fl_privacy.component import Component
from fl_privacy.defenses import without_noise

BUDGET = (
    *("restarts", "lr", "signed", "boxed", "width"),
    *("batch_norm", "layers", "nonzero", "local_steps"),
)
"""Settings that another adversary takes over from the base, where both have them."""


@dataclass(frozen=True)
class Adaptation:
    """An adversary that knows the defense: ``adversary`` is its spec.

    ``threat_model`` and ``rounds`` replace what the plan says. ``told`` is false where the
    knowledge is not needed.
    """

    name: str
    reason: str
    adversary: str
    threat_model: Mapping[str, str] = field(default_factory=dict)
    rounds: str = ""
    told: bool = True

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides what it does."""
        return self.adversary, tuple(self.threat_model.items()), self.rounds


@dataclass(frozen=True)
class Skipped:
    """An adaptation that cannot be made here, and why."""

    name: str
    reason: str


def adaptations(
    defenses: Sequence[Any], base: Component, here: Situation
) -> list[Adaptation | Skipped]:
    """Every way in which ``base`` can adapt to ``defenses``, in the order of the table.

    Those that come to the same adversary appear once.
    """
    moves = moves_against([Known(defense, here, base) for defense in defenses])
    first = [move for move in moves if not move.hindrance][:1]
    always = [linked(here), early(here)]
    moves += [inside(defenses, here), *always]
    moves += [together([*first, move]) for move in always if first and not move.hindrance]
    simulated = not cannot_simulate(defenses, here)
    unread = pruned(defenses, here)
    made: dict[object, Adaptation | Skipped] = {}
    for move in moves:
        one = applied(move, base, simulated=simulated, unread=unread)
        made.setdefault(one.identity if isinstance(one, Adaptation) else one.name, one)
    return list(made.values())


def inside(defenses: Sequence[Any], here: Situation) -> Move:
    """The defense inside the objective: what is simulated is defended as the client does."""
    return Move(
        "defense inside",
        "What is simulated passes through the same defense, less its noise, before it is matched "
        "(Balunovic et al., ICLR 2022).",
        settings={"defended": True},
        hindrance=cannot_simulate(defenses, here),
    )


def cannot_simulate(defenses: Sequence[Any], here: Situation) -> str:
    """Why a defense is not put inside the objective; empty when it is."""
    if not without_noise(defenses):
        return "the defense is nothing but noise of mean zero, so the plain objective has it inside"
    shown = not any(is_noise(d) for d in defenses)
    for soteria in (d for d in defenses if name_of(d) == "soteria"):
        if shown and (here.images == 1 or soteria.masks == "batch"):
            return "one mask prunes the whole batch and can be seen: matching survivors is the same"
        features = here.dense.get(soteria.layer, next(iter(here.dense.values()), 0))
        if features > SCORED:
            return (
                f"Soteria would score {features} features of each image in every iteration; run it "
                f"by hand with --set defended=true if you have the time"
            )
    return ""


def pruned(defenses: Sequence[Any], here: Situation) -> str:
    """The weight that Soteria prunes, off which the labels of several images are misread.

    Empty for one image, whose label is exact all the same, and without a bias to count them by.
    """
    for soteria in (d for d in defenses if name_of(d) == "soteria"):
        layer = soteria.layer or next(iter(here.dense), "")
        if here.images > 1 and f"{layer}.bias" in dict(here.network.named_parameters()):
            return f"{layer}.weight"
    return ""


def linked(here: Situation) -> Move:
    """All rounds of a client together."""
    return Move(
        "rounds of one client",
        "Rounds on the same images show other noise and other masks each time, which average out.",
        threat_model={"unit": "client"},
        hindrance=here.unlinkable,
    )


def early(here: Situation) -> Move:
    """The first tenth of the rounds, one at least."""
    first = here.rounds[: max(1, len(here.rounds) // 10)]
    return Move(
        "early rounds",
        "A network that has learned little gives larger gradients, of which a defense hides less "
        "(Balunovic et al., ICLR 2022: defenses fail early in training).",
        rounds=f"{first[0]}-{first[-1]}" if len(first) > 1 else str(first[0]),
        hindrance="" if len(here.rounds) > 1 else "only one round was attacked",
    )


def applied(
    move: Move, base: Component, *, simulated: bool, unread: str = ""
) -> Adaptation | Skipped:
    """The base adversary after a move.

    A likelihood is that of noise around what the rest of the defense leaves: where that can be
    ``simulated``, it is. Whoever is told the defense leaves the parameters ``unread`` that spoil
    labels.
    """
    if move.hindrance:
        return Skipped(move.name, move.hindrance)
    spec = component.spec_of("adversaries", base)
    name = move.adversary or spec_name(base)
    held = settings_of(base) if not move.adversary else budget(base, name)
    wanted = dict(move.settings)
    if name == "likelihood" and simulated:
        wanted["defended"] = True
    if move.without:
        layers = [str(held.get("layers", "all")), *(f"-{layer}" for layer in move.without)]
        wanted["layers"] = ",".join(layers).removeprefix("all,")
    fields = component.find("adversaries", name).model_fields
    for setting in wanted:
        if setting not in fields:
            return Skipped(move.name, f"{name} has no setting {setting!r}")
    told = bool(move.settings or move.without or move.adversary)
    if told and unread and "unread" in fields:
        wanted["unread"] = unread
    try:
        changed = component.create("adversaries", name, {**held, **wanted})
    except component.ComponentError as error:
        return Skipped(move.name, str(error))
    adversary = component.spec_of("adversaries", changed)
    if adversary == spec and not move.threat_model and not move.rounds:
        return Skipped(move.name, "the plain attack is the same")
    return Adaptation(move.name, move.reason, adversary, move.threat_model, move.rounds, told)


def settings_of(base: Component) -> dict[str, Any]:
    """What was chosen for an adversary beside its defaults."""
    return base.model_dump(exclude_defaults=True)


def budget(base: Component, name: str) -> dict[str, Any]:
    """The settings that make adversary ``name`` spend what ``base`` does."""
    fields = component.find("adversaries", name).model_fields
    held = {k: v for k, v in base.model_dump().items() if k in BUDGET and k in fields}
    iterations = getattr(base, "iterations", None)
    if iterations is not None and "iterations" in fields:
        inner = getattr(base, "inner", 1)
        held |= {"inner": inner} if "inner" in fields else {}
        held["iterations"] = iterations if "inner" in fields else iterations * inner
    return held
