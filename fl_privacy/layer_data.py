"""The samples that layer metrics are measured on: the adversary's, or in an audit the clients'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fl_privacy.datasets.npz import NPZ
from fl_privacy.layer_results import Source, samples_digest
from fl_privacy.plan import AnalysisError
from fl_privacy.result_rows import members_of
from fl_privacy.threat_model import load_auxiliary
from fl_privacy.truth import TruthVault
from fl_privacy.truth_check import REMEDY, misfit
from fl_privacy.types import Exchange, Observation, Samples, Task

GIVE = (
    'give the adversary\'s own data with --auxiliary "DATASET SPEC" or --auxiliary FILE.npz, or '
    "measure on the clients' own samples with --audit (of an audited run)"
)
"""What to do where a metric lacks data."""


@dataclass(frozen=True)
class LayerData:
    """Samples, whose they are, and what they are called in a report; none for none.

    ``given`` is what names them on the command line.
    """

    samples: Samples | None
    source: Source
    name: str
    digest: str
    given: str = ""


PEOPLE = "people"
"""The array of a file that numbers the person behind each sample."""

NOTHING = LayerData(None, "none", "", "")


def data_of(samples: Samples, source: Source, name: str, given: str = "") -> LayerData:
    """Samples with the digest of their content."""
    return LayerData(samples, source, name, samples_digest(samples), given)


def auxiliary_data(given: str, task: Task) -> LayerData:
    """The samples that ``given`` means: a dataset's test split, or all of a file ``*.npz``.

    Raises:
        ComponentError, DatasetError: it cannot be loaded.
        ThreatModelError: inputs of another shape than the task's.
        AnalysisError: a file whose inputs have another shape or range than the task's.
    """
    if not given.strip().lower().endswith(".npz"):
        samples = load_auxiliary(given, task)
        assert samples is not None, "the caller has a text"
        return data_of(samples, "auxiliary", f"the test split of {given}", given)
    path = Path(given.strip()).expanduser().absolute()
    samples = samples_of_file(path)
    if wrong := misfit(samples, task):
        raise AnalysisError(f"{path}: {wrong}; {REMEDY}")
    return data_of(samples, "auxiliary", f"the file {path.name}", str(path))


def samples_of_file(path: Path) -> Samples:
    """All samples of a file with the arrays ``inputs`` and ``labels``.

    An array ``people`` numbers the person behind each sample; every other array of one integer a
    sample is a property of its name. Layout and types are those of the dataset `npz`; samples
    of negative label are left out.

    Raises:
        DatasetError: it cannot be read, or lacks an array.
    """
    source = NPZ(
        path=str(path), x="inputs", y="labels", properties=_properties(path), test_fraction=0.5
    )
    every = Samples.joined([source.load("train"), source.load("test")])
    properties = dict(every.properties)
    return replace(every, people=properties.pop(PEOPLE, None), properties=properties)


def _properties(path: Path) -> tuple[str, ...]:
    """Names of the arrays that hold one integer a sample; none where `NPZ` will refuse the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "labels" not in file.files:
                return ()
            shape = file["labels"].shape
            others = [name for name in file.files if name not in ("inputs", "labels")]
            arrays = {name: file[name] for name in others}
    except (OSError, ValueError, BadZipFile):
        return ()
    return tuple(n for n, a in arrays.items() if a.shape == shape and a.dtype.kind in "iub")


def audit_data(observations: Sequence[Observation], vault: TruthVault) -> LayerData:
    """The clients' own samples behind ``observations``, each once.

    Raises:
        AnalysisError: the run kept no truth.
        TruthError: it is damaged, or that of an exchange is missing.
    """
    if not vault.root.exists():
        raise AnalysisError(
            "--audit needs the truth of an audited run (audit=true; simulate --audit), and this "
            'run kept none: give --auxiliary "DATASET SPEC" or FILE.npz instead'
        )
    members: Iterable[Exchange] = (m for o in observations for m in members_of(o.exchanges))
    samples = vault.samples(list(members))
    return data_of(samples, "audit", "the clients’ own samples (audit)")
