import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.prompt_weights import MAX_WEIGHT, WeightedText, parse_weights
from serve_app.engine.prompts import PromptEncoder
from support.tiny import Zoo

MARKS = st.text(alphabet="ab ()[]:\\.0123456789-,", max_size=60)
NUMBERS = st.floats(0, MAX_WEIGHT).map(lambda number: f"{number:.3f}")


def parts(prompt: str) -> list[tuple[str, float]]:
    """Runs of text of one weight."""
    read = parse_weights(prompt)
    assert len(read.weights) == len(read.text)
    runs: list[tuple[str, float]] = []
    for letter, weight in zip(read.text, read.weights, strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1] = (runs[-1][0] + letter, weight)
        else:
            runs.append((letter, weight))
    return runs


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red fox:1.2) runs", [("a ", 1), ("red fox", 1.2), (" runs", 1)]),
        ("(a:0.5)(b:2)", [("a", 0.5), ("b", 2)]),
        ("((a:2) b:1.5)", [("a", 3), (" b", 1.5)]),
        ("(a (b) [c] {d}:1.3)", [("a (b) [c] {d}", 1.3)]),
        ("(a:.5) (b: 1.5 ) (c:2.)", [("a", 0.5), (" ", 1), ("b", 1.5), (" (c:2.)", 1)]),
        ("((a:4):3)", [("a", 5)]),
        ("(a:1.2:1.3)", [("a:1.2", 1.3)]),
        (r"a \(b:1.2\) (c\):1.2) (d\:1.2) \\ \o/", [("a (b:1.2) ", 1), ("c)", 1.2), (r" (d:1.2) \ \o/", 1)]),
    ],
)
def test_weights_are_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parts(prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "a (fox) [sat] {down}",
        "((very)) good",
        "(16:9) (:3) (at 12:30)",
        "a) b:1.2) (c",
        "(a:-1) (b:1e3) (c:x)",
        "1:2",
        "",
    ],
)
def test_everything_else_is_text(prompt: str) -> None:
    assert parse_weights(prompt).text == prompt
    assert parse_weights(prompt).plain


@given(st.one_of(st.text(), MARKS))
def test_any_text_is_read(prompt: str) -> None:
    read = parse_weights(prompt)
    assert len(read.weights) == len(read.text) <= len(prompt)
    assert all(0 <= weight <= MAX_WEIGHT for weight in read.weights)


@given(st.text(alphabet=st.characters(exclude_characters="\\():", exclude_categories=["Cs"]), min_size=1), NUMBERS)
def test_a_part_has_its_weight(words: str, number: str) -> None:
    read = parse_weights(f"a ({words}:{number}) b")
    assert read.text == f"a {words} b"
    assert list(read.weights) == [1, 1, *[float(number)] * len(words), 1, 1]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), NUMBERS)
def test_any_text_can_be_escaped(words: str, number: str) -> None:
    escaped = "".join(f"\\{letter}" if letter in "\\():" else letter for letter in words)
    assert parse_weights(escaped) == WeightedText(words, [1.0] * len(words))
    assert parse_weights(f"({escaped}:{number})") == WeightedText(words, [float(number)] * len(words))
    assert parse_weights(f"({escaped}:1)").plain


def test_deep_and_long_prompts_are_read() -> None:
    """As long as the API takes them; quadratic work would not end in this test's time."""
    deep = parse_weights("(a" * 5_000 + ":2)" * 5_000)
    assert deep.text == "a" * 5_000
    assert set(deep.weights) == {2, 4, 5}
    assert parse_weights(":" * 20_000).plain
    assert parse_weights("(" * 20_000).plain
    zeros = parse_weights("(" * 400 + "(a:0)" + ":5)" * 400)
    assert zeros.weights == [0.0]


@given(st.one_of(st.text(max_size=40), MARKS))
def test_any_prompt_is_encoded(zoo: Zoo, prompt: str) -> None:
    for model in ("base", "xl"):
        encoded = PromptEncoder()._encode(zoo.model(model), prompt, None)
        assert encoded.text.isfinite().all()
