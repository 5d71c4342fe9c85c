"""Keep hostile and broken replies out of the aggregate, and say why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from logging import getLogger
from typing import Literal, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_privacy.claims import MOST_EXAMPLES
from fl_privacy.printable import plain
from strategies.decoding import Decoding
from strategies.recorder import NUM_EXAMPLES_KEYS, arrays_of
from strategies.reply_rules import (
    HEADER_BYTES,
    Expected,
    Form,
    arrays_flaw,
    form_of,
    metrics_flaw,
    name_flaw,
    size_flaw,
)
from strategies.require_replies import SHOWN
from strategies.wrapper import StrategyWrapper, chain, weight_key

Policy = Literal["leave-out", "fail"]


class ScreeningError(RuntimeError):
    """A round that cannot go on: nothing is left of it, or the policy wants it whole."""


class Refused(NamedTuple):
    """A reply that is kept out: which (``id()`` of the message), of which node, and why."""

    message: int
    node: int
    reason: str


class Sent(NamedTuple):
    """The arrays of one message to a client, and how they have to come back."""

    arrays: Mapping[str, np.ndarray]
    expected: Mapping[str, Expected]

    @property
    def most_bytes(self) -> int:
        """What all arrays of a reply may hold."""
        return sum(tensor.nbytes + HEADER_BYTES for tensor in self.expected.values())


TOLD_CHARACTERS = 10_000
"""Of an error that a client reports; Ray's hold a traceback before what matters."""


class Screening(StrategyWrapper):
    """Passes on the replies that fit what was sent, untouched and in order of arrival.

    It belongs directly inside the recorder, which stores replies as received and takes the
    reasons from ``refusals``, and around `Decoding` and everything else. It is made for
    strategies whose clients return the tensors that they were sent: the same names in the same
    order, of the same shapes, in the dtypes in which they are or were first sent (Flower turns
    integer buffers into floating point), all finite. Besides, Flower wants exactly one
    ArrayRecord and one MetricRecord, named alike by all clients of a round: in what they may
    choose, the names of records and metrics, most of them decide (a tie goes to what the round
    before agreed on). Values that are only large pass: what to do about these is the
    business of robust strategies.

    A reply that is refused is left out, not turned into an error: Flower's DP wrappers
    aggregate nothing when there is one error. Error replies pass, their reason on one line and
    without control characters, as Flower logs it.

    Args:
        strategy: any Flower strategy or wrapper that averages tensors.
        policy: "leave-out" goes on with the rest, "fail" ends the run.
        most_examples: the most a client may claim.
        withheld: metrics that a client may keep to itself, as NaN.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        policy: Policy = "leave-out",
        most_examples: int = MOST_EXAMPLES,
        withheld: Iterable[str] = (),
    ) -> None:
        super().__init__(strategy)
        self.policy = policy
        self.most_examples = most_examples
        self.withheld = frozenset(withheld)
        self.refusals: list[Refused] = []
        self._weight_key = weight_key(strategy)
        self._sparse = any(isinstance(inner, Decoding) for inner in chain(strategy))
        self._asked: list[Message] = []
        self._sent: dict[int, Sent] = {}
        self._first: dict[str, str] = {}
        self._usual: dict[bool, Form] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._ask(super().configure_train(server_round, arrays, config, grid))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._ask(super().configure_evaluate(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Leave out, then aggregate.

        Raises:
            ScreeningError: nothing is left, or something is refused and the policy is "fail".
        """
        return super().aggregate_train(server_round, self._kept(server_round, replies, train=True))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As `aggregate_train`; arrays of such replies are not looked at."""
        kept = self._kept(server_round, replies, train=False)
        return super().aggregate_evaluate(server_round, kept)

    def _ask(self, messages: Iterable[Message]) -> list[Message]:
        self._asked = list(messages)
        self._sent = {}
        self.refusals = []
        return self._asked

    def _kept(self, round: int, replies: Iterable[Message], *, train: bool) -> list[Message]:
        replies = list(replies)
        flaws = self._flaws(replies, train=train)
        self.refusals = [
            Refused(id(reply), reply.metadata.src_node_id, plain(flaw))
            for reply, flaw in zip(replies, flaws, strict=True)
            if flaw
        ]
        for refusal in self.refusals:
            getLogger("flwr").warning(
                "round %s: the reply of client %s is left out: %s",
                round,
                refusal.node,
                refusal.reason,
            )
        kept = [speakable(r) for r, flaw in zip(replies, flaws, strict=True) if not flaw]
        self._asked, self._sent = [], {}
        if self.refusals and (self.policy == "fail" or all(r.has_error() for r in kept)):
            raise ScreeningError(self._why(round, len(kept), len(replies)))
        return kept

    def _why(self, round: int, kept: int, replies: int) -> str:
        reasons = list(dict.fromkeys(refusal.reason for refusal in self.refusals))
        more = f" (and {len(reasons) - SHOWN} more)" if len(reasons) > SHOWN else ""
        what = f"round {round}: {len(self.refusals)} of {replies} replies are malformed"
        left = (
            "and malformed-replies is fail"
            if self.policy == "fail"
            else f"and {'the others are errors' if kept else 'none is left'}, nothing to aggregate"
        )
        return f"{what}, {left}: {'; '.join(reasons[:SHOWN])}{more}"

    def _flaws(self, replies: Sequence[Message], *, train: bool) -> list[str]:
        """What is wrong with each reply, or nothing."""
        by_id = {m.metadata.message_id: m for m in self._asked if m.metadata.message_id}
        by_node = {m.metadata.dst_node_id: m for m in self._asked}
        answered: set[int] = set()
        flaws = []
        for reply in replies:
            asked = by_id.get(reply.metadata.reply_to_message_id)
            asked = asked or by_node.get(reply.metadata.src_node_id)
            if reply.has_error():
                flaws.append("")
            elif asked is None:
                flaws.append("nothing was sent to this client in this round")
            elif id(asked) in answered:
                flaws.append("this client has answered before in this round")
            else:
                flaws.append(self._flaw(reply, asked, train=train))
                answered.add(id(asked))
        return self._of_another_form(replies, flaws, train=train)

    def _flaw(self, reply: Message, asked: Message, *, train: bool) -> str:
        """What is wrong with a reply by itself; sizes come first."""
        content, sent = reply.content, self._what_was_sent(asked)
        if flaw := size_flaw(content, sent.most_bytes) or name_flaw(content):
            return flaw
        if train and len(content.array_records) != 1:
            return f"the reply holds {len(content.array_records)} ArrayRecords, expected one"
        if len(content.metric_records) != 1:
            return f"the reply holds {len(content.metric_records)} MetricRecords, expected one"
        (metrics,) = content.metric_records.values()
        key = self._weight_key or next((k for k in NUM_EXAMPLES_KEYS if k in metrics), "")
        flaw = metrics_flaw(metrics, key, self.most_examples, self.withheld)
        if flaw or not train:
            return flaw
        (arrays,) = content.array_records.values()
        return arrays_flaw(arrays, sent.expected, sent.arrays, sparse=self._sparse)

    def _what_was_sent(self, message: Message) -> Sent:
        """What is expected back, worked out once where messages share their records."""
        record = next(iter(message.content.array_records.values()), ArrayRecord())
        if id(record) not in self._sent:
            arrays = arrays_of(RecordDict({"": record}))
            for name, array in arrays.items():
                self._first.setdefault(name, array.dtype.name)
            expected = {
                name: Expected(array.shape, frozenset({array.dtype.name, self._first[name]}))
                for name, array in arrays.items()
            }
            self._sent[id(record)] = Sent(arrays, expected)
        return self._sent[id(record)]

    def _of_another_form(
        self, replies: Sequence[Message], flaws: Sequence[str], *, train: bool
    ) -> list[str]:
        """``flaws``, and those of replies that name things otherwise than most do."""
        forms = [
            None if flaw or reply.has_error() else form_of(reply.content)
            for reply, flaw in zip(replies, flaws, strict=True)
        ]
        counts = Counter(form for form in forms if form is not None)
        if not counts:
            return list(flaws)
        usual = self._usual.get(train)
        most = min(counts, key=lambda form: (-counts[form], form != usual, form))
        self._usual[train] = most
        odd = "it names its records or metrics otherwise than most replies"
        return [
            odd if form not in (None, most) else flaw
            for form, flaw in zip(forms, flaws, strict=True)
        ]


def speakable(reply: Message) -> Message:
    """An error reply whose reason may be logged; any other reply as it is."""
    if not reply.has_error():
        return reply
    reason = " ".join(plain(reply.error.reason or "").split())[:TOLD_CHARACTERS]
    told = copy(reply)
    told.error = Error(reply.error.code, reason)
    return told
