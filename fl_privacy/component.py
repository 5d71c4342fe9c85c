"""Components: validated hyperparameters with a name, and how they are found.

A component is a frozen pydantic model whose fields *are* its hyperparameters.
It is written ``name`` or ``name(field=value, ...)`` wherever a user names one:
on the command line, in a Flower run config, in a TOML file.

Built-ins stand in a static table, because inside a Flower app bundle there is no
installed distribution whose entry points could be asked. Other packages add
theirs through the entry-point groups ``fl_privacy.<group>``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

VERSION = "0.1.0"

Group = Literal[
    "adversaries", "defenses", "layer_metrics", "metrics", "models", "datasets", "partitions"
]

BUILT_IN: Mapping[Group, Mapping[str, str]] = {
    "adversaries": {
        "analytic": "adversaries.analytic:Analytic",
        "baseline": "adversaries.baseline:Baseline",
        "dlg": "adversaries.dlg:DLG",
        "gradient_similarity": "adversaries.gradient_similarity:GradientSimilarity",
        "idlg": "adversaries.idlg:IDLG",
        "l2_tv": "adversaries.l2_tv:L2TV",
        "likelihood": "adversaries.likelihood:Likelihood",
        "nearest_image": "adversaries.nearest_image:NearestImage",
        "property_inference": "adversaries.property_inference:PropertyInference",
        "representation": "adversaries.representation:RepresentationMatching",
        "representation_guess": "adversaries.representation_guess:RepresentationGuess",
        "representation_inference": "adversaries.representation_inference:RepresentationInference",
        "rgap": "adversaries.rgap:RGAP",
        "update_over_lr": "adversaries.update_over_lr:UpdateOverLR",
    },
    "defenses": {
        "each_step": "clients.defenses.each_step:EachStep",
        "dp_sgd": "clients.defenses.dp_sgd:DPSGD",
        "gaussian_noise": "clients.defenses.gaussian_noise:GaussianNoise",
        "gradient_compression": "clients.defenses.gradient_compression:GradientCompression",
        "laplace_noise": "clients.defenses.laplace_noise:LaplaceNoise",
        "per_sample_clipping": "clients.defenses.per_sample_clipping:PerSampleClipping",
        "soteria": "clients.defenses.soteria:Soteria",
        "top_k": "clients.defenses.top_k:TopK",
        "update_clipping": "clients.defenses.update_clipping:UpdateClipping",
        "withhold": "clients.defenses.withhold:Withhold",
    },
    "layer_metrics": {
        "fisher_leakage": "adversaries.layerwise.fisher:FisherLeakage",
        "input_sensitivity": "adversaries.layerwise.sensitivity_input:InputSensitivity",
        "label_sensitivity": "adversaries.layerwise.sensitivity_label:LabelSensitivity",
        "subspace_distance": "adversaries.layerwise.subspace:SubspaceDistance",
        "v_information": "adversaries.layerwise.v_information:VInformation",
    },
    "metrics": {
        "auc": "fl_privacy.metrics.auc:AUC",
        "class_precision": "fl_privacy.metrics.representations:ClassPrecision",
        "class_recall": "fl_privacy.metrics.representations:ClassRecall",
        "identifiability": "fl_privacy.metrics.identifiability:Identifiability",
        "label_accuracy": "fl_privacy.metrics.labels:LabelAccuracy",
        "lpips": "fl_privacy.metrics.lpips:LPIPS",
        "mse": "fl_privacy.metrics.images:MSE",
        "psnr": "fl_privacy.metrics.images:PSNR",
        "representation_correlation": (
            "fl_privacy.metrics.representations:RepresentationCorrelation"
        ),
        "ssim": "fl_privacy.metrics.images:SSIM",
    },
    "models": {
        "alexnet-mo": "fl_privacy.models.mo:AlexNetMo",
        "convnet64": "fl_privacy.models.soteria:ConvNet64",
        "das-convnet": "fl_privacy.models.das:DasConvNet",
        "das-fashionnet": "fl_privacy.models.das:DasFashionNet",
        "das-shallow": "fl_privacy.models.das:DasShallow",
        "fcnet-mo": "fl_privacy.models.mo:FCNetMo",
        "lenet5": "fl_privacy.models.lenet5:LeNet5",
        "lenet-zhu": "fl_privacy.models.zhu:LeNetZhu",
        "logistic": "fl_privacy.models.logistic:Logistic",
        "melis": "fl_privacy.models.melis:Melis",
        "mlp": "fl_privacy.models.mlp:MLP",
        "vgg11-mo": "fl_privacy.models.mo:VGG11NetMo",
    },
    "datasets": {
        "adult": "fl_privacy.datasets.adult:Adult",
        "celeba": "fl_privacy.datasets.celeba:CelebA",
        "cifar10": "fl_privacy.datasets.torchvision:CIFAR10",
        "digits": "fl_privacy.datasets.digits:Digits",
        "fashion-mini": "fl_privacy.datasets.embedded:FashionMini",
        "fashion-mnist": "fl_privacy.datasets.torchvision:FashionMNIST",
        "lfw": "fl_privacy.datasets.lfw:LFW",
        "mnist": "fl_privacy.datasets.torchvision:MNIST",
        "npz": "fl_privacy.datasets.npz:NPZ",
        "pubfig": "fl_privacy.datasets.pubfig:PubFig",
    },
    "partitions": {
        "classes-by-samples": "fl_privacy.datasets.partitions:ClassesBySamples",
        "consecutive": "fl_privacy.datasets.partitions:Consecutive",
        "dirichlet": "fl_privacy.datasets.partitions:Dirichlet",
        "iid": "fl_privacy.datasets.partitions:IID",
        "pathological": "fl_privacy.datasets.partitions:Pathological",
    },
}


class ComponentError(ValueError):
    """A component that does not exist, exists twice, or has wrong settings."""


class Component(BaseModel):
    """Base of everything configurable: keyword-only, validated, frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@cache
def installed(group: Group) -> Mapping[str, str]:
    """Name -> ``module:Class`` of every component of a group.

    Raises:
        ComponentError: two packages offer the same name.
    """
    found = dict(BUILT_IN[group])
    for point in entry_points(group=f"fl_privacy.{group}"):
        if point.name in found:
            raise ComponentError(
                f"two {group} are called {point.name!r}: {found[point.name]} and {point.value}; "
                f"uninstall one of the packages or rename its entry point"
            )
        found[point.name] = point.value
    return found


def find(group: Group, name: str) -> type[Component]:
    """The class of an installed component.

    Raises:
        ComponentError: no such name; the message lists those that exist.
    """
    table = installed(group)
    if name not in table:
        singular = group.removesuffix("s").replace("ie", "y")
        raise ComponentError(
            f"no {singular} {name!r}{meant(name, table)}; installed: {', '.join(sorted(table))}"
        )
    module, _, attribute = table[name].partition(":")
    try:
        component: type[Component] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError, NameError, TypeError, ValueError) as error:
        raise ComponentError(
            f"{name} cannot be loaded from {table[name]}: {error}; reinstall the package that "
            f"offers it, or remove it"
        ) from error
    return component


def create(group: Group, spec: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """Make a component from ``name`` or ``name(field=value, ...)`` plus overrides.

    Values are Python literals. Returns an instance of the class that `find` gives;
    the caller narrows it to its protocol.
    """
    name, settings = parse(spec)
    component = find(group, name)
    try:
        return component(**{**settings, **(overrides or {})})
    except ValidationError as error:
        raise ComponentError(describe(name, component, error)) from None


def create_all(group: Group, spec: str) -> tuple[Any, ...]:
    """Components joined by ``+``; an empty text gives none."""
    if not spec.strip():
        return ()
    return tuple(create(group, part) for part in _split(spec))


def spec_of(group: Group, component: BaseModel) -> str:
    """The text that `create` turns back into ``component`` (defaults left out)."""
    wanted = f"{type(component).__module__}:{type(component).__qualname__}"
    name = next(name for name, target in installed(group).items() if target == wanted)
    settings = component.model_dump(exclude_defaults=True)
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in settings.items())})" if settings else name


def spec_of_all(group: Group, components: Iterable[BaseModel]) -> str:
    """The text that `create_all` turns back into ``components``."""
    return "+".join(spec_of(group, component) for component in components)


def canonical(group: Group, spec: str) -> tuple[str, ...]:
    """The parts of ``spec``, each without what is the default; one not installed as it is."""
    try:
        return tuple(spec_of(group, part) for part in create_all(group, spec))
    except ComponentError:
        return (spec,)


def name_of(group: Group, component: object) -> str:
    """The name under which a component is installed; that of its class where it is not."""
    kind = type(component)
    wanted = f"{kind.__module__}:{kind.__qualname__}"
    return next((n for n, target in installed(group).items() if target == wanted), kind.__name__)


def meant(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'this'?`` where one of the ``known`` names is close; else nothing."""
    close = get_close_matches(name, list(known), 1)
    return f", did you mean {close[0]!r}?" if close else ""


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``name(field=value, ...)`` into its name and settings.

    Raises:
        ComponentError: the text is not of that form.
    """
    name, bracket, rest = spec.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        return name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ComponentError(
            f"cannot read {spec!r}: expected name or name(field=value, ...) with Python literals, "
            f"such as gaussian_noise(scale=0.1); quote text, as in npz(path='/data/x.npz')"
        ) from None


def _split(spec: str) -> list[str]:
    """Split at each ``+`` that stands outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(spec):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "+" and depth == 0:
            parts.append(spec[start:i])
            start = i + 1
    return [*parts, spec[start:]]


def describe(name: str, component: type[BaseModel], error: ValidationError) -> str:
    """A validation error in one line: expected, got, and the fields that exist if one was wrong."""
    fields = [f.alias or n for n, f in component.model_fields.items()]
    lines = [_describe_one(name, fields, detail) for detail in error.errors()]
    unknown = any(e["type"] in ("extra_forbidden", "missing") for e in error.errors())
    said = f"{name}: {'; '.join(lines)}"
    stop = "" if said.endswith("?") else "."
    return f"{said}{stop} Settings of {name}: {', '.join(fields) or 'none'}" if unknown else said


def _describe_one(name: str, fields: list[str], detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"no setting {where!r}{meant(where, fields)}"
    if detail["type"] == "missing":
        return f"{where} is required"
    what = str(detail["msg"]).removeprefix("Value error, ")
    what = what[:1].lower() + what[1:]
    held = detail["input"]
    told = detail["type"] == "value_error" and isinstance(held, dict)  # the message names its part
    return f"{where}: {what}{'' if told else f' (got {held!r})'}" if where else what
