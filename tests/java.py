"""Java and the programs of pycocoevalcap, for the tests that score captions; they skip where these are missing."""

import pytest

from regiongpt.errors import ConfigError
from regiongpt.evaluate.metrics.java import find_java, find_package


def need_java() -> None:
    """Skip the test where captions cannot be scored."""
    try:
        find_package()
        find_java()
    except ConfigError as error:
        pytest.skip(str(error))
