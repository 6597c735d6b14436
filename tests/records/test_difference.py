"""Differences of sources: those of difflib, in bounded time."""
import difflib

from tests.helpers.committed import ROOT

from records import difference


def test_differences_are_those_of_difflib():
    before, after = ((ROOT / name).read_text() for name in ("records/table.py", "records/report.py"))
    expected = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm=""))[2:]
    found = difference.difference("a", before, after)
    assert [line for kind, line in found.lines if kind != "place"] == [line for line in expected
                                                                       if not line.startswith("@@")]
    assert found.added == sum(line.startswith("+") for line in expected)
    assert found.removed == sum(line.startswith("-") for line in expected)
    assert difference.differences({"a": "x\n", "b": "y\n"}, {"a": "x\n", "c": "z\n"}) == [
        difference.Difference("b", 0, 1, [("place", "@@ -1,1 +1,0 @@"), ("removed", "-y")]),
        difference.Difference("c", 1, 0, [("place", "@@ -1,0 +1,1 @@"), ("added", "+z")])]


def test_a_difference_that_would_take_too_long_is_counted_only():
    """Alternating lines make difflib begin anew at every second line, repeated ones make each begin
    expensive: without a limit this takes hours."""
    n = 20_000
    a = "".join(f"{i % 199}\n" if i % 2 else f"a{i}\n" for i in range(n))
    b = "".join(f"{i % 199}\n" if i % 2 else f"b{i}\n" for i in range(n))
    assert difference.difference("x", a, b) == difference.Difference("x", n // 2, n // 2, [])
