"""What a message must say: in one line the place, what was got, what was expected, and the cure."""


def assert_says(text: str, *, where: str, got: str, expected: str, cure: str) -> None:
    """One line without a traceback that holds all four parts."""
    assert "Traceback" not in text
    assert text.count("\n") <= 1, text
    for part, words in {"where": where, "got": got, "expected": expected, "cure": cure}.items():
        assert words in text, f"{part}: {words!r} is not in {text!r}"
