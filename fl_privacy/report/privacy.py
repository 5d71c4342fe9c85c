"""The report's section on differential privacy: what is guaranteed beside what was shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fl_privacy.membership_result import MembershipResult, results_of
from fl_privacy.membership_run import clients_of
from fl_privacy.privacy_spent import FILE as SPENT
from fl_privacy.privacy_spent import PrivacySpent, read_spent
from fl_privacy.report.words import count
from fl_privacy.run_folder import RunFolder

TEMPLATE = """\
<section id="privacy">
<h2>Differential privacy</h2>
{% if clients %}
<p>What DP-SGD guarantees each sample of a client, over all its participations so far (one sample
added or removed). It bounds what anyone can learn from the updates, this server included, if they
cannot repeat the noise: in a simulation it comes from the run's seed.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Privacy spent">
<table class="stack">
<thead><tr><th scope="col">Client</th><th scope="col">Epsilon</th><th scope="col">Delta</th>
<th scope="col">Noise multiplier</th><th scope="col">Participations</th>
<th scope="col">Noisy steps</th></tr></thead>
<tbody>
{% for client in clients %}
<tr><th scope="row">{{ client.name }}</th><td data-label="epsilon">{{ client.epsilon }}</td>
<td data-label="delta">{{ client.delta }}</td>
<td data-label="noise multiplier">{{ client.noise }}</td>
<td data-label="participations">{{ client.participations }}</td>
<td data-label="noisy steps">{{ client.steps }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% for audit in audits %}
{% if audit.other %}
<p><b>Not about this run’s clients:</b> {{ audit.other }}.</p>
{% endif %}
<p>Defense {{ audit.defense }}: {% if audit.bound %}a membership test shows that epsilon is
<b>at least {{ audit.bound }}</b>{% else %}a membership test shows no epsilon above 0{% endif %}
 at delta {{ audit.delta }}{% if audit.epsilon %}, where the accountant guarantees
<b>at most {{ audit.epsilon }}</b>{% else %}; this defense guarantees nothing{% endif %}.
{{ audit.possible }}</p>
{% if audit.violated %}
<p class="loud" role="note">The lower bound is above the guarantee: a bug or a broken assumption
was found.</p>
{% endif %}
<p class="note">{{ audit.how }}</p>
{% endfor %}
</section>
"""


def privacy_section(run: Path) -> Markup:
    """The section of a run folder; empty when no client kept an account and no audit was made.

    Raises:
        SpentError, MembershipError: a file is there and cannot be read.
    """
    clients = [_client(path.parent.name, read_spent(path)) for path in _accounts(run)]
    results = results_of(run)
    if not clients and not results:
        return Markup()
    own = clients_of(run) if RunFolder(run).manifest.exists() else None
    audits = [_audit(result, own.differences(result) if own else []) for result in results]
    audits.sort(key=lambda audit: bool(audit["other"]))
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    shown = page.from_string(TEMPLATE).render(clients=clients, audits=audits)
    return Markup(shown)  # escaped by the template


def _accounts(run: Path) -> list[Path]:
    """The accounts that a simulation's clients kept, in the order of their partitions."""
    found = (run / "clients").glob(f"*/{SPENT}")
    return sorted(found, key=lambda path: (len(path.parent.name), path.parent.name))


def _client(name: str, spent: PrivacySpent) -> dict[str, Any]:
    return {
        "name": name,
        "epsilon": "none guaranteed" if spent.epsilon is None else f"{spent.epsilon:.3f}",
        "delta": "" if spent.delta is None else f"{spent.delta:g}",
        "noise": ", ".join(sorted({f"{part.noise_multiplier:.4g}" for part in spent.steps})),
        "participations": spent.participations,
        "steps": sum(part.count for part in spent.steps),
    }


def _audit(result: MembershipResult, differences: list[str]) -> dict[str, Any]:
    """What a test says; ``differences``: in what it is about another client than the run's."""
    hits, alarms = result.true_positives, result.false_positives
    return {
        "other": ", ".join(differences),
        "defense": result.defense or "none",
        "bound": f"{result.bound:.3f}" if result.bound else "",
        "possible": (
            f"So many trials can show {result.largest_bound:.3f} at most."
            if result.largest_bound
            else "So few trials cannot show anything above 0, whatever leaks: this says nothing."
        ),
        "delta": f"{result.delta:g}",
        "epsilon": "" if result.epsilon is None else f"{result.epsilon:.3f}",
        "violated": result.violated,
        "how": (
            f"{result.model} on {result.dataset}, "
            f"{result.samples} samples, {count(result.steps, 'step')} in "
            f"{count(result.rounds, 'round')} at sample rate {result.sample_rate:.4g}, "
            f"the canary present or {result.neighbors}. "
            f"{hits[0]} of {hits[1]} trials with it and {alarms[0]} of {alarms[1]} without were "
            f"above a threshold that as many other trials chose; Clopper-Pearson, "
            f"{100 * result.confidence:g} % confidence, seed {result.seed}. A low bound is no "
            f"proof of privacy: a better test or more trials may show more."
        ),
    }
