"""Flower's clipping mods, for the run's setting ``dp-strategy``."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

from clients.mods import Next
from fl_privacy.component import parse

MODS = {
    "client-side-fixed-clipping": fixedclipping_mod,
    "client-side-adaptive-clipping": adaptiveclipping_mod,
}
"""The mod that each of Flower's client-side strategies counts on."""


def clipping_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Clip the update of a training reply as the run's ``dp-strategy`` wants, or hand it on.

    The norm comes with the server's message, as ``clipping_norm`` of its ConfigRecord.
    """
    name, _ = parse(str(context.run_config.get("dp-strategy", "")))
    mod = MODS.get(name)
    return mod(message, context, call_next) if mod else call_next(message, context)
