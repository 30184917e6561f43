"""What tuning found for calls of one bucket: the choices, and what was predicted and measured for each option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnc.runtime.tuning.choice_keys import BUCKET, Key

KIND = "tuned"
SCHEMA = 1

MODEL = "model"
"""The option that the cost model takes by itself."""

Stage = Literal["forward", "training"]
"""What was measured: a call, or a call and its backward."""


@dataclass(frozen=True)
class KnobTrial:
    """An option of a knob, in milliseconds; `predicted` is None where the model says nothing of it."""

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
    """The choices of a key and bucket, by knob. A knob decides one thing: the pieces of an attention, or the tiles of
    one of its kernels.
    """

    key: Key
    bucket: str
    stage: Stage
    choices: Mapping[str, str]
    trials: tuple[KnobTrial, ...]

    @property
    def name(self) -> str:
        """The name of its entry."""
        return name_of(self.key, self.bucket)

    def payload(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "schema": SCHEMA,
            "key": dict(self.key.parts),
            "bucket": self.bucket,
            "stage": self.stage,
            "choices": dict(self.choices),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def why(self, knob: str) -> str:
        """Why a knob stands where it does."""
        own = {trial.option: trial for trial in self.trials if trial.knob == knob}
        chosen, model = own.get(self.choices.get(knob, "")), own.get(MODEL)
        if chosen is None or model is None:
            return f"tuned for {self.bucket}"
        if chosen is model:
            return f"tuned for {self.bucket}: the model's choice is the fastest of {len(own)}, {model.median:.3f} ms"
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
    """The name of the entry of a key and bucket."""
    return f"{key.digest}-{bucket}"


def read_record(payload: Mapping[str, Any]) -> Record | None:
    """The record of a payload; None for one that is none."""
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


def _trial(told: Mapping[str, Any]) -> KnobTrial:
    predicted = told["predicted"]
    median, low, high = (_ms(told[name]) for name in ("median", "low", "high"))
    known = None if predicted is None else _ms(predicted)
    return KnobTrial(_text(told["knob"]), _text(told["option"]), known, median, low, high, int(told["rounds"]))


def _ms(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise TypeError(f"{value!r} are no milliseconds")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
