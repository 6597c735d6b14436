"""What the tests of the trainer share."""
import pytest

from tests.helpers.runs import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of made-up text, and what the runs of a module write beside them."""
    return make_shards(tmp_path_factory.mktemp("runs"))
