"""Do recorded tensors fit a model? By name, or by place where they have no names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fl_privacy.recording_format import RecordingError, Schema


def match_names(state_dict: Mapping[str, Tensor], schema: Schema) -> dict[str, str]:
    """Recorded name -> name in ``state_dict``.

    Equal names match. A recording of legacy arrays, which have no names (``0, 1, ...``),
    is matched by order, with every shape checked.

    Raises:
        RecordingError: the first tensor that does not fit, expected and got.
    """
    legacy = schema.names == tuple(str(i) for i in range(len(schema.names)))
    if not legacy or set(schema.names) <= set(state_dict):
        check_fits(state_dict, schema.shapes)
        return {name: name for name in schema.names}
    matched = dict(zip(schema.names, state_dict, strict=False))
    for number, name in matched.items():
        expected, got = tuple(state_dict[name].shape), schema.shapes[number]
        if expected != got:
            raise RecordingError(
                f"array {number} of the recording, which has no names, has shape {got}: by its "
                f"place it is {name!r} of the model, of shape {expected}; give the model that was "
                f"trained, or one with its layers in the order of the arrays"
            )
    if len(state_dict) != len(schema.names):
        raise RecordingError(_odd_count(state_dict, schema))
    return matched


def _odd_count(state_dict: Mapping[str, Tensor], schema: Schema) -> str:
    recorded, own = len(schema.names), len(state_dict)
    if recorded > own:
        return (
            f"the recording holds {recorded} unnamed arrays, the model has {own} tensors: array "
            f"{own}, of shape {schema.shapes[str(own)]}, belongs to none; give the model that was "
            f"trained"
        )
    return (
        f"the recording holds {recorded} unnamed arrays, the model has {own} tensors: nothing is "
        f"recorded for {list(state_dict)[recorded]!r}; give the model that was trained (clients "
        f"have to send the whole state_dict, buffers too)"
    )


def check_fits(state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that recorded tensors are those of a model: same names, same shapes.

    Raises:
        RecordingError: the first tensor that does not fit, expected and got.
    """
    remedy = "give the model that was trained"
    for name, tensor in state_dict.items():
        if name not in shapes:
            raise RecordingError(
                f"tensor {name!r} of the model is not in the recording, which begins with "
                f"{', '.join(list(shapes)[:3])}; {remedy}"
            )
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise RecordingError(
                f"tensor {name!r}: the model expects shape {tuple(tensor.shape)}, the recording "
                f"holds {tuple(shapes[name])}; {remedy}"
            )
    for name in shapes:
        if name not in state_dict:
            raise RecordingError(
                f"tensor {name!r} of the recording is not in the model, which begins with "
                f"{', '.join(list(state_dict)[:3])}; {remedy}"
            )
