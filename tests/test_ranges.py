import dataclasses
import json
import math
import typing

import numpy as np
import pytest

from flax_transformer.config import TransformerConfig
from flax_transformer.decoding.settings import BeamSearch, Sampling
from flax_transformer.experiment import DataConfig, TrainingConfig, VocabularyConfig
from flax_transformer.ranges import Range, check, setting

SETTINGS = {
    TransformerConfig: "model.",
    VocabularyConfig: "vocabulary.",
    DataConfig: "data.",
    TrainingConfig: "training.",
    **{
        field.type: f"training.{field.name}."
        for field in dataclasses.fields(TrainingConfig)
        if dataclasses.is_dataclass(field.type)
    },
    BeamSearch: "",
    Sampling: "",
}
FIELDS = [(settings, field) for settings in SETTINGS for field in dataclasses.fields(settings)]


def kind_of(field):
    return (*(kind for kind in typing.get_args(field.type) if kind is not type(None)), field.type)[0]


def fields_of(*kinds):
    chosen = [(settings, field.name) for settings, field in FIELDS if kind_of(field) in kinds]
    return pytest.mark.parametrize(("settings", "name"), chosen, ids=lambda value: getattr(value, "__name__", value))


def made_with(settings, name, value):
    """Makes settings with a value that beartype, which checks signatures in tests, would refuse."""
    made = settings()
    object.__setattr__(made, name, value)
    made.__post_init__()
    return made


def refused(settings, name, value):
    with pytest.raises(ValueError) as caught:
        made_with(settings, name, value)
    message = str(caught.value)
    assert message.startswith(f"{SETTINGS[settings]}{name} is ") and "\n" not in message and len(message) < 300, message
    return message


@fields_of(int, float)
def test_every_number_has_a_range(settings, name):
    (field,) = (field for field in dataclasses.fields(settings) if field.name == name)
    assert isinstance(field.metadata["allowed"], Range)
    if name != "alpha":
        refused(settings, name, [-1] if name in ("banned", "banned_ids", "suppressed_ids") else -1)


@fields_of(int)
def test_settings_for_whole_numbers_refuse_anything_else(settings, name):
    is_sequence = name in ("banned", "banned_ids", "suppressed_ids")
    for wrong in (True, 3.5, math.nan, math.inf, "3", np.float32(2.5), np.bool_(True), [3], {}):
        refused(settings, name, [wrong] if is_sequence else wrong)
    refused(settings, name, 3 if is_sequence else "three")


@fields_of(float)
def test_settings_for_numbers_refuse_anything_that_is_not_finite(settings, name):
    for wrong in (True, math.nan, math.inf, -math.inf, np.float32("nan"), 1e300, 10**400, "0.5", None, [0.5]):
        refused(settings, name, wrong)


@fields_of(bool)
def test_settings_for_booleans_refuse_anything_else(settings, name):
    for wrong in ("false", 2, None, 0.5, math.nan):
        assert refused(settings, name, wrong).endswith("it must be true or false")
    assert getattr(made_with(settings, name, np.bool_(True)), name) is True


@fields_of(str)
def test_settings_for_strings_refuse_anything_else(settings, name):
    is_sequence = name == "user_symbols"
    for wrong in (3, None, True, ["a"]):
        refused(settings, name, [wrong] if is_sequence else wrong)
    refused(settings, name, "a" if is_sequence else ["a"])


def test_what_is_no_section_is_refused_where_one_belongs():
    for wrong in (3, None, {}, "fsdp"):
        assert refused(TrainingConfig, "optimizer", wrong).endswith("it must be a section of settings")


def test_none_is_refused_except_where_it_means_no_limit():
    assert BeamSearch(max_length=None).max_length is None
    refused(BeamSearch, "extra_length", None)


@dataclasses.dataclass(frozen=True)
class Example:
    count: int = setting(1, Range(at_least=1, within=Range(at_most=10)))
    share: float = setting(0.5, Range(above=0, below=1))
    many: typing.Sequence[int] = setting((), Range(at_least=0))
    kind: str = setting("a", ("a", "b"))

    def __post_init__(self):
        check(self, "example")


def test_numpy_numbers_and_whole_floats_become_json_numbers():
    found = Example(count=np.int64(3), share=np.float32(0.25), many=np.array([4, 5]), kind=np.str_("b"))
    assert found == Example(3, 0.25, (4, 5), "b") == Example(3.0, 0.25, [4, 5], "b")
    assert hash(found) == hash(Example(3, 0.25, (4, 5), "b")) and isinstance(Example(3.0).count, int)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == {"count": 3, "share": 0.25, "many": [4, 5], "kind": "b"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "example.count is 0: it must be at least 1"),
        ({"count": 11}, "example.count is 11: it must be at most 10"),
        ({"count": "x"}, "example.count is 'x': it must be a whole number, at least 1"),
        ({"share": 0}, "example.share is 0: it must be above 0 and below 1"),
        ({"share": 1}, "example.share is 1: it must be above 0 and below 1"),
        ({"many": [1, -1]}, "example.many is -1: it must be at least 0"),
        ({"many": 1}, "example.many is 1: it must be a list"),
        ({"many": "12"}, "example.many is '12': it must be a list"),
        ({"kind": "c"}, "example.kind is 'c': choose one of a, b"),
    ],
)
def test_an_error_names_the_setting_the_value_and_what_is_allowed(values, message):
    with pytest.raises(ValueError) as caught:
        Example(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize("share", [1e-60, 1 - 1e-12])
def test_a_number_that_a_device_would_round_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="it must be above 0 and below 1"):
        Example(share=share)


def test_the_extreme_exponents_give_a_finite_nonzero_length_penalty():
    for penalty in ("paper", "length"):
        for alpha in (-5, 5):
            at_longest = np.float32(BeamSearch(alpha=alpha, length_penalty=penalty).penalty(2_000_000))
            assert np.isfinite(at_longest) and np.isfinite(np.float32(-1e5) / at_longest) and at_longest > 0
