"""The lenient wire types: every spelling of a meaning is read, the rest is refused with a sentence."""

import math
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from serve_app.api.fields import (
    MAX_ITEMS,
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    Flag,
    Name,
    Names,
    Problems,
    Real,
    Reals,
    Text,
    TrackId,
    Whole,
    WireModel,
    absent,
    one_of_words,
    parse,
    per_item,
    read_integer,
    read_real,
    show,
)
from serve_app.errors import ValidationFailed


class Wish(WireModel):
    verbatim = frozenset({"track_id"})

    flag: Flag = False
    text: Text = "default"
    name: Name = ""
    names: Names = ()
    whole: Annotated[int, Whole(64, 1024, 8)] = 512
    real: Annotated[float, Real(0, 1, above=True)] = 1.0
    reals: Annotated[tuple[float, ...], Reals(0, 20)] = ()
    word: Annotated[str, one_of_words("a", "b")] = "a"
    track_id: TrackId = None


def messages(body: dict[str, JsonValue]) -> dict[str, list[str]]:
    _, problems = parse(Wish, body)
    try:
        problems.raise_if_any()
    except ValidationFailed as error:
        return error.fields
    return {}


@pytest.mark.parametrize("value", ["yes", "YES", " true ", True, "1", 1, "on"])
def test_a_flag_is_read(value: JsonValue) -> None:
    assert parse(Wish, {"flag": value})[0].flag is True


@pytest.mark.parametrize("value", ["no", "False", False, "0", 0, "off"])
def test_a_flag_that_is_off_is_read(value: JsonValue) -> None:
    assert parse(Wish, {"flag": value})[0].flag is False


@pytest.mark.parametrize("value", ["512", 512, 512.0, "512.0", " 512 ", "+512"])
def test_a_whole_number_is_read(value: JsonValue) -> None:
    assert parse(Wish, {"whole": value})[0].whole == 512


@pytest.mark.parametrize("value", ["0.5", 0.5, ".5", "5e-1", " 0.50 "])
def test_a_real_number_is_read(value: JsonValue) -> None:
    assert parse(Wish, {"real": value})[0].real == 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", (1.0,)), (1, (1.0,)), ("0.5, 2", (0.5, 2.0)), ([0.5, "2"], (0.5, 2.0)), ([20], (20.0,))],
)
def test_a_list_of_reals_is_read(value: JsonValue, expected: tuple[float, ...]) -> None:
    assert parse(Wish, {"reals": value})[0].reals == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("canny", ("canny",)), ("canny, depth", ("canny", "depth")), (["canny", "depth"], ("canny", "depth"))],
)
def test_a_list_of_names_is_read(value: JsonValue, expected: tuple[str, ...]) -> None:
    assert parse(Wish, {"names": value})[0].names == expected


@pytest.mark.parametrize("value", [None, "", " ", "null", "None", []])
def test_every_spelling_of_not_given_leaves_the_default(value: JsonValue) -> None:
    body = dict.fromkeys(("flag", "text", "name", "names", "whole", "real", "reals", "word"), value)
    assert parse(Wish, body)[0] == Wish()
    assert absent(value)


@pytest.mark.parametrize("value", ["", "null", None, 0, 7, 1.5, True, "abc", 10**300])
def test_a_track_id_is_kept_as_it_is(value: JsonValue) -> None:
    kept = parse(Wish, {"track_id": value})[0].track_id
    assert kept == value
    assert type(kept) is type(value)


BAD: list[tuple[str, JsonValue, str]] = [
    ("flag", "maybe", "yes or no"),
    ("flag", 2, "yes or no"),
    ("flag", {}, "yes or no"),
    ("text", 5, "must be a string"),
    ("text", {"a": 1}, "must be a string"),
    ("text", "a\0b", "NUL"),
    ("text", "\ud800", "surrogates"),
    ("name", "x" * (MAX_NAME_CHARS + 1), "longer"),
    ("names", [["canny"]], "must be a string"),
    ("names", 5, "must be a string"),
    ("names", "," * MAX_ITEMS, "must not have more than 1000 values, got 1001"),
    ("names", ["canny"] * (MAX_ITEMS + 1), "must not have more than 1000 values, got 1001"),
    ("reals", "," * MAX_ITEMS, "must not have more than 1000 values, got 1001"),
    ("reals", [1] * (MAX_ITEMS + 1), "must not have more than 1000 values, got 1001"),
    ("whole", 63, "from 64 to 1024, a multiple of 8, got 63"),
    ("whole", 1025, "from 64 to 1024"),
    ("whole", "513", "a multiple of 8, got '513'"),
    ("whole", 512.5, "whole number"),
    ("whole", True, "got True"),
    ("whole", "5_12", "whole number"),
    ("whole", "٥١٢", "whole number"),
    ("whole", 10**400, "whole number"),
    ("whole", "1e400", "whole number"),
    ("whole", math.inf, "whole number"),
    ("whole", [512], "whole number"),
    ("real", 0, "above 0"),
    ("real", 1.0001, "up to 1"),
    ("real", "NaN", "a number"),
    ("real", "inf", "a number"),
    ("real", "1e999", "a number"),
    ("real", math.nan, "a number"),
    ("real", 10**400, "a number"),
    ("real", False, "got False"),
    ("reals", [1, 21], "from 0 to 20, got 21"),
    ("reals", [[1]], "a number"),
    ("reals", "1,x", "got 'x'"),
    ("word", "c", "one of a, b, got 'c'"),
    ("word", {"a": "b"}, "one of a, b"),
    ("track_id", {}, "a string, a number or null"),
    ("track_id", [1], "a string, a number or null"),
    ("track_id", math.inf, "finite"),
    ("track_id", "x" * 1025, "longer"),
    ("track_id", "\udfff", "surrogates"),
]


@pytest.mark.parametrize(("field", "value", "part"), BAD)
def test_a_bad_value_is_refused_with_field_and_rule(field: str, value: JsonValue, part: str) -> None:
    found = messages({field: value})
    assert list(found) == [field]
    assert found[field][0].startswith(f"The {field} field must")
    assert part in found[field][0]
    assert len(found[field][0]) < 300
    found[field][0].encode()  # can be sent


def test_all_bad_fields_are_named_and_the_good_ones_are_kept() -> None:
    wish, problems = parse(Wish, {"whole": "x", "real": 7, "text": "kept", "unknown": object.__name__})
    assert wish == Wish(text="kept")
    assert "whole" in problems
    assert "real" in problems
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert set(caught.value.fields) == {"whole", "real"}


def test_problems_keep_each_message_once() -> None:
    problems = Problems()
    problems.raise_if_any()
    problems.missing("prompt")
    problems.missing("prompt")
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert caught.value.fields == {"prompt": ["The prompt field is required."]}


def test_problems_keep_so_many_messages_of_a_field_and_count_the_rest() -> None:
    problems = Problems()
    for number in (*range(MAX_MESSAGES + 3), 0):
        problems.add("names", str(number))
    problems.missing("prompt")
    with pytest.raises(ValidationFailed) as caught:
        problems.raise_if_any()
    assert caught.value.fields["names"] == [*map(str, range(MAX_MESSAGES)), "And 3 more."]
    assert caught.value.fields["prompt"] == ["The prompt field is required."]


def test_one_value_holds_for_all_items() -> None:
    problems = Problems()
    assert per_item((), 2, 1.0, "scale", problems.add) == (1.0, 1.0)
    assert per_item((0.5,), 2, 1.0, "scale", problems.add) == (0.5, 0.5)
    assert per_item((0.5, 0.6), 2, 1.0, "scale", problems.add) == (0.5, 0.6)
    assert "scale" not in problems
    per_item((1.0, 1.0, 1.0), 2, 1.0, "scale", problems.add)
    assert "scale" in problems


def test_the_schema_shows_bounds() -> None:
    properties = Wish.model_json_schema()["properties"]
    assert (properties["whole"]["minimum"], properties["whole"]["maximum"]) == (64, 1024)
    assert properties["reals"]["anyOf"][1]["items"]["maximum"] == 20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Wish.model_fields, "other"]), json_values))
def test_any_json_is_read_or_refused(body: dict[str, JsonValue]) -> None:
    for field, texts in messages(body).items():
        assert field in Wish.model_fields
        assert all(texts)


@given(st.integers(-(10**18), 10**18))
def test_integers_survive_every_spelling(number: int) -> None:
    assert read_integer(number) == read_integer(str(number)) == read_integer(f"{number}.0") == number


@given(st.floats(-1e6, 1e6))
def test_reals_survive_their_text(number: float) -> None:
    assert read_real(number) == number
    assert read_real(f"{number:.6f}") == pytest.approx(number, abs=1e-6)


@given(json_values)
def test_whatever_is_shown_is_short_and_can_be_sent(value: JsonValue) -> None:
    show(value).encode()
    assert len(show(value)) < 2000
