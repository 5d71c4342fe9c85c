"""What an adversary changes against each defense that it knows: a table, one entry a defense.

The reasons are read on pages of their own, so they name their papers: Balunovic et al.,
"Bayesian Framework for Gradient Leakage", ICLR 2022, https://arxiv.org/abs/2111.04706; Geiping et
al., "Inverting Gradients", NeurIPS 2020; Zhao et al., "iDLG", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from adversaries.situation import Situation
from fl_privacy import component

COSINE = ("gradient_similarity", "update_over_lr")
"""Adversaries that match the direction of a gradient and nothing else of it."""

SCORED = 256
"""Soteria scores each feature by a backward pass: beyond so many, not in every iteration."""


@dataclass(frozen=True)
class Move:
    """One change to the base adversary.

    ``adversary`` names another one to take, with the base's budget; ``without`` are parameters
    to leave out of the objective; ``hindrance`` says why the move cannot be made, if it cannot.
    """

    name: str
    reason: str
    adversary: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    threat_model: Mapping[str, str] = field(default_factory=dict)
    rounds: str = ""
    hindrance: str = ""


@dataclass(frozen=True)
class Known:
    """A defense as the adversary knows it; ``per_step``: in gradient units, at every local step."""

    defense: Any
    here: Situation
    base: Any
    per_step: bool = False


def soteria(known: Known) -> list[Move]:
    """The pruned columns are zero for all to see, and one layer is not the whole gradient."""
    layer = known.defense.layer or next(iter(known.here.dense), "")
    hindrance = "" if layer else "the network has no dense layer that sees one vector"
    rest = Move(
        f"without {layer}.weight",
        f"Soteria changes the gradient of {layer}.weight alone, so the rest is matched (Balunovic "
        f"et al., ICLR 2022).",
        without=(f"{layer}.weight",),
        hindrance=hindrance,
    )
    label = Move(
        f"{rest.name}, label read",
        f"{rest.reason} The label is read off the bias, which Soteria leaves, and not searched for "
        f"(Zhao et al., iDLG).",
        adversary="idlg",
        without=rest.without,
        hindrance=hindrance,
    )
    return [
        rest,
        *([label] if spec_name(known.base) == "dlg" else []),
        surviving("Pruned columns are exactly zero, which shows the mask: the others are matched."),
    ]


def sparse(known: Known) -> list[Move]:
    """Which entries survived can be seen."""
    return [
        surviving("Entries that were dropped are exactly zero: the surviving ones are matched.")
    ]


def surviving(reason: str) -> Move:
    """Match the entries that are not zero."""
    return Move("surviving entries", reason, settings={"nonzero": True})


def noise(distribution: Literal["gaussian", "laplace"]) -> Callable[[Known], list[Move]]:
    """Moves against noise of a ``scale`` that the defense names.

    The prior comes first, as in few iterations it did more on training images: a squared
    distance is harder to descend than a cosine.
    """

    def moves(known: Known) -> list[Move]:
        return [prior(known), likelihood(distribution, noise_scale(known.defense.scale, known))]

    return moves


def likelihood(distribution: str, scale: float | str) -> Move:
    """The most probable inputs, the noise being known; ``scale`` in gradient units, or why not."""
    known = isinstance(scale, float)
    return Move(
        "likelihood",
        f"Under {distribution} noise of known scale the most probable inputs are sought, so the "
        f"prior weighs as much as the noise makes it (Balunovic et al., ICLR 2022).",
        adversary="likelihood",
        settings={"noise": distribution, "noise_scale": scale} if known else {},
        hindrance="" if known else str(scale),
    )


def noise_scale(scale: float, known: Known) -> float | str:
    """The scale of noise as it stands in an update in gradient units; or why it is unknown.

    Noise of every local step adds up: its deviation grows with the root of their number. That of
    the clients behind an aggregate averages out.
    """
    training = known.here.training
    if training is None:
        return "the learning rate is unknown, so the noise cannot be put in units of a gradient"
    found = scale * math.sqrt(known.here.steps) if known.per_step else scale / training.lr
    found *= known.here.averaged
    return float(f"{found:.6g}") or "there is no noise"


def prior(known: Known) -> Move:
    """Trust pictures more and the noisy gradient less."""
    weight = getattr(known.base, "tv", None)
    return Move(
        "stronger image prior",
        "Noise has no structure and pictures have, so total variation gets ten times the weight.",
        settings={"tv": 10 * weight if weight else 1e-2},
    )


def clipping(known: Known) -> list[Move]:
    """Clipping hides a length; the direction stays."""
    base = spec_name(known.base)
    return [
        Move(
            "direction alone",
            "Clipping scales a gradient and leaves its direction, so the cosine is matched "
            "(Geiping et al., NeurIPS 2020).",
            adversary="gradient_similarity",
            hindrance=f"{base} matches the direction alone as it is" if base in COSINE else "",
        )
    ]


def dp_sgd(known: Known) -> list[Move]:
    """The noise of all local steps, and the clipping."""
    multiplier, budget = known.defense.noise_multiplier, known.defense.epsilon
    scale: float | str = (
        f"the noise that clients chose by epsilon is unknown here, as no audit wrote it down: name "
        f"it if you know it, dp_sgd(epsilon={budget}, noise_multiplier=...)"
    )
    if multiplier is not None or budget is None:
        size = known.here.training.batch_size if known.here.training else 1
        own = (1.0 if multiplier is None else multiplier) * known.defense.max_norm / size
        scale = noise_scale(own, Known(known.defense, known.here, known.base, per_step=True))
    return [prior(known), likelihood("gaussian", scale), *clipping(known)]


def withheld(known: Known) -> list[Move]:
    """A layer that did not move was withheld."""
    layers = tuple(known.defense.layers)
    return [
        Move(
            "without withheld layers",
            "A withheld layer comes back unchanged, which is no gradient to match: the rest is.",
            without=layers,
        )
    ]


def each_step(known: Known) -> list[Move]:
    """The moves against what acts in each step, whose scales are in gradient units."""
    inner = component.create_all("defenses", known.defense.defense)
    return moves_against([Known(d, known.here, known.base, per_step=True) for d in inner])


MOVES: Mapping[str, Callable[[Known], list[Move]]] = {
    "dp_sgd": dp_sgd,
    "each_step": each_step,
    "gaussian_noise": noise("gaussian"),
    "gradient_compression": sparse,
    "laplace_noise": noise("laplace"),
    "per_sample_clipping": clipping,
    "soteria": soteria,
    "top_k": sparse,
    "update_clipping": clipping,
    "withhold": withheld,
}
"""Name of a defense -> what is changed because of it, the move that should do most first."""


def moves_against(defenses: Sequence[Known]) -> list[Move]:
    """The moves against each defense, and then against all of them at once."""
    each = [MOVES[name](k) if (name := name_of(k.defense)) in MOVES else [] for k in defenses]
    for i, moves in enumerate(each):
        if any(is_noise(later.defense) for later in defenses[i + 1 :]):
            each[i] = [drowned(move) for move in moves]
    unique = {move.name: move for moves in each for move in moves}
    first = [next((m for m in moves if not m.hindrance), None) for moves in each]
    possible = [move for move in first if move is not None]
    return [*unique.values(), *([together(possible)] if len(possible) > 1 else [])]


def drowned(move: Move) -> Move:
    """A move that looks for zeros finds none where noise was added after them."""
    if "nonzero" not in move.settings:
        return move
    return Move(move.name, move.reason, hindrance="noise was added to the entries that were zero")


def together(moves: Sequence[Move]) -> Move:
    """Several moves made at once; of two other adversaries the one with the noise's likelihood."""
    kinds = {move.adversary: None for move in moves if move.adversary}
    chosen = "likelihood" if "likelihood" in kinds else next(iter(kinds), "")
    settings = {k: v for move in moves for k, v in move.settings.items()}
    return Move(
        " and ".join(dict.fromkeys(move.name for move in moves)),
        " ".join(move.reason for move in moves),
        adversary=chosen,
        settings=settings,
        without=tuple(name for move in moves for name in move.without),
        threat_model={k: v for move in moves for k, v in move.threat_model.items()},
        rounds="".join(move.rounds for move in moves),
    )


def is_noise(defense: Any) -> bool:
    """Whether a defense adds noise to every entry."""
    return name_of(defense) in ("gaussian_noise", "laplace_noise")


def spec_name(adversary: Any) -> str:
    """The name an adversary is installed under."""
    return component.parse(component.spec_of("adversaries", adversary))[0]


def name_of(defense: Any) -> str:
    """The name a defense is installed under; empty if it is not."""
    wanted = f"{type(defense).__module__}:{type(defense).__qualname__}"
    table = component.installed("defenses")
    return next((name for name, target in table.items() if target == wanted), "")
