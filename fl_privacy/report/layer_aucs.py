"""What attackers got from each layer alone: the AUC of property inference, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from fl_privacy.component import parse
from fl_privacy.prediction import LayerAuc
from fl_privacy.property_rows import counted, scored
from fl_privacy.report.scores import Analysis, defenses, null_of, score
from fl_privacy.report.words import group_title

AUC = "auc"


def layer_aucs(found: Sequence[Analysis]) -> list[LayerAuc]:
    """The AUC at every layer that was scored alone: attack by attack, defense by defense."""
    attacks = [a for a in found if not a.is_baseline]
    return [one for a in attacks for one in aucs_of(a, null_of(a, found))]


def aucs_of(analysis: Analysis, null: Analysis | None = None, *, whole: str = "") -> list[LayerAuc]:
    """The AUC at every layer of one attack, beside that of its ``null``.

    That of the whole update is among them where there is a name for it, ``whole``.
    """
    groups = defenses([analysis])
    config = analysis.config
    aucs = []
    for defense in groups:
        who = analysis.label + (f", {group_title(defense).lower()}" if len(groups) > 1 else "")
        for metric in analysis.config.metrics:
            name, settings = parse(metric.spec or metric.name)
            layer = str(settings.get("layer") or whole)
            if name != AUC or not layer:
                continue
            auc = score(analysis, defense, metric, None).interval
            chance = score(null, defense, metric, None).interval if null else None
            if auc.n:
                known = counted(scored(analysis.of(defense), metric.name)), config.relation
                aucs.append(LayerAuc(who, config.about, layer, auc, chance, *known))
    return aucs
