"""Records of tuning for calls of one bucket: the choices, and the predicted and measured times of each option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnc.runtime.choices.choice_keys import BUCKET, Key

KIND = "tuned"
SCHEMA = 1

MODEL = "model"
"""The option that the cost model chooses."""

Stage = Literal["forward", "training"]
"""The measured part: a call, or a call and its backward."""


@dataclass(frozen=True)
class KnobTrial:
    """The measured milliseconds of one option of a knob; `predicted` is None where the model predicts nothing."""

    knob: str
    option: str
    predicted: float | None
    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        predicted = "–" if self.predicted is None else f"{self.predicted:.3f} ms"
        return f"{self.option}: {self.median:.3f} ms ({self.low:.3f} – {self.high:.3f}), predicted {predicted}"


@dataclass(frozen=True)
class Record:
    """The choices for a key and bucket, by knob.

    A knob decides one thing: the pieces of an attention, or the tiles of one of its kernels.
    """

    key: Key
    bucket: str
    stage: Stage
    choices: Mapping[str, str]
    trials: tuple[KnobTrial, ...]

    @property
    def name(self) -> str:
        """The name of the record's cache entry."""
        return name_of(self.key, self.bucket)

    def payload(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        return {
            "schema": SCHEMA,
            "key": dict(self.key.parts),
            "bucket": self.bucket,
            "stage": self.stage,
            "choices": dict(self.choices),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def why(self, knob: str) -> str:
        """Return the reason for a knob's choice."""
        trials = {trial.option: trial for trial in self.trials if trial.knob == knob}
        chosen, model = trials.get(self.choices.get(knob, "")), trials.get(MODEL)
        if chosen is None or model is None:
            return f"tuned for {self.bucket}"
        if chosen is model:
            return f"tuned for {self.bucket}: the model's choice is the fastest of {len(trials)}, {model.median:.3f} ms"
        return (
            f"tuned for {self.bucket}: {chosen.option}, {chosen.median:.3f} ms; the model's choice takes "
            f"{model.median:.3f} ms"
        )

    def __str__(self) -> str:
        lines = [f"{self.bucket}, {self.stage}"]
        for trial in self.trials:
            mark = "→" if self.choices.get(trial.knob) == trial.option else " "
            knob = f"{trial.knob}: " if trial.knob else ""
            lines.append(f"  {mark} {knob}{trial}")
        return "\n".join(lines)


def name_of(key: Key, bucket: str) -> str:
    """Return the name of the cache entry for a key and bucket."""
    return f"{key.digest}-{bucket}"


def read_record(payload: Mapping[str, Any]) -> Record | None:
    """Return the record of a payload; None for an invalid one."""
    try:
        if payload["schema"] != SCHEMA or payload["stage"] not in ("forward", "training"):
            return None
        parts = {_text(name): _text(value) for name, value in payload["key"].items()}
        choices = {_text(knob): _text(option) for knob, option in payload["choices"].items()}
        trials = tuple(_trial(trial) for trial in payload["trials"])
        bucket = _text(payload["bucket"])
        return Record(Key.of(parts), bucket, payload["stage"], choices, trials) if BUCKET.fullmatch(bucket) else None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _trial(data: Mapping[str, Any]) -> KnobTrial:
    predicted = data["predicted"]
    median, low, high = (_ms(data[name]) for name in ("median", "low", "high"))
    predicted_ms = None if predicted is None else _ms(predicted)
    return KnobTrial(_text(data["knob"]), _text(data["option"]), predicted_ms, median, low, high, int(data["rounds"]))


def _ms(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise TypeError(f"{value!r} are no milliseconds")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
