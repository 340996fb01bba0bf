"""What the tests of converters share."""

from regiongpt.data.records import Record
from regiongpt.data.shards import Rejects
from regiongpt.data.sources import Converter


def run(made: Converter) -> tuple[list[Record], dict[str, int]]:
    """The records, each of which a model can learn from, and how many were left out by kind."""
    rejects = Rejects()
    records = list(made.records(rejects))
    for record in records:
        record.check()
    return records, dict(rejects.counts)
