"""Differences of sources: those of difflib, in bounded time."""
from records.difference import MOST_LINES, Difference, differences, summed


def test_differences_of_files_are_those_of_difflib():
    before = {"a": "x\ny\n", "b": "y\n", "same": "s\n"}
    found = differences(before, {"a": "x\nz\n", "c": "z\n", "same": "s\n"})
    assert found == [Difference("a", 1, 1, ["@@ -1,2 +1,2 @@", " x", "-y", "+z"]),
                     Difference("b", 0, 1, ["@@ -1 +0,0 @@", "-y"]),
                     Difference("c", 1, 0, ["@@ -0,0 +1 @@", "+z"])]
    assert summed(found) == "a +1 -1, b +0 -1, c +1 -0"


def test_a_difference_that_would_take_too_long_is_counted_only():
    n = 2 * MOST_LINES
    a = "".join(f"{i % 199}\n" if i % 2 else f"a{i}\n" for i in range(n))
    b = "".join(f"{i % 199}\n" if i % 2 else f"b{i}\n" for i in range(n))
    assert differences({"x": a}, {"x": b}) == [Difference("x", n // 2, n // 2, [])]
